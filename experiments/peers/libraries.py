"""Public quantization libraries, each as a function of one layer: its weight and inputs to the weight it stands for.

Letters: K inputs and N outputs of a layer, T tokens. Every function takes w float32 [N, K] and x float32 [T, K],
calibration tokens, and returns (w dequantized float32 [N, K], bits of its scales and zero points). K is a multiple of
the group size. Each library has its own defaults where no argument is given here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from sam2jq.quant.spec import QuantSpec

SCALE_BITS = 16  # of a scale, or of a zero point that is no code, whatever dtype a library computes in
Layer = tuple[np.ndarray, int]


class Method(NamedTuple):
    """A row of the table. quantize: a function of this module; inputs: how activations are rounded, if they are."""

    scheme: str
    library: str  # as pip names it
    name: str
    bits: int  # of a code
    group: int  # of inputs that share a scale
    quantize: Callable[[np.ndarray, np.ndarray], Layer]
    inputs: QuantSpec | None = None


def linear(w: np.ndarray):
    """A torch.nn.Linear with the weight `w`, without bias."""
    import torch

    torch.set_num_threads(1)  # layers are small: more threads take longer
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(np.array(w))
    return layer


def hqq(w: np.ndarray, x: np.ndarray, *, bits: int, group: int) -> Layer:
    """HQQ (half-quadratic quantization) by the function behind HQQLinear; zero points are no codes.

    Codes are not packed, since HQQLinear refuses layers with an odd number of groups.
    """
    import torch
    from hqq.core.quantize import Quantizer

    weight = linear(w).weight.data
    settings = {"round_zero": bits == 4, "axis": 1, "bitpack": False, "device": "cpu"}  # hqq_base_quant_config's
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, **settings)
    w_hat = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return w_hat.numpy(), 2 * meta["scale"].numel() * SCALE_BITS


def torchao(w: np.ndarray, x: np.ndarray, *, bits: int, config: Callable) -> Layer:
    """`torchao.quantization.quantize_` with config(), whose rounding of inputs is left to the caller."""
    import torch
    from torchao.quantization import quantize_

    layer = linear(w)
    quantize_(layer, config())
    weight, zeros = layer.weight, getattr(layer.weight, "zero_point", None)
    zero_bits = zeros.numel() * bits if zeros is not None and zeros.any() else 0  # symmetric grids have none
    return weight.dequantize().to(torch.float32).numpy(), weight.scale.numel() * SCALE_BITS + zero_bits


def integer_weights(bits: int, group: int):
    """torchao's config of asymmetric weights of `bits`."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    return IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(group), MappingType.ASYMMETRIC)


def int4_weights():
    """torchao's config of 4-bit weights for its own kernels."""
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32)


def int4_weights_and_inputs(group: int):
    """torchao's config of symmetric 4-bit weights, and of asymmetric 8-bit inputs for each token."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group))


def int8_weights_and_inputs():
    """torchao's config of symmetric 8-bit weights, a scale for each output, and of symmetric inputs for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def autoround(w: np.ndarray, x: np.ndarray, *, bits: int, group: int, steps: int = 200) -> Layer:
    """AutoRound's wrapper of a layer, asymmetric, trained by its SignSGD for the layer's output, with its rates.

    Its own loop trains the blocks of language models. As there, the best step is kept.
    """
    import torch
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import WrapperLinear

    layer = linear(w)
    settings = {"bits": bits, "group_size": group, "sym": False, "data_type": "int", "scale_dtype": torch.float32}
    for name, value in (settings | {"act_bits": 16, "act_data_type": "float"}).items():
        setattr(layer, name, value)
    wrapper = WrapperLinear(layer, enable_torch_compile=False, iters=steps)
    tokens = torch.from_numpy(np.array(x))
    target = tokens @ torch.from_numpy(np.array(w)).T
    optimizer = SignSGD(list(wrapper.params.values()), lr=1 / steps, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    least, best = float("inf"), None
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(wrapper(tokens), target)
        if loss.item() < least:
            least = loss.item()
            best = {name: value.detach().clone() for name, value in wrapper.params.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layer = wrapper.unwrapper(best)
    return layer.weight.detach().numpy(), layer.scale.numel() * (SCALE_BITS + bits)


def qwix_awq(w: np.ndarray, x: np.ndarray, *, bits: int, group: int) -> Layer:
    """qwix's AWQ on its symmetric grid; each input has a factor, too."""
    from qwix._src.core.qarray import HowToQuantize, dequantize
    from qwix.contrib.awq_core import compute_act_scale, quantize_weight

    how = HowToQuantize(qtype=f"int{bits}", channelwise_axes=(0,), tiled_axes={1: group})
    codes, factors = quantize_weight(w, compute_act_scale(x), how)
    return np.asarray(dequantize(codes) / factors), (codes.scale.size + factors.size) * SCALE_BITS


def weight_methods() -> list[Method]:
    """The methods that round weights alone, at 4, 3 and 2 bits."""
    grids = [("hqq", "Quantizer", hqq, 64), ("hqq", "Quantizer", hqq, 32)]
    grids += [("auto-round", "WrapperLinear, SignSGD", autoround, 64), ("qwix", "AWQ", qwix_awq, 64)]
    methods = []
    for bits in (4, 3, 2):
        for library, name, fn, group in grids:
            quantize = partial(fn, bits=bits, group=group)
            methods.append(Method(f"W{bits}A16", library, name, bits, group, quantize))
        to_nearest = partial(torchao, bits=bits, config=partial(integer_weights, bits, 32))
        methods.append(Method(f"W{bits}A16", "torchao", "IntxWeightOnlyConfig", bits, 32, to_nearest))
    return methods


W8A8 = partial(torchao, bits=8, config=int8_weights_and_inputs)
W4A8 = partial(torchao, bits=4, config=partial(int4_weights_and_inputs, 32))
W4A16 = partial(torchao, bits=4, config=int4_weights)
METHODS = [
    Method("W8A8", "torchao", "Int8DynamicActivationInt8WeightConfig", 8, 1, W8A8, QuantSpec(8)),
    Method("W4A8", "torchao", "Int8DynamicActivationIntxWeightConfig", 4, 32, W4A8, QuantSpec(8, symmetric=False)),
    Method("W4A16", "torchao", "Int4WeightOnlyConfig", 4, 32, W4A16),
    *weight_methods(),
]

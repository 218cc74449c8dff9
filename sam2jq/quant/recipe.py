"""The `quant` section of a config as specs by layer, and those applied to a params tree."""

from collections.abc import Iterable
from functools import partial

import jax

from sam2jq.config import DTYPE, WeightsConfig
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, layer_name, suggest, under, unflatten


def weight_specs(config: WeightsConfig, layers: Iterable[str]) -> dict[str, QuantSpec]:
    """{layer: spec} of every layer to quantize: those not skipped, each with the bits of its longest prefix.

    ValueError: a prefix that names no layer.
    """
    layers = list(layers)
    idle = [p for p in (*config.skips, *config.bits) if not any(under(layer, p) for layer in layers)]
    if idle:
        meant = suggest(idle[0], {".".join(layer.split(".")[: i + 1]) for layer in layers for i in range(9)})
        raise ValueError(
            f"quant.wgts.skips and bits: no layer under {', '.join(idle)}{meant}; layers are named as in the "
            f"checkpoint, e.g. {layers[0]}"
        )
    sign, bits = DTYPE.fullmatch(config.dtype).groups()
    [[outputs, size]] = config.group_shapes

    def spec(layer: str) -> QuantSpec:
        prefix = max((p for p in config.bits if under(layer, p)), key=len, default=None)
        return QuantSpec(
            bits=int(bits) if prefix is None else config.bits[prefix],
            symmetric=sign == "s",
            group_size=size if size > 0 else None,
            per_tensor=outputs == -1,
        )

    return {layer: spec(layer) for layer in layers if not any(under(layer, p) for p in config.skips)}


def layers(params: dict) -> list[str]:
    """The names of all layers that can be quantized: every Dense, Conv and ConvTranspose."""
    return [layer_name(path) for path in kernels(flatten(params))]


def round_weights(params: dict, specs: dict[str, QuantSpec]) -> dict:
    """`params` with the kernel of each layer in `specs` rounded to nearest."""
    flat = flatten(params)
    chosen = {path: kernel for path, kernel in kernels(flat).items() if layer_name(path) in specs}
    rounded = _quantize_all(list(chosen.values()), tuple(specs[layer_name(path)] for path in chosen))
    return unflatten(flat | dict(zip(chosen, rounded)))


@partial(jax.jit, static_argnames="specs")
def _quantize_all(weights: list, specs: tuple[QuantSpec, ...]) -> list:
    """One program for all layers: compiling a hundred small ones takes ten times as long."""
    return [quantize(w, spec) for w, spec in zip(weights, specs)]

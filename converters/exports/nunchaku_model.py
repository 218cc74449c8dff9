"""A quantized Hiera in nunchaku's two files, and a simulation of the kernels that run them.

Letters: M tokens, K inputs, N outputs, R rank, G groups of 64 inputs; h16 bfloat16.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters import hf
from converters.exports.nunchaku import BF16, INT4_GROUP, Layer, pack_layer, unpack_layer
from converters.names import array, tensor, to_torch, torch_key
from sam2jq.errors import UserError
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import TRUNK_LINEAR
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import apply_kernel, dense, materialize, materialize_params, unwrap
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import bias_path, flatten, kernels, layer_name, pytree, unflatten

BLOCKS, REST = "hiera_blocks.safetensors", "unquantized_layers.safetensors"
GRID = QuantSpec(4, group_size=INT4_GROUP, scales="bfloat16")  # the only grid that the kernels support
INT4 = {"dtype": "int4", "scale_dtype": None, "group_size": INT4_GROUP}  # of weights and of activations, for the header
NORM = re.compile(r".*\.blocks\.\d+\.(layer_)?norm[12]\.(weight|bias)")
MODEL_CLASS = "NunchakuSam2HieraModel"
WHY_NOT_ROTATED = (
    "nunchaku's kernels do not rotate the inputs of a layer: quantize without quant.rotation for such files"
)


def save_nunchaku(folder: Path, params: dict, model: Mapping, names: str) -> None:
    """Writes BLOCKS, the trunk's linear layers on GRID and the norms of its blocks, and REST, all other tensors.

    model: name, version and image_size for the files' metadata. names: the naming style, "original" or "huggingface".
    Weight leaves outside the trunk are dequantized.
    Raises UserError if a trunk layer is rotated, or if no linear layer of the trunk is on GRID.
    """
    flat = flatten(params)
    chosen = [p for p, leaf in kernels(flat).items() if TRUNK_LINEAR.fullmatch(layer_name(p)) and is_on_grid(leaf)]
    if not chosen:
        raise UserError("no linear layer of the trunk is quantized to int4: nunchaku files hold only such layers")
    layers = {p: to_layer(flat[p], flat[bias_path(p)]) for p in chosen}
    rank = max(16, *(-(-len(layer.down) // 16) * 16 for layer in layers.values()))  # loaders expect one rank
    rest = to_torch(materialize_params(params))
    for path in chosen:
        del rest[torch_key(path)], rest[torch_key(bias_path(path))]
    rest = hf.to_hf(rest) if names == "huggingface" else rest
    norms = {name: t for name, t in rest.items() if NORM.fullmatch(name)}

    linears, sizes = {}, {}
    for path, layer in layers.items():
        name = module_name(path, names)
        packed = pack_layer(with_rank(layer, rank))
        linears |= {f"{name}.{part}": tensor(t) for part, t in packed.items()}
        outputs, inputs = layer.codes.shape
        sizes[name] = {"in_features": inputs, "out_features": outputs} | {
            "padded_in_features": -(-inputs // 128) * 128,
            "padded_out_features": -(-outputs // 128) * 128,
        }
    header = {
        "model_class": MODEL_CLASS,
        "config": json.dumps({"_class_name": MODEL_CLASS, **model, "names": names, "linears": sizes}),
        "quantization_config": json.dumps({"method": "svdquant", "weight": INT4, "activation": INT4, "rank": rank}),
    }
    for name, tensors in ((BLOCKS, linears | norms), (REST, {k: t for k, t in rest.items() if k not in norms})):
        with atomic_write(folder / name, failures=(SafetensorError,)) as temporary:
            save_file(tensors, temporary, metadata=header)


def load_nunchaku(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, torch.Tensor], dict]:
    """({linear layer: its packed tensors}, all other tensors, the config in the header) of the files in `folder`."""
    tensors = {}
    for file in (BLOCKS, REST):
        with safe_open(folder / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            config = json.loads(opened.metadata()["config"])
    linears = {name: {} for name in config["linears"]}
    for key in list(tensors):
        module, _, part = key.rpartition(".")
        if module in linears:
            linears[module][part] = array(tensors.pop(key))
    return linears, tensors, config


def module_name(path: str, names: str) -> str:
    """The torch module of the kernel at `path`; names: the naming style, "original" or "huggingface"."""
    key = torch_key(path)
    return (hf.to_hf({key: torch.empty(0)}).popitem()[0] if names == "huggingface" else key).removesuffix(".weight")


def with_rank(layer: Layer, rank: int) -> Layer:
    """`layer` with its low-rank factors padded with zeros to `rank`."""
    return layer._replace(
        down=np.pad(layer.down, ((0, rank - len(layer.down)), (0, 0))),
        up=np.pad(layer.up, ((0, 0), (0, rank - layer.up.shape[1]))),
    )


def is_on_grid(leaf) -> bool:
    """Whether the codes of a leaf can be written to the file unchanged. Raises UserError if the layer is rotated."""
    inner, around = unwrap(leaf)
    if Rotated in around:
        raise UserError(WHY_NOT_ROTATED)
    plain = QuantSpec(4, group_size=INT4_GROUP)
    return isinstance(inner, QTensor) and inner.spec in (GRID, plain)


def to_layer(leaf, bias) -> Layer:
    """The `Layer` of a leaf on GRID and its bias [N]."""
    q, around = unwrap(leaf)
    inputs, outputs = q.qvalue.shape
    smooth = np.asarray(around[Smoothed].scale) if Smoothed in around else np.ones(inputs, np.float32)
    down, up = np.zeros((inputs, 0), np.float32), np.zeros((0, outputs), np.float32)
    if LowRank in around:
        down, up = np.asarray(around[LowRank].down), np.asarray(around[LowRank].up)
    h16 = lambda x: np.asarray(x).astype(BF16).astype(np.float32)
    return Layer(np.asarray(q.qvalue).T, h16(q.scale).T, np.asarray(bias), h16(smooth), down.T, up.T)


def requantize_to_grid(params: dict) -> tuple[dict, list[str]]:
    """`params` with the trunk's linear layers that are on another grid rounded to nearest on GRID, and their names.

    They keep their smoothing and their low-rank branch. Quantizers of activations are dropped: the kernels have their
    own.
    """

    def requantize(leaf):
        q, around = unwrap(leaf)
        w = jax.jit(quantize, static_argnums=1)(jnp.asarray(dequantize(q)), GRID)
        if LowRank in around:
            w = LowRank(w, around[LowRank].down, around[LowRank].up)
        return Smoothed(w, around[Smoothed].scale) if Smoothed in around else w

    flat = flatten(params)
    others = {
        path: leaf
        for path, leaf in kernels(flat).items()
        if TRUNK_LINEAR.fullmatch(layer_name(path)) and isinstance(unwrap(leaf)[0], QTensor) and not is_on_grid(leaf)
    }
    return unflatten(flat | {path: requantize(leaf) for path, leaf in others.items()}), list(map(layer_name, others))


def round_factors(leaf):
    """`leaf`, not yet quantized, with smoothing and low-rank factors in h16 and a residual that keeps the same weight.

    The rounding errors of the factors thus become part of the residual, which is quantized afterwards.
    Raises UserError if the layer is rotated.
    """
    inner, around = unwrap(leaf)
    if Rotated in around:
        raise UserError(WHY_NOT_ROTATED)
    h16 = lambda x: lax.reduce_precision(jnp.asarray(x), exponent_bits=8, mantissa_bits=7)
    weight = materialize(leaf)
    smooth = h16(around[Smoothed].scale) if Smoothed in around else jnp.ones(len(inner))
    residual = weight * smooth[:, None]
    if LowRank in around:
        before = around[Smoothed].scale if Smoothed in around else 1.0
        down = h16((around[LowRank].down.T / before).T) * smooth[:, None]  # the file holds it divided by smooth
        up = h16(around[LowRank].up)
        residual = LowRank(residual - jnp.matmul(down, up, precision="highest"), down, up)
    return Smoothed(residual, smooth) if Smoothed in around else residual


@pytree()
class Kernel:
    """A linear layer as the kernels compute it.

    codes: [K, N]. scales: [G, N]. bias: [N]. smooth: [K]. down: [K, R], applied to inputs not divided by smooth.
    up: [R, N].
    """

    codes: jax.Array
    scales: jax.Array
    bias: jax.Array
    smooth: jax.Array
    down: jax.Array
    up: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


def read_kernel(tensors: Mapping[str, np.ndarray], in_features: int, out_features: int) -> Kernel:
    """The `Kernel` of the tensors of one linear layer in the file."""
    layer = unpack_layer(tensors, in_features, out_features)
    down = layer.down / layer.smooth  # as it is stored
    return Kernel(*map(jnp.asarray, (layer.codes.T, layer.scales.T, layer.bias, layer.smooth)),
                  jnp.asarray(down.T, jnp.float32), jnp.asarray(layer.up.T))  # fmt: skip


@materialize.register
def _(w: Kernel) -> jax.Array:
    rows = w.scales.repeat(INT4_GROUP, axis=0)[: len(w.codes)]
    return w.codes * rows / w.smooth[:, None] + jnp.matmul(w.down, w.up, precision="highest")


@apply_kernel.register
def _(w: Kernel, x: jax.Array, product) -> jax.Array:
    if product is not dense:
        raise UserError("nunchaku's kernels compute linear layers only")
    return (kernel_output(w, x) - w.bias).astype(x.dtype)  # the Dense module adds the bias


def kernel_output(w: Kernel, x: jax.Array) -> jax.Array:
    """float32 [..., N], of h16 values: the output for x [..., K], rounded to h16 wherever the kernels round.

    Activations are quantized to 4 bits with one scale for each token and 64 channels. Products are exact in integers.
    Groups are summed in h16, one after the other, then the bias is added. The low-rank branch reads the unquantized x
    and is computed in float32.
    """
    h16 = lambda y: lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)
    product = lambda a, b: jnp.matmul(a, b, precision="highest")
    tokens, inputs = x.reshape(-1, x.shape[-1]).astype(jnp.float32), len(w.codes)
    tokens = h16(tokens)
    padding = [(0, 0), (0, -inputs % INT4_GROUP)]
    groups = jnp.pad(h16(tokens / w.smooth), padding).reshape(len(tokens), -1, INT4_GROUP)
    scale = jnp.abs(groups).max(-1) * jnp.float32(1 / 7)  # [M, G]
    steps = jnp.clip(jnp.round(groups / jnp.where(scale > 0, scale, 1)[..., None]), -8, 7)
    codes = jnp.pad(w.codes.astype(jnp.float32), padding[::-1]).reshape(-1, INT4_GROUP, w.codes.shape[1])

    def add(total: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        step, code, activation_scale, weight_scale = group
        factor = h16(h16(activation_scale)[:, None] * weight_scale)
        return h16(h16(product(step, code)) * factor + total), None

    start = jnp.zeros((len(tokens), w.codes.shape[1]))
    main, _ = lax.scan(add, start, (steps.swapaxes(0, 1), codes, scale.T, w.scales))
    out = h16(h16(main + w.bias) + product(h16(product(tokens, w.down)), w.up))
    return out.reshape(*x.shape[:-1], -1)


def simulate_nunchaku(params: dict, folder: Path) -> dict:
    """`params` with the linear layers in `folder` as `Kernel` leaves and all other weights dequantized."""
    linears, _, config = load_nunchaku(folder)
    flat = flatten(materialize_params(params))
    for path in kernels(flat):
        if packed := linears.get(name := module_name(path, config["names"])):
            size = config["linears"][name]
            flat[path] = kernel = read_kernel(packed, size["in_features"], size["out_features"])
            flat[bias_path(path)] = kernel.bias
    return unflatten(flat)

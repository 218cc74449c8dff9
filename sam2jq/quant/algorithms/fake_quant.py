"""Fake quantization for training: weights are rounded in the forward pass, with traced bits.

Since bits are arrays and not constants, one compiled training step serves every width.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.leaves import base_weight, materialize
from sam2jq.quant.padding import pad_kernel, unpad_qtensor
from sam2jq.quant.qtensor import (
    QTensor,
    by_group,
    compute_scale_zero_point,
    dequantize,
    from_groups,
    group_count,
    round_to_grid,
    split_bits,
    storage_dtype,
    trace_spec,
)
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import each_layer, map_base_weight
from sam2jq.tree import flatten, kernels, layer_name, pytree, unflatten

Array = jax.Array
MIN_CLIP_RATIO = 0.05  # the least share of a group's range that its grid spans
BUFFER = "positional_encoding_gaussian_matrix"  # random, never trained


@pytree(static=["spec"])
class FakeQuant:
    """A weight that is trained under rounding; `materialize` gives dequantize(to_qtensor(self)), with gradients.

    kernel: float32 [*reduce, out], trained. clip_ratio: [groups, out], or [1, 1] per tensor: the share of each group's
    range that its grid spans; trained as LSQ's step size (arXiv 1902.08153), but valid for any number of bits.
    bits: float32 [], used in place of spec.bits.
    """

    kernel: Array
    clip_ratio: Array
    bits: Array
    spec: QuantSpec


def scale_and_zero_point(w: FakeQuant) -> tuple[Array, Array]:
    """The scale and zero point [groups, 1, out] of a weight; their gradients reach only clip_ratio."""
    grouped = jax.lax.stop_gradient(by_group(w.kernel, w.spec))
    low, high = grouped.min(1, keepdims=True), grouped.max(1, keepdims=True)
    share = jnp.maximum(w.clip_ratio, MIN_CLIP_RATIO)[:, None]
    return compute_scale_zero_point(low * share, high * share, trace_spec(w.spec, w.bits))


@materialize.register
def _(w: FakeQuant) -> Array:
    scale, zero_point = scale_and_zero_point(w)
    grouped = by_group(w.kernel, w.spec)
    if (
        len(grouped) == 1
    ):  # in the gradient, XLA's sum over the middle of three axes takes fifty times as long as over one of two
        grouped, scale, zero_point = grouped[0], scale[0], zero_point[0]
    codes = round_to_grid(grouped, scale, zero_point, trace_spec(w.spec, w.bits))
    return from_groups((codes - zero_point) * scale, w.kernel.shape)


def materialize_fake_quant(params: dict) -> dict:
    """`params` with every FakeQuant as the float array that `materialize` gives.

    Weights that share a spec and a group size are computed as one array: XLA's time to compile and to load the training
    step grows with the number of its kernels, of which rounding layer by layer makes a fifth.
    """
    flat = flatten(params)
    weights = {path: base_weight(node) for path, node in kernels(flat).items()}
    alike, arrays = defaultdict(list), {}
    for path, w in weights.items():
        if isinstance(w, FakeQuant) and w.spec.scales == "e4m3":  # a scale depends on the whole tensor
            arrays[path] = materialize(w)
        elif isinstance(w, FakeQuant):
            alike[split_bits(w.spec)[0], by_group(w.kernel, w.spec).shape[1]].append(path)
    for paths in alike.values():
        arrays |= zip(paths, _materialize_together([weights[path] for path in paths]))
    replace_at = lambda path, node: map_base_weight(node, None, lambda w, _: arrays.get(path, w))
    return unflatten(flat | {path: replace_at(path, node) for path, node in kernels(flat).items()})


def _materialize_together(weights: list[FakeQuant]) -> list[Array]:
    """`materialize` of each of `weights`, whose groups have one size: a group of an output is a column of one array."""
    grouped = [by_group(w.kernel, w.spec) for w in weights]  # [groups, size, out] each
    widths = [len(x) * x.shape[2] for x in grouped]
    joined = FakeQuant(
        jnp.concatenate([x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in grouped], 1),
        jnp.concatenate([w.clip_ratio.reshape(1, -1) for w in weights], 1),
        jnp.concatenate([jnp.full(width, w.bits) for w, width in zip(weights, widths)]),
        replace(weights[0].spec, group_size=None, per_tensor=False),
    )
    parts = jnp.split(materialize(joined), np.cumsum(widths)[:-1], axis=1)
    columns = lambda part, x: part.reshape(x.shape[1], len(x), -1).swapaxes(0, 1)
    return [from_groups(columns(part, x), w.kernel.shape) for part, x, w in zip(parts, grouped, weights)]


def to_fake_quant(w: Array | QTensor, spec: QuantSpec) -> FakeQuant:
    """The FakeQuant of a weight: an array gets the grid of `spec`, a QTensor keeps its own grid.

    Raises UserError for an array with a float spec, whose bits cannot be reduced.
    """
    if isinstance(w, QTensor):
        kernel, scale = dequantize(jax.device_get(w)), np.asarray(w.scale)
        full_range = FakeQuant(kernel, np.ones_like(scale), np.float32(w.spec.bits), w.spec)
        ratio = scale / np.asarray(to_qtensor(full_range).scale)
        return jax.device_put(replace(full_range, clip_ratio=ratio))
    if spec.codes != "int":
        raise UserError(f"the bits of {spec.dtype} cannot be reduced: distillation takes sintN and uintN")
    ratio = np.ones((group_count(math.prod(w.shape[:-1]), spec), 1 if spec.per_tensor else w.shape[-1]), np.float32)
    return FakeQuant(w, jax.device_put(ratio), jax.device_put(np.float32(spec.bits)), spec)


def to_qtensor(w: FakeQuant) -> QTensor:
    """The quantized weight in codes that `w` rounds to, computed with padding."""
    w = jax.device_get(w)
    inputs, outputs = math.prod(w.kernel.shape[:-1]), w.kernel.shape[-1]
    kernel = pad_kernel(w.kernel, inputs)
    extra = group_count(len(kernel), w.spec) - len(w.clip_ratio), kernel.shape[1] - outputs
    ratio = w.clip_ratio if w.spec.per_tensor else np.pad(w.clip_ratio, [(0, n) for n in extra], constant_values=1)
    rounded = _codes(FakeQuant(kernel, ratio, w.bits, split_bits(w.spec)[0]))
    return unpad_qtensor(*rounded, w.kernel.shape, replace(w.spec, bits=int(w.bits)))


@jax.jit
def _codes(w: FakeQuant) -> tuple[Array, Array, Array]:
    scale, zero_point = scale_and_zero_point(w)
    codes = round_to_grid(by_group(w.kernel, w.spec), scale, zero_point, trace_spec(w.spec, w.bits))
    return from_groups(codes, w.kernel.shape).astype(storage_dtype(w.spec)), scale[:, 0], zero_point[:, 0]


def init_fake_quant(params: dict, specs: Mapping[str, QuantSpec]) -> dict:
    """`params` with the kernels of the layers in `specs` as FakeQuant; kernels that are QTensors keep their grids."""
    return each_layer(lambda w, _, spec: to_fake_quant(w, spec), specs).apply(params, {})


def to_quantized_params(params: dict) -> dict:
    """`params` with every FakeQuant as a QTensor."""
    convert = lambda w, _: to_qtensor(w) if isinstance(w, FakeQuant) else w
    is_leaf = lambda node: not isinstance(node, dict)
    return jax.tree.map(lambda node: map_base_weight(node, None, convert), params, is_leaf=is_leaf)


def fake_quant_layers(params: dict) -> list[str]:
    """The names of the L layers with a FakeQuant, in the order of `bits_of`."""
    return [
        layer_name(path) for path, node in kernels(flatten(params)).items() if isinstance(base_weight(node), FakeQuant)
    ]


def bits_of(params: dict) -> Array:
    """float32 [L]: the bits of each of the `fake_quant_layers`."""
    parts = map(base_weight, kernels(flatten(params)).values())
    return jnp.stack([part.bits for part in parts if isinstance(part, FakeQuant)])


def with_bits(params: dict, bits: Array) -> dict:
    """`params` with `bits` [L] for its `fake_quant_layers`."""
    flat, rest = flatten(params), iter(range(len(bits)))
    fn = lambda w, _: replace(w, bits=bits[next(rest)]) if isinstance(w, FakeQuant) else w
    return unflatten(flat | {path: map_base_weight(node, None, fn) for path, node in kernels(flat).items()})


def trainable_mask(params: dict, clipping: bool = True) -> dict:
    """A tree like `params`, True for the arrays that training changes.

    These are plain arrays, FakeQuant kernels and, with `clipping`, their clip_ratio, and the static scales of inputs.
    Bits are set by the schedule; everything else is constant.
    """

    def mark(node):
        constant = jax.tree.map(lambda _: False, node)
        match node:
            case FakeQuant():
                return replace(constant, kernel=True, clip_ratio=clipping)
            case ActQuantized():
                return replace(constant, inner=mark(node.inner), scale=None if node.scale is None else True)
            case _ if dataclasses.is_dataclass(node):
                return replace(constant, inner=mark(node.inner))
        return True

    return unflatten({path: not path.endswith(BUFFER) and mark(node) for path, node in flatten(params).items()})


def stop_gradient_where(params: dict, frozen: dict) -> dict:
    """`params` with no gradient through the arrays that are True in `frozen`, a tree like `params`."""
    return jax.tree.map(lambda leaf, stop: jax.lax.stop_gradient(leaf) if stop else leaf, params, frozen)

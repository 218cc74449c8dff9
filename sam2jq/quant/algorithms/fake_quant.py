"""Fake quantization for training: weights are rounded in the forward pass, with traced bits.

Since bits are arrays and not constants, one compiled training step serves every width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.leaves import base_weight, materialize
from sam2jq.quant.qtensor import (
    QTensor,
    by_group,
    compute_scale_zero_point,
    dequantize,
    from_groups,
    round_to_grid,
    storage_dtype,
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


class TracedSpec(NamedTuple):
    """The fields of a QuantSpec that define a grid, with bits that may be traced."""

    qmin: Array
    qmax: Array
    symmetric: bool
    scales: str
    codes: str = "int"


def trace_spec(spec: QuantSpec, bits: Array) -> TracedSpec:
    """`spec` with `bits`, a float32 array []."""
    levels = jnp.left_shift(1, bits.astype(jnp.int32)).astype(jnp.float32)  # 2 ** x may be inexact
    qmax = levels / 2 - 1 if spec.symmetric else levels - 1
    return TracedSpec(-qmax if spec.symmetric else jnp.float32(0), qmax, spec.symmetric, spec.scales)


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


def to_fake_quant(w: Array | QTensor, spec: QuantSpec) -> FakeQuant:
    """The FakeQuant of a weight: an array gets the grid of `spec`, a QTensor keeps its own grid.

    Raises UserError for an array with a float spec, whose bits cannot be reduced.
    """
    if isinstance(w, QTensor):
        full_range = FakeQuant(dequantize(w), jnp.ones_like(w.scale), jnp.float32(w.spec.bits), w.spec)
        return replace(full_range, clip_ratio=w.scale / scale_and_zero_point(full_range)[0][:, 0])
    if spec.codes != "int":
        raise UserError(f"the bits of {spec.dtype} cannot be reduced: distillation takes sintN and uintN")
    groups = by_group(w, spec).shape
    return FakeQuant(w, jnp.ones((groups[0], groups[2])), jnp.float32(spec.bits), spec)


def to_qtensor(w: FakeQuant) -> QTensor:
    """The quantized weight in codes that `w` rounds to."""
    spec = replace(w.spec, bits=int(w.bits))
    scale, zero_point = scale_and_zero_point(w)
    codes = round_to_grid(by_group(w.kernel, spec), scale, zero_point, spec)
    qvalue = from_groups(codes, w.kernel.shape).astype(storage_dtype(spec))
    return QTensor(qvalue, scale[:, 0], None if spec.symmetric else zero_point[:, 0], spec)


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

"""Weights that are rounded while they learn, with bits that are data: one compiled step serves every width."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.leaves import materialize
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
MIN_CLIP_RATIO = 0.05  # of a group's range that a grid spans at least
BUFFER = "positional_encoding_gaussian_matrix"  # drawn once, never learned


@pytree(static=["spec"])
class FakeQuant:
    """kernel: float32 [*reduce, out], which learns; clip: [groups, out], or [1, 1] per tensor, the share of each
    group's range that its grid spans, which learns too (LSQ, arXiv 1902.08153, in units in which it outlasts a change
    of bits); bits: float32 [], in place of the spec's. It stands for dequantize(freeze(self)).
    """

    kernel: Array
    clip_ratio: Array
    bits: Array
    spec: QuantSpec


class TracedSpec(NamedTuple):
    """What a grid has to know of a QuantSpec, with bits that may be traced."""

    qmin: Array
    qmax: Array
    symmetric: bool
    scales: str
    codes: str = "int"


def trace_spec(spec: QuantSpec, bits: Array) -> TracedSpec:
    """`spec` with other bits."""
    levels = jnp.left_shift(1, bits.astype(jnp.int32)).astype(jnp.float32)  # 2 ** x may be inexact
    qmax = levels / 2 - 1 if spec.symmetric else levels - 1
    return TracedSpec(-qmax if spec.symmetric else jnp.float32(0), qmax, spec.symmetric, spec.scales)


def scale_and_zero_point(w: FakeQuant) -> tuple[Array, Array]:
    """The scale and zero [groups, 1, out] of a weight; only `clip` learns from them."""
    grouped = jax.lax.stop_gradient(by_group(w.kernel, w.spec))
    low, high = grouped.min(1, keepdims=True), grouped.max(1, keepdims=True)
    share = jnp.maximum(w.clip_ratio, MIN_CLIP_RATIO)[:, None]
    return compute_scale_zero_point(low * share, high * share, trace_spec(w.spec, w.bits))


@materialize.register
def _(w: FakeQuant) -> Array:
    scale, zero_point = scale_and_zero_point(w)
    grouped = by_group(w.kernel, w.spec)
    if len(grouped) == 1:  # XLA's sum over the middle of three axes, in the gradient, takes fifty times that of two
        grouped, scale, zero_point = grouped[0], scale[0], zero_point[0]
    codes = round_to_grid(grouped, scale, zero_point, trace_spec(w.spec, w.bits))
    return from_groups((codes - zero_point) * scale, w.kernel.shape)


def to_fake_quant(w: Array | QTensor, spec: QuantSpec) -> FakeQuant:
    """A weight as it starts to learn: an array on the grid that `spec` fits to it, a QTensor on the grid it has."""
    if isinstance(w, QTensor):
        whole = FakeQuant(dequantize(w), jnp.ones_like(w.scale), jnp.float32(w.spec.bits), w.spec)
        return replace(whole, clip_ratio=w.scale / scale_and_zero_point(whole)[0][:, 0])
    if spec.codes != "int":
        raise UserError(f"{spec.dtype} has no width to lower: distillation takes sintN and uintN")
    groups = by_group(w, spec).shape
    return FakeQuant(w, jnp.ones((groups[0], groups[2])), jnp.float32(spec.bits), spec)


def to_qtensor(w: FakeQuant) -> QTensor:
    """The quantized weight that a learned one stands for."""
    spec = replace(w.spec, bits=int(w.bits))
    scale, zero_point = scale_and_zero_point(w)
    codes = round_to_grid(by_group(w.kernel, spec), scale, zero_point, spec)
    qvalue = from_groups(codes, w.kernel.shape).astype(storage_dtype(spec))
    return QTensor(qvalue, scale[:, 0], None if spec.symmetric else zero_point[:, 0], spec)


def base_weight(node) -> object:
    """The part of a kernel's leaves that holds the weight."""
    found = []
    map_base_weight(node, None, lambda w, _: found.append(w))
    return found[0]


def init_fake_quant(params: dict, specs: Mapping[str, QuantSpec]) -> dict:
    """`params` whose layers in `specs` learn under rounding; kernels that are QTensors keep their grids."""
    return each_layer(lambda w, _, spec: to_fake_quant(w, spec), specs).apply(params, {})


def to_quantized_params(params: dict) -> dict:
    """The quantized model that a student has become."""
    freeze_it = lambda w, _: to_qtensor(w) if isinstance(w, FakeQuant) else w
    return jax.tree.map(lambda node: map_base_weight(node, None, freeze_it), params, is_leaf=is_kernel)


def is_kernel(node) -> bool:
    return not isinstance(node, dict)


def fake_quant_layers(params: dict) -> list[str]:
    """The layers that learn under rounding, in the order of `bits_of`."""
    found = kernels(flatten(params))
    return [layer_name(path) for path, node in found.items() if isinstance(base_weight(node), FakeQuant)]


def bits_of(params: dict) -> Array:
    """float32 [L]: the bits of each of `learning` layers."""
    parts = map(base_weight, kernels(flatten(params)).values())
    return jnp.stack([part.bits for part in parts if isinstance(part, FakeQuant)])


def with_bits(params: dict, bits: Array) -> dict:
    """`params` with other bits [L] for its `learning` layers."""
    flat, rest = flatten(params), iter(range(len(bits)))
    fn = lambda w, _: replace(w, bits=bits[next(rest)]) if isinstance(w, FakeQuant) else w
    return unflatten(flat | {path: map_base_weight(node, None, fn) for path, node in kernels(flat).items()})


def trainable_mask(params: dict, clipping: bool = True) -> dict:
    """A tree like `params` with True for what training changes: plain arrays, weights, with `clipping` the share of
    their range, and the scales of inputs that calibration fixed. Bits are the schedule's; all else stays."""

    def mark(node):
        nothing = jax.tree.map(lambda _: False, node)
        match node:
            case FakeQuant():
                return replace(nothing, kernel=True, clip_ratio=clipping)
            case ActQuantized():
                return replace(nothing, inner=mark(node.inner), scale=None if node.scale is None else True)
            case _ if dataclasses.is_dataclass(node):
                return replace(nothing, inner=mark(node.inner))
        return True

    return unflatten({path: not path.endswith(BUFFER) and mark(node) for path, node in flatten(params).items()})


def stop_gradient_where(params: dict, marks: dict) -> dict:
    """`params`, whose leaves that `marks` of `trainable_mask` leaves out pass no gradient on."""
    return jax.tree.map(lambda leaf, mark: leaf if mark else jax.lax.stop_gradient(leaf), params, marks)

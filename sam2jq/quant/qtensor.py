"""A quantized weight: its codes and scales, and how arrays are rounded to it and read from it."""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.quant.spec import E2M1, QuantSpec
from sam2jq.tree import pytree

Array = jax.Array


@pytree(static=["spec"])
class QTensor:
    """A weight in codes: w = (qvalue - zero_point) * scale, bit for bit.

    qvalue: [*reduce, out], in the `storage_dtype` of the spec. scale: float32 [groups, out], or [1, 1] per tensor.
    zero_point: int16 of the same shape, so that the difference to a code of 8 bits fits; None on symmetric grids.
    """

    qvalue: Array
    scale: Array
    zero_point: Array | None
    spec: QuantSpec


class TracedSpec(NamedTuple):
    """A QuantSpec of integer codes with bits that may be traced: qmin and qmax are arrays, bits is their limit."""

    qmin: Array
    qmax: Array
    symmetric: bool
    group_size: int | None
    per_tensor: bool
    scales: str
    codes: str = "int"
    bits: int = 8


def trace_spec(spec: QuantSpec, bits: Array) -> TracedSpec:
    """`spec` with `bits`, a float32 array []."""
    levels = jnp.left_shift(1, bits.astype(jnp.int32)).astype(jnp.float32)  # 2 ** x may be inexact
    qmax = levels / 2 - 1 if spec.symmetric else levels - 1
    qmin = -qmax if spec.symmetric else jnp.float32(0)
    return TracedSpec(qmin, qmax, spec.symmetric, spec.group_size, spec.per_tensor, spec.scales)


def split_bits(spec: QuantSpec) -> tuple[QuantSpec, np.ndarray]:
    """(spec, bits) for `join_bits`: specs that differ in bits only are split into the same spec.

    A jitted function with a static spec and traced bits is so compiled once for all widths.
    """
    return spec if spec.codes == "float" else replace(spec, bits=8), np.float32(spec.bits)


def join_bits(spec: QuantSpec, bits: Array) -> QuantSpec | TracedSpec:
    """The inverse of `split_bits`; `bits` may be traced. Those of float codes are static, in `spec` itself."""
    return spec if spec.codes == "float" else trace_spec(spec, bits)


def group_count(inputs: int, spec: QuantSpec) -> int:
    """The number of groups that share a scale among the `inputs` of an output channel, or of a tensor."""
    return math.ceil(inputs / (spec.group_size or inputs))


def by_group(w: Array, spec: QuantSpec) -> Array:
    """[*reduce, out] -> [groups, group_size, out]; an incomplete last group is padded with zeros.

    The padding changes no scale, since every grid includes 0.
    """
    if spec.per_tensor:
        return w.reshape(1, -1, 1)
    w = w.reshape(-1, w.shape[-1])
    size = spec.group_size or w.shape[0]
    return jnp.pad(w, ((0, -len(w) % size), (0, 0))).reshape(-1, size, w.shape[-1])


def from_groups(grouped: Array, shape: tuple[int, ...]) -> Array:
    """[groups, group_size, out] -> [*reduce, out]; inverse of `by_group`."""
    if grouped.shape[-1] != shape[-1]:  # per tensor
        return grouped.reshape(shape)
    return grouped.reshape(-1, shape[-1])[: math.prod(shape[:-1])].reshape(shape)


def fit_scale_zero_point(grouped: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """The scale and zero point, [groups, 1, out] each, of the grids that span [groups, group_size, out]."""
    return compute_scale_zero_point(grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True), spec)


def compute_scale_zero_point(low: Array, high: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """The scale and zero point of the grids that span `low`..`high`, arrays of one shape, and 0.

    Where both are 0 the scale is 1, so that zeros stay zero. Divisions by constants are written as products with the
    reciprocal, as XLA compiles them: so eager and jitted calls give the same bits.
    """
    if spec.symmetric:
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high)) * reciprocal(spec.qmax)
        zero_point = jnp.zeros_like(scale)
    else:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scale = (high - low) * reciprocal(spec.qmax)
        zero_point = jnp.clip(jnp.round(-low / jnp.where(scale > 0, scale, 1)), spec.qmin, spec.qmax)
    if spec.scales == "e4m3":  # the largest scale is the largest e4m3 number times a factor that all groups share
        common = scale.max() * reciprocal(448)
        scale = to_e4m3(scale / jnp.where(common > 0, common, 1)) * common
    elif spec.scales == "bfloat16":
        scale = lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)  # XLA may remove a pair of casts
    return jnp.where(scale > 0, scale, 1), zero_point


def reciprocal(x: float | Array) -> Array:
    """1 / x in float32."""
    return jnp.float32(1) / x


def to_e4m3(x: Array) -> Array:
    """x rounded to an 8-bit float, clipped at 448, as float32."""
    return jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)


@jax.custom_jvp
def ste_round(x: Array) -> Array:
    """x rounded to integers, half to even; gradients pass straight through the rounding (STE, arXiv 1308.3432)."""
    return jnp.round(x)


@ste_round.defjvp
def _(primals, tangents):
    return ste_round(*primals), tangents[0]


def round_to_grid(x: Array, scale: Array, zero_point: Array, spec: QuantSpec) -> Array:
    """The codes, as float32, of the grid points (code - zero_point) * scale nearest to x; half to even, e2m1 half to 0.

    On integer grids the gradient of x is 1 inside the grid and 0 where codes are clipped; that of the scale is LSQ's
    (arXiv 1902.08153): the rounding error inside, the end of the grid outside.
    """
    if spec.codes == "int":
        codes = ste_round(x * (1 / scale) + zero_point)  # as XLA compiles a division by a broadcast scale
        codes = jnp.where(codes > spec.qmax, spec.qmax, codes)  # jnp.clip halves gradients at its limits
        return jnp.where(codes < spec.qmin, spec.qmin, codes)
    if spec.bits == 8:
        return to_e4m3(x * (1 / scale))
    magnitudes = jnp.array(E2M1)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    found = magnitudes[jnp.searchsorted(middles, jnp.abs(x * (1 / scale)), method="compare_all")]
    return jnp.where(x < 0, -found, found) + 0.0  # no negative zero


def storage_dtype(spec: QuantSpec | TracedSpec):
    """The dtype of a QTensor's qvalue: of 4 bits or of 8, of integers or of floats.

    Devices hold two codes of 4 bits in a byte, also those of 2 and 3 bits. numpy holds each in a byte of its own, and
    the `nbytes` of a jax array counts as numpy does.
    """
    if spec.codes == "float":
        return jnp.float4_e2m1fn if spec.bits == 4 else jnp.float8_e4m3fn
    if spec.bits <= 4:
        return jnp.int4 if spec.symmetric else jnp.uint4
    return jnp.int8 if spec.symmetric else jnp.uint8


def quantize(w: Array, spec: QuantSpec | TracedSpec) -> QTensor:
    """`w` [*reduce, out] rounded to nearest on the grid that spans it."""
    return _quantize_jitted(w, spec) if isinstance(spec, QuantSpec) else _quantize(w, spec)


def _quantize(w: Array, spec: QuantSpec | TracedSpec) -> QTensor:
    grouped = by_group(w.astype(jnp.float32), spec)
    scale, zero_point = fit_scale_zero_point(grouped, spec)
    qvalue = from_groups(round_to_grid(grouped, scale, zero_point, spec), w.shape).astype(storage_dtype(spec))
    return QTensor(qvalue, scale[:, 0], None if spec.symmetric else zero_point[:, 0].astype(jnp.int16), spec)


_quantize_jitted = jax.jit(_quantize, static_argnames="spec")  # one program in place of a dozen operations


def dequantize(q: QTensor) -> Array:
    """float32 [*reduce, out]: (qvalue - zero_point) * scale; a numpy array if the fields are numpy arrays."""
    jitted = isinstance(q.spec, QuantSpec) and isinstance(q.qvalue, jax.Array)
    return _dequantize_jitted(q) if jitted else _dequantize(q)


def _dequantize(q: QTensor) -> Array:
    codes = q.qvalue.reshape(-1, q.qvalue.shape[-1]).astype(jnp.float32)
    # one row of scales for each row of codes; a single row is broadcast
    rows = lambda x: x if len(x) == 1 else x.repeat(q.spec.group_size, axis=0)[: len(codes)]
    centred = codes if q.zero_point is None else codes - rows(q.zero_point).astype(jnp.float32)
    return (centred * rows(q.scale)).reshape(q.qvalue.shape)


_dequantize_jitted = jax.jit(_dequantize)

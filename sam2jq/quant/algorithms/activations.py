"""Activations rounded on their way into a layer or out of it, and layers computed in integers where weights are too.

Letters: K inputs, N outputs, G groups of them that share a scale.
"""

import math

import jax
import jax.numpy as jnp

from sam2jq.quant.leaves import apply_kernel, dense, materialize, quantize_output, weight_leaf
from sam2jq.quant.qtensor import QTensor, compute_scale_zero_point, round_to_grid
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats, map_base_weight

Array = jax.Array
NONNEGATIVE_RATIO = 1 / 8


@weight_leaf(static=["spec", "integer"])
class ActQuantized:
    """y = contract(inner, rounded x). spec's groups run along the channels of a token: one scale a token without.

    scale, zero: [], of all inputs, when they were fixed by calibration; None when each call measures its own.
    integer: matmul multiplies codes in int32 (equal to rounding error); else it multiplies what the codes stand for.
    """

    inner: object
    scale: Array | None
    zero_point: Array | None
    spec: QuantSpec
    integer: bool = False


@weight_leaf(static=["spec"])
class OutQuantized:
    """What leaves the layer is rounded by spec, each call measuring its range; the outermost of leaves."""

    inner: object
    spec: QuantSpec


def quantize_inputs(
    w, stats: Stats | None, spec: QuantSpec, *, static: bool = False, integer: bool = False
) -> ActQuantized:
    """`w` with its inputs rounded by `spec`; `static`: on the one grid that spans all inputs in `stats`."""
    scale = zero_point = None
    if static:
        scale, zero_point = compute_scale_zero_point(stats.low.min(), stats.high.max(), spec)
    return ActQuantized(w, scale, zero_point, spec, integer)


def is_nonnegative(stats: Stats) -> bool:
    """Whether inputs lie between 0 and their largest, or hardly below: GELU never comes under -0.17."""
    return bool(-stats.low.min() <= NONNEGATIVE_RATIO * stats.high.max())


def quantize_tokens(x: Array, spec: QuantSpec, scale: Array | None = None, zero_point: Array | None = None):
    """Codes [..., G, K / G] of x [..., K], float32, with their scale and zero [..., G, 1] or as given.

    A last group that the channels do not fill is filled with zeros.
    """
    size = spec.group_size or x.shape[-1]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    grouped = x.reshape(*x.shape[:-1], -1, size)
    if scale is None:
        axes = None if spec.per_tensor else -1
        scale, zero_point = compute_scale_zero_point(
            grouped.min(axes, keepdims=True), grouped.max(axes, keepdims=True), spec
        )
    return round_to_grid(grouped, scale, zero_point, spec), scale, zero_point


def fake_quantize(x: Array, spec: QuantSpec, scale: Array | None = None, zero_point: Array | None = None) -> Array:
    """x [..., K] rounded to the nearest points of its grids."""
    codes, scale, zero_point = quantize_tokens(x, spec, scale, zero_point)
    return ((codes - zero_point) * scale).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


@materialize.register
def _(w: ActQuantized) -> Array:
    return materialize(w.inner)


@apply_kernel.register
def _(w: ActQuantized, x: Array, product) -> Array:
    if w.integer and product is dense and isinstance(w.inner, QTensor) and w.spec.codes == w.inner.spec.codes == "int":
        return integer_matmul(w, x).astype(x.dtype)
    return apply_kernel(w.inner, fake_quantize(x, w.spec, w.scale, w.zero_point), product)


@map_base_weight.register
def _(w: ActQuantized, stats, fn):
    return ActQuantized(map_base_weight(w.inner, stats, fn), w.scale, w.zero_point, w.spec, w.integer)


@materialize.register
def _(w: OutQuantized) -> Array:
    return materialize(w.inner)


@apply_kernel.register
def _(w: OutQuantized, x: Array, product) -> Array:
    return apply_kernel(w.inner, x, product)


@quantize_output.register
def _(w: OutQuantized, y: Array) -> Array:
    return fake_quantize(y, w.spec)


@map_base_weight.register
def _(w: OutQuantized, stats, fn):
    return OutQuantized(map_base_weight(w.inner, stats, fn), w.spec)


@jax.jit
def materialize_weights(params: dict) -> dict:
    """`params` with weights as the float32 arrays they stand for: whole leaves where no activations are rounded, else
    what stands inside the leaves around them.

    It computes the same to rounding error, and faster where a model runs more than once, in programs that most
    quantized models share with plain ones; layers that multiply integers stay as they are.
    """

    def leaf(node):
        if on_integers(node):
            return node
        return (
            map_base_weight(node, None, lambda w, _: materialize(w)) if rounds_activations(node) else materialize(node)
        )

    return jax.tree.map(leaf, params, is_leaf=lambda node: not isinstance(node, dict))


def rounds_activations(node) -> bool:
    """Whether a kernel's leaf rounds what enters or leaves it."""
    return isinstance(node, ActQuantized | OutQuantized) or (hasattr(node, "inner") and rounds_activations(node.inner))


def on_integers(node) -> bool:
    """Whether a kernel's leaf multiplies codes, not what they stand for."""
    return getattr(node, "integer", False) or (hasattr(node, "inner") and on_integers(node.inner))


def integer_matmul(w: ActQuantized, x: Array) -> Array:
    """f32 [..., N]: products of int8 codes, added in int32 as far as a pair of scales reaches, then scaled.

    With codes c and zeros z the sum over a block is c_x . c_w - z_x sum(c_w) - z_w sum(c_x) + size z_x z_w.
    """
    weight, spec = w.inner, w.inner.spec
    width, outputs = weight.qvalue.shape
    codes, scale, zero_point = quantize_tokens(x, w.spec, w.scale, w.zero_point)
    size = math.gcd(w.spec.group_size or width, spec.group_size or width)
    blocks = -(-width // size)

    reach = lambda of: blocks if of.group_size is None else of.group_size // size  # blocks that share a scale

    def per_block(qvalue: Array) -> Array:  # [..., G, 1] -> [..., blocks, 1]
        qvalue = jnp.broadcast_to(qvalue, (*x.shape[:-1], codes.shape[-2], 1))
        return qvalue.repeat(reach(w.spec), axis=-2)[..., :blocks, :]

    scale, zero_point = per_block(scale), per_block(zero_point)
    middle = 0 if w.spec.symmetric else 2 ** (w.spec.bits - 1)  # brings 0..255 into int8
    codes = codes.reshape(*x.shape[:-1], -1)[..., : blocks * size] - middle
    codes = jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, blocks * size - codes.shape[-1])])
    codes, zero_point = (
        codes.reshape(*x.shape[:-1], blocks, size).astype(jnp.int8),
        (zero_point - middle).astype(jnp.int32),
    )

    rows = lambda of: jnp.broadcast_to(of, (len(of), outputs)).repeat(reach(spec), axis=0)[:blocks]
    weight_scale = rows(weight.scale)
    centre = 0 if spec.symmetric else 2 ** (spec.bits - 1)
    kernel = weight.qvalue.astype(jnp.int32) - centre
    weight_zero = -centre if weight.zero_point is None else weight.zero_point.astype(jnp.int32) - centre
    weight_zero = rows(jnp.broadcast_to(weight_zero, (len(weight.scale), 1 if spec.per_tensor else outputs)))
    real = jnp.pad(jnp.ones(width, jnp.int8), (0, blocks * size - width)).reshape(blocks, size)
    kernel = jnp.pad(kernel, ((0, blocks * size - width), (0, 0))).reshape(blocks, size, outputs).astype(jnp.int8)

    add = lambda text, *parts: jnp.einsum(text, *parts, preferred_element_type=jnp.int32)
    sums = add("...gk,gkn->...gn", codes, kernel) - zero_point * add("gkn->gn", kernel.astype(jnp.int32))
    sums -= weight_zero * add("...gk,gk->...g", codes, real)[..., None]
    sums += zero_point * weight_zero * real.astype(jnp.int32).sum(-1)[:, None]
    return jnp.einsum("...gn,...gn->...n", sums.astype(jnp.float32), scale * weight_scale)

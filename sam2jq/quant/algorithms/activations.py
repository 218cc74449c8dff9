"""Quantized activations: what enters a layer, or leaves it, rounded to its own grid; and layers computed in integers.

Letters: K inputs, N outputs, G groups of channels that share a scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from sam2jq.errors import ConfigError
from sam2jq.quant.field_types import check_types
from sam2jq.quant.leaves import apply_kernel, dense, materialize, quantize_output, unwrap, weight_leaf
from sam2jq.quant.qtensor import QTensor, compute_scale_zero_point, round_to_grid
from sam2jq.quant.spec import QuantSpec, check_bits, parse_spec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, each_layer, map_base_weight, specs_by_layer
from sam2jq.tree import flatten, kernels, layer_name, unflatten

Array = jax.Array
NONNEGATIVE_RATIO = 1 / 8  # |minimum| / maximum up to which inputs count as nonnegative


@dataclass(frozen=True)
class InputsConfig:
    """How the inputs of the layers with quantized weights are rounded: the section `quant.ipts`."""

    # sintN or uintN with N in 2..8, fp4, nvfp4, fp8; null leaves activations as they are
    dtype: str | None = None
    # [[1, -1]] one scale per token, [[1, g]] per token and g channels, [[-1, -1]] per tensor
    group_shapes: list[list[int]] = field(default_factory=lambda: [[1, -1]])
    # the range is fixed by calibration (per tensor); otherwise it is measured in each call
    static: bool = False
    # dotted prefixes of layers whose inputs are not rounded
    skips: list[str] = field(default_factory=list)
    # use uintN in place of sintN in layers whose inputs are nonnegative, as after ReLU and nearly so after GELU
    allow_unsigned: bool = False
    # dotted prefixes of the layers that use uintN; calibration finds them if allow_unsigned is set
    unsigned: list[str] = field(default_factory=list)
    # {dotted prefix: bits}; the longest prefix wins
    bits: dict[str, int] = field(default_factory=dict)
    # mean bits of an input over all multiplications; each layer gets the width that its output error asks for
    target_bits: float | None = None

    def __post_init__(self):
        check_types(self)
        if self.dtype is not None:
            parse_spec(self.dtype, self.group_shapes)
        check_bits(self.bits, self.target_bits)
        is_integer = "int" in (self.dtype or "")
        if (self.bits or self.mixed) and not is_integer:
            raise ConfigError(f"bits and target_bits need an integer dtype, such as uint4, not {self.dtype}")
        if (self.allow_unsigned or self.unsigned) and not is_integer:
            raise ConfigError(f"allow_unsigned: dtype {self.dtype} has no unsigned form; sint8 and other sintN have")
        if self.static and self.group_shapes != [[-1, -1]]:
            raise ConfigError(
                f"static: a range fixed by calibration is per tensor: set group_shapes to [[-1, -1]], "
                f"not {self.group_shapes}"
            )

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen layer by layer for a target."""
        return self.target_bits is not None


@dataclass(frozen=True)
class OutputsConfig(InputsConfig):
    """How the outputs of these layers, bias added, are rounded: the section `quant.opts`.

    The fields are those of `quant.ipts`. Calibration collects no outputs, so their range is measured in each call.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.static or self.allow_unsigned or self.mixed:
            raise ConfigError("static, allow_unsigned and target_bits need calibration, which collects inputs only")


@weight_leaf(static=["spec", "integer"])
class ActQuantized:
    """A kernel whose input is rounded: y = apply_kernel(inner, rounded x).

    spec: its groups run along the channels of a token; without groups a token has one scale. scale, zero_point: [] of
    the range fixed by calibration, or None if each call measures its own. integer: multiply int8 codes and sum them in
    int32, instead of the dequantized numbers; the results agree to rounding error.
    """

    inner: object
    scale: Array | None
    zero_point: Array | None
    spec: QuantSpec
    integer: bool = False


@weight_leaf(static=["spec"])
class OutQuantized:
    """A kernel whose layer's output is rounded by `spec`, with the range of each call; the outermost leaf."""

    inner: object
    spec: QuantSpec


def quantize_activations(
    inputs: QuantSpec | Mapping[str, QuantSpec], *, static: bool = False, integer: bool = False, match: str = ".*"
) -> Transform:
    """A Transform that rounds the inputs of layers by `inputs`, one spec or {layer: spec}; see `each_layer`.

    static: one grid per layer that spans all calibration inputs; otherwise each call measures its range.
    """
    fn = lambda w, stats, spec: quantize_inputs(w, stats, spec, static=static, integer=integer)
    return each_layer(fn, inputs, {"tokens"} if static else set(), match=match, description="round inputs")


def quantize_outputs(outputs: QuantSpec | Mapping[str, QuantSpec], *, match: str = ".*") -> Transform:
    """A Transform that rounds the outputs of layers by `outputs`, one spec or {layer: spec}, outside all other leaves.

    Raises UserError in `apply` if no layer matches.
    """

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        flat, specs = flatten(params), specs_by_layer(params, outputs, match)
        chosen = {path: leaf for path, leaf in kernels(flat).items() if layer_name(path) in specs}
        return unflatten(flat | {path: OutQuantized(leaf, specs[layer_name(path)]) for path, leaf in chosen.items()})

    return Transform(frozenset(), apply, "round outputs")


def quantize_inputs(
    w, stats: Stats | None, spec: QuantSpec, *, static: bool = False, integer: bool = False
) -> ActQuantized:
    """The kernel or leaf `w` with inputs rounded by `spec`; `static`: on the grid of stats.low..stats.high."""
    scale = zero_point = None
    if static:
        scale, zero_point = compute_scale_zero_point(stats.low.min(), stats.high.max(), spec)
    return ActQuantized(w, scale, zero_point, spec, integer)


def is_nonnegative(stats: Stats) -> bool:
    """Whether the inputs are nonnegative up to NONNEGATIVE_RATIO of their maximum; GELU's minimum is -0.17."""
    return bool(-stats.low.min() <= NONNEGATIVE_RATIO * stats.high.max())


def quantize_tokens(x: Array, spec: QuantSpec, scale: Array | None = None, zero_point: Array | None = None):
    """The codes [..., G, K / G] of x [..., K], as float32, and their scale and zero point, [..., G, 1] or as given.

    An incomplete last group is padded with zeros. The range of a group is a constant to gradients.
    """
    size = spec.group_size or x.shape[-1]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    grouped = x.reshape(*x.shape[:-1], -1, size)
    if scale is None:
        axes, constant = None if spec.per_tensor else -1, jax.lax.stop_gradient(grouped)
        if spec.symmetric:  # one pass in place of two
            low = high = jnp.abs(constant).max(axes, keepdims=True)
        else:
            low, high = constant.min(axes, keepdims=True), constant.max(axes, keepdims=True)
        scale, zero_point = compute_scale_zero_point(low, high, spec)
    return round_to_grid(grouped, scale, zero_point, spec), scale, zero_point


def fake_quantize(x: Array, spec: QuantSpec, scale: Array | None = None, zero_point: Array | None = None) -> Array:
    """x [..., K] rounded to the nearest points of its grid, in the dtype of x."""
    fn = _fake_quantize_jitted if isinstance(spec, QuantSpec) else _fake_quantize
    return fn(x, spec, scale, zero_point)


def _fake_quantize(x: Array, spec: QuantSpec, scale: Array | None, zero_point: Array | None) -> Array:
    codes, scale, zero_point = quantize_tokens(x, spec, scale, zero_point)
    return ((codes - zero_point) * scale).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


_fake_quantize_jitted = jax.jit(_fake_quantize, static_argnames="spec")


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
    """`params` with weights as float32 arrays: leaves that round activations stay, with the array inside.

    The model computes the same up to rounding error. It is faster where a model runs more than once, and most quantized
    models then share one compiled program with plain ones. Layers that multiply integer codes stay as they are.
    """

    def leaf(node):
        _, around = unwrap(node)
        if any(getattr(outer, "integer", False) for outer in around.values()):
            return node
        if ActQuantized in around or OutQuantized in around:
            return map_base_weight(node, None, lambda w, _: materialize(w))
        return materialize(node)

    return jax.tree.map(leaf, params, is_leaf=lambda node: not isinstance(node, dict))


def integer_matmul(w: ActQuantized, x: Array) -> Array:
    """float32 [..., N]: x @ w by products of int8 codes, summed in int32 over each block with one pair of scales.

    For codes c and zero points z the sum over a block is c_x . c_w - z_x sum(c_w) - z_w sum(c_x) + size z_x z_w. Each
    block is one product of two matrices, which accelerators compute fastest; terms with a zero point that is always 0
    are left out.
    """
    weight, spec = w.inner, w.inner.spec
    width, outputs = weight.qvalue.shape
    rows = x.reshape(-1, width)
    codes, scale, zero_point = quantize_tokens(rows, w.spec, w.scale, w.zero_point)
    offset, weight_offset = (0 if of.symmetric else 2 ** (of.bits - 1) for of in (w.spec, spec))  # 0..255 into int8
    codes = (codes.reshape(len(rows), -1)[:, :width] - offset).astype(jnp.int8)
    kernel = (weight.qvalue.astype(jnp.int32) - weight_offset).astype(jnp.int8)
    size = math.gcd(w.spec.group_size or width, spec.group_size or width)

    def block(first: int) -> Array:
        a, b = codes[:, first : first + size], kernel[first : first + size]
        of_inputs, of_weight = first // (w.spec.group_size or width), first // (spec.group_size or width)
        at_inputs = lambda of: of[:, min(of_inputs, of.shape[1] - 1)] if jnp.ndim(of) else of  # [T or 1, 1] or []
        at_weight = lambda of: of[min(of_weight, len(of) - 1)]  # [N or 1]
        sums = jnp.matmul(a, b, preferred_element_type=jnp.int32)
        if not w.spec.symmetric:
            zero = (at_inputs(zero_point) - offset).astype(jnp.int32)
            sums -= zero * b.sum(0, dtype=jnp.int32)
        if not spec.symmetric:
            weight_zero = at_weight(weight.zero_point).astype(jnp.int32) - weight_offset
            sums -= weight_zero * a.sum(1, keepdims=True, dtype=jnp.int32)
            if not w.spec.symmetric:
                sums += a.shape[1] * zero * weight_zero
        return sums.astype(jnp.float32) * at_inputs(scale) * at_weight(weight.scale)

    return sum(map(block, range(0, width, size))).reshape(*x.shape[:-1], outputs)

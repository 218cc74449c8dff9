"""Smoothing: channels of the inputs that are hard to round shrunk, and the weight's rows grown by the same factors.

SmoothQuant (arXiv 2211.10438) divides input channel c by scale_c = activation span^alpha / weight span^beta; as in AWQ
(arXiv 2306.00978) alpha and beta are searched for by what rounding then does to the outputs.

Letters: K inputs, N outputs, T sampled tokens, C candidates, G groups of inputs that are chosen for one by one.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats, map_base_weight

Array = jax.Array
SPANS = ("AbsMax", "RMS", "RootMeanSquare")
# What a search tries, by alpha (over 0, 0, -1, -2, -3) and, in this order, beta: A alpha alone, B beta alone, E equal
# ones, M those that make 1, S all pairs. What users of deepcompressor write in their configs means the same here.
FAMILIES = {
    1: ("E", "A", "M", "AM", "AS"),
    0: ("B", "AB", "BM", "ABM", "ABS"),
    -1: ("M", "AM", "M", "AM", "AS"),
    -2: ("BM", "ABM", "BM", "ABM", "ABS"),
    -3: ("BS", "BAS", "BAS", "BAS", "BAS"),
}


@weight_leaf()
class Smoothed:
    """x @ w == (x / scale) @ inner; scale: [K]."""

    inner: object
    scale: Array


@materialize.register
def _(w: Smoothed) -> Array:
    return materialize(w.inner) / w.scale[:, None]


@apply_kernel.register
def _(w: Smoothed, x: Array, product) -> Array:
    return apply_kernel(w.inner, (x / w.scale).astype(x.dtype), product)


@map_base_weight.register
def _(w: Smoothed, stats, fn):
    return Smoothed(map_base_weight(w.inner, None if stats is None else stats.scaled(1 / w.scale), fn), w.scale)


@dataclass(frozen=True, kw_only=True)
class SmoothSpec:
    """strategy: Manual takes alpha and beta as they are (1 - the other where one is negative); GridSearch tries steps
    of 1 / num_grids in the family that they select (FAMILIES), and no smoothing, with each of `spans`, a measure of the
    activations and one of the weight. granularity: one choice a Layer, or one for each ChannelGroup, the inputs that
    share a scale of the weight. weights, inputs: how these will be rounded, None where they will not.
    """

    strategy: str
    alpha: float = 0.5
    beta: float = -1
    num_grids: int = 20
    spans: tuple[tuple[str, str], ...] = (("AbsMax", "AbsMax"),)
    granularity: str = "Layer"
    weights: QuantSpec | None = None
    inputs: QuantSpec | None = None

    def __post_init__(self):
        for name, known in {"strategy": ("Manual", "GridSearch"), "granularity": ("Layer", "ChannelGroup")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r}; allowed: {', '.join(known)}")
        if not self.spans or not {name for pair in self.spans for name in pair} <= set(SPANS):
            raise UserError(f"spans {self.spans}; allowed: pairs of {', '.join(SPANS)}")
        if self.strategy == "Manual":
            self._check_manual()
        elif self.weights is None and self.inputs is None:
            raise UserError("GridSearch judges by what rounding costs, but neither weights nor inputs are rounded")
        elif self.num_grids < 2:
            raise UserError(f"num_grids must be at least 2, got {self.num_grids}")
        elif not all(0 <= x <= 1 or x in FAMILIES for x in (self.alpha, self.beta)):
            raise UserError(f"alpha {self.alpha}, beta {self.beta}; allowed: 0 to 1, -1, -2, -3")

    def _check_manual(self):
        if len(self.spans) > 1:
            raise UserError(f"Manual takes one pair of spans, got {self.spans}; GridSearch takes several")
        if not all(0 <= x <= 1 for x in self.pairs[0]):
            raise UserError(f"alpha {self.alpha}, beta {self.beta}; Manual allows 0 to 1, and one of them negative")

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """alpha and beta of all candidates; the first of a search is (0, 0), no smoothing."""
        alpha, beta = self.alpha, self.beta
        if self.strategy == "Manual":
            return [(alpha, 1 - alpha) if beta < 0 else (1 - beta, beta) if alpha < 0 else (alpha, beta)]
        steps = [i / self.num_grids for i in range(1, self.num_grids)]
        families = {
            "A": [(c, 0) for c in steps],
            "B": [(0, c) for c in steps],
            "E": [(c, c) for c in steps],
            "M": [(c, 1 - c) for c in steps],
            "S": list(product(steps, steps)),
        }
        names = FAMILIES[1 if alpha > 0 else alpha][0 if beta > 0 else 1 - int(beta)]
        return [(0, 0)] + [pair for name in names for pair in families[name]]


def smooth(w: Array, stats: Stats, spec: SmoothSpec) -> Smoothed:
    """`w` [K, N] smoothed; a search needs tokens, and ends with outputs no further off than without smoothing.

    ValueError: not the kernel of a Dense, rounded already, or numbers that are not finite.
    """
    if isinstance(w, QTensor) or w.ndim != 2:
        got = "a rounded weight" if isinstance(w, QTensor) else f"shape {w.shape}"
        raise UserError(f"smoothing takes the kernel [inputs, outputs] of a Dense before it is rounded, got {got}")
    if spec.strategy == "GridSearch" and stats.tokens is None:
        raise UserError("a search for the best smoothing needs tokens: calibrate for them, or set strategy Manual")
    for name, array in {"weight": w, "inputs' range": stats.high - stats.low, "sampled inputs": stats.tokens}.items():
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    with jax.default_matmul_precision("highest"):  # accelerators multiply f32 in fewer bits if they may
        return _smooth(w, stats, spec)


@partial(jax.jit, static_argnames="spec")
def _smooth(w: Array, stats: Stats, spec: SmoothSpec) -> Smoothed:
    w = w.astype(jnp.float32)
    scales = candidates(w, stats, spec)
    if spec.strategy == "Manual":
        return Smoothed(w * scales[0][:, None], scales[0])
    scale = best(scales, errors(w, stats.tokens, scales, spec, len(w)), len(w))
    size = None if spec.weights is None else spec.weights.group_size
    if spec.granularity == "ChannelGroup" and size is not None:
        mixed = best(scales, errors(w, stats.tokens, scales, spec, size), size)
        both = jnp.stack([scale, mixed])  # errors of groups that were the least one by one may still add up
        scale = best(both, errors(w, stats.tokens, both, spec, len(w)), len(w))
    return Smoothed(w * scale[:, None], scale)


def candidates(w: Array, stats: Stats, spec: SmoothSpec) -> Array:
    """[C, K]: the scales of every pair of `spec.spans` and of `spec.pairs`, with 1 in place of 0.

    A candidate that would not be finite is all 1.
    """
    alpha, beta = jnp.array(spec.pairs, jnp.float32).T[..., None]  # [pairs, 1] each
    scales = [input_span(stats, a) ** alpha / weight_span(w, b) ** beta for a, b in spec.spans]
    scales = jnp.concatenate(scales)
    usable = jnp.isfinite(scales).all(1, keepdims=True)
    return jnp.where(usable & (scales != 0), scales, 1)


def recover_alpha_beta(w: Array, stats: Stats, spec: SmoothSpec, scale: Array) -> tuple[float, float] | None:
    """The alpha and beta whose `scale` [K] smoothed `w`; None where groups of inputs have their own."""
    known = np.asarray(candidates(w, stats, spec))
    off = np.abs(known / np.asarray(scale) - 1).max(1)
    at = int(np.nanargmin(off))
    return spec.pairs[at % len(spec.pairs)] if off[at] < 1e-3 else None


def input_span(stats: Stats, name: str) -> Array:
    """[K]: how far each channel of the inputs goes."""
    if name == "AbsMax":
        return jnp.maximum(-stats.low, stats.high)
    if stats.gram is None and stats.tokens is None:
        raise UserError(f"the span {name} of inputs needs gram or tokens: calibrate for them, or use AbsMax")
    return jnp.sqrt((stats.tokens**2).mean(0) if stats.gram is None else jnp.diag(stats.gram))


def weight_span(w: Array, name: str) -> Array:
    """[K]: how far the weights go that read each input."""
    return jnp.abs(w).max(1) if name == "AbsMax" else jnp.sqrt((w**2).mean(1))


def errors(w: Array, x: Array, scales: Array, spec: SmoothSpec, size: int) -> Array:
    """[C, G]: the square error, summed over tokens x [T, K] and outputs, of what each `size` inputs add to the outputs
    when smoothed by each of `scales` and rounded.
    """
    grouped = lambda a: jnp.pad(a, ((0, 0), (0, -a.shape[1] % size))).reshape(len(a), -1, size)
    outputs = lambda x, w: jnp.einsum("tgs,ngs->gtn", grouped(x), grouped(w.T))
    expected = outputs(x, w)

    def error(scale: Array) -> Array:
        small, large = x / scale, w * scale[:, None]
        small = small if spec.inputs is None else fake_quantize(small, spec.inputs)
        large = large if spec.weights is None else dequantize(quantize(large, spec.weights))
        return ((outputs(small, large) - expected) ** 2).sum((1, 2))

    return lax.map(error, scales)


def best(scales: Array, errors: Array, size: int) -> Array:
    """[K]: of each `size` inputs the scales [C, K] with the least of `errors` [C, G], the first of equal ones."""
    chosen = jnp.argmin(errors, 0).repeat(size)[: scales.shape[1]]
    return scales[chosen, jnp.arange(scales.shape[1])]

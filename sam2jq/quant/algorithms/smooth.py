"""Smoothing: strong input channels are divided by a factor, and the weight's rows multiplied by it.

SmoothQuant (arXiv 2211.10438) divides input channel c by scale_c = activation span^alpha / weight span^beta. As in AWQ
(arXiv 2306.00978), alpha and beta can be searched for by the output error after rounding.

Letters: K inputs, N outputs, T sampled tokens, C candidates, G groups of inputs with a choice of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.errors import ConfigError, UserError, one_of
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.exact import einsum
from sam2jq.quant.field_types import check_types
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.padding import pad_axes, pad_kernel, padded_size
from sam2jq.quant.qtensor import QTensor, dequantize, join_bits, quantize, split_bits
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, each_layer, map_base_weight, pair_specs

Array = jax.Array
SPANS = ("AbsMax", "RMS", "RootMeanSquare")  # RootMeanSquare is deepcompressor's name for RMS
# The pairs that a search tries, by alpha (over 0, 0, -1, -2, -3) and, in this order, beta. A: alpha alone, B: beta
# alone, E: alpha = beta, M: alpha + beta = 1, S: all pairs. deepcompressor gives alpha and beta the same meaning.
FAMILIES = {
    1: ("E", "A", "M", "AM", "AS"),
    0: ("B", "AB", "BM", "ABM", "ABS"),
    -1: ("M", "AM", "M", "AM", "AS"),
    -2: ("BM", "ABM", "BM", "ABM", "ABS"),
    -3: ("BS", "BAS", "BAS", "BAS", "BAS"),
}


@dataclass(frozen=True)
class SmoothConfig:
    """How inputs are smoothed: the section `quant.smooth.proj`."""

    # Layer: one choice per layer; ChannelGroup: one per group of inputs that share a scale of the weight
    granularity: str = "Layer"
    # Manual: alpha and beta as given; GridSearch: the pair with the least output error, or no smoothing
    strategy: str = "Manual"
    # exponent of the activation span; negative: 1 - beta (Manual), or a family of pairs (GridSearch)
    alpha: float = 0.5
    # exponent of the weight span; negative: 1 - alpha (Manual), or a family of pairs (GridSearch)
    beta: float = -1
    # steps of alpha and beta that GridSearch tries between 0 and 1
    num_grids: int = 20
    # pairs [activation span, weight span], each AbsMax or RMS (also called RootMeanSquare); GridSearch tries all
    spans: tuple[tuple[str, str], ...] = (("AbsMax", "AbsMax"),)

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "spans", tuple(map(tuple, self.spans)))  # lists, as YAML has them
        one_of("granularity", self.granularity, ("Layer", "ChannelGroup"))
        one_of("strategy", self.strategy, ("Manual", "GridSearch"))
        if not self.spans or any(len(pair) != 2 for pair in self.spans):
            raise ConfigError(f"spans {self.spans}: allowed are pairs of {', '.join(SPANS)}")
        for span in {name for pair in self.spans for name in pair}:
            one_of("spans", span, SPANS)
        if self.strategy == "Manual":
            self._check_manual()
        elif self.num_grids < 2:
            raise ConfigError(f"num_grids must be at least 2, got {self.num_grids}")
        elif not all(0 <= x <= 1 or x in FAMILIES for x in (self.alpha, self.beta)):
            raise ConfigError(f"alpha {self.alpha}, beta {self.beta}: allowed are 0 to 1, -1, -2, -3")

    def _check_manual(self):
        if len(self.spans) > 1:
            raise ConfigError(f"spans: Manual takes one pair, got {self.spans}; GridSearch takes several")
        if not all(0 <= x <= 1 for x in self.pairs[0]):
            raise ConfigError(f"alpha {self.alpha}, beta {self.beta}: Manual allows 0 to 1, and one of them negative")

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """alpha and beta of all candidates; the first one of a search is (0, 0), no smoothing."""
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


@weight_leaf()
class Smoothed:
    """A smoothed kernel: x @ w == (x / scale) @ inner; scale: float32 [K]."""

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
    inner_stats = None if stats is None else stats.scaled(1 / np.asarray(w.scale))
    return Smoothed(map_base_weight(w.inner, inner_stats, fn), w.scale)


def smooth(
    weights: QuantSpec | Mapping[str, QuantSpec | None] | None = None,
    inputs: QuantSpec | Mapping[str, QuantSpec] | None = None,
    config: SmoothConfig = SmoothConfig(),
    *,
    match: str = ".*",
) -> Transform:
    """A Transform that smooths the kernels of Dense layers with `smooth_kernel`.

    weights, inputs: how these will be rounded, which a search needs; one spec or {layer: spec}, None for not at all.
    With {layer: spec} as `weights` exactly these layers are smoothed, else those whose name matches `match`.
    """
    fn = lambda w, stats, specs: smooth_kernel(w, stats, *specs, config)
    description = f"{config.strategy}, alpha {config.alpha}, beta {config.beta}"
    needs = {"gram", "tokens"}
    return each_layer(fn, pair_specs(weights, inputs), needs, match=match, dense_only=True, description=description)


def smooth_kernel(
    w: Array,
    stats: Stats,
    weights: QuantSpec | None = None,
    inputs: QuantSpec | None = None,
    config: SmoothConfig = SmoothConfig(),
) -> Smoothed:
    """`w` [K, N] smoothed. A search needs stats.tokens; its output error is never above that without smoothing.

    weights, inputs: how these will be rounded, None for not at all. Raises UserError if `w` is not the kernel of a
    Dense, is rounded already or is not finite, and for a search with nothing to round.
    """
    if isinstance(w, QTensor) or w.ndim != 2:
        got = "a rounded weight" if isinstance(w, QTensor) else f"shape {w.shape}"
        raise UserError(f"smoothing takes the kernel [inputs, outputs] of a Dense before it is rounded, got {got}")
    if config.strategy == "GridSearch" and weights is None and inputs is None:
        raise UserError("GridSearch compares rounding errors, but neither weights nor inputs are rounded")
    if config.strategy == "GridSearch" and stats.tokens is None:
        raise UserError("a search for the best smoothing needs tokens: collect them, or set strategy Manual")
    for name, array in {"weight": w, "inputs' range": stats.high - stats.low, "sampled inputs": stats.tokens}.items():
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    w = np.asarray(w, np.float32)
    scales = candidates(w, stats, config)
    scale = scales[0]
    if config.strategy == "GridSearch":
        rows = padded_size(len(w)) - len(w)  # zeros, which any scale but 0 keeps
        padded = np.pad(scales, ((0, 0), (0, rows)), constant_values=1)
        specs, bits = zip(*((None, None) if spec is None else split_bits(spec) for spec in (weights, inputs)))
        tokens = pad_axes(stats.tokens, 1)
        found = search_scale(pad_kernel(w, len(w)), tokens, padded, specs, bits, config.granularity)
        scale = np.asarray(found)[: len(w)]
    return Smoothed(jax.device_put(w * scale[:, None]), jax.device_put(scale))


def candidates(w: np.ndarray, stats: Stats, config: SmoothConfig) -> np.ndarray:
    """float32 [C, K]: the scales of every pair in config.spans and config.pairs, with 1 in place of 0.

    A candidate that is not finite becomes all 1.
    """
    alpha, beta = np.array(config.pairs, np.float32).T[..., None]  # [pairs, 1] each
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = [input_span(stats, a) ** alpha / weight_span(w, b) ** beta for a, b in config.spans]
    scales = np.concatenate(scales)
    usable = np.isfinite(scales).all(1, keepdims=True)
    return np.where(usable & (scales != 0), scales, np.float32(1))


@partial(jax.jit, static_argnames=("specs", "granularity"))
def search_scale(w: Array, x: Array, scales: Array, specs: tuple, bits: tuple, granularity: str) -> Array:
    """[K']: the row of `scales` [C, K'] with the least output error; with ChannelGroup, one row for each group.

    w: [K', N'], x: tokens [T, K'], padded. specs, bits: from `split_bits`, of weights and inputs, None where these are
    not rounded.
    """
    weights, inputs = (None if spec is None else join_bits(spec, b) for spec, b in zip(specs, bits))
    group_errors = partial(errors, w, x, weights=weights, inputs=inputs)
    scale = best(scales, group_errors(scales, size=len(w)), len(w))
    size = None if weights is None else weights.group_size
    if granularity == "ChannelGroup" and size is not None:
        mixed = best(scales, group_errors(scales, size=size), size)
        both = jnp.stack([scale, mixed])  # errors that are least group by group may still add up
        scale = best(both, group_errors(both, size=len(w)), len(w))
    return scale


def recover_alpha_beta(w: Array, stats: Stats, config: SmoothConfig, scale: Array) -> tuple[float, float] | None:
    """The alpha and beta that give `scale` [K] for `w`; None if groups of inputs have different ones."""
    known = candidates(np.asarray(w), stats, config)
    off = np.abs(known / np.asarray(scale) - 1).max(1)
    at = int(np.nanargmin(off))
    return config.pairs[at % len(config.pairs)] if off[at] < 1e-3 else None


def input_span(stats: Stats, name: str) -> np.ndarray:
    """[K]: the span of each input channel, its largest magnitude or its root mean square."""
    if name == "AbsMax":
        return np.maximum(-np.asarray(stats.low), stats.high)
    if stats.gram is None and stats.tokens is None:
        raise UserError(f"the span {name} of inputs needs gram or tokens: calibrate for them, or use AbsMax")
    return np.sqrt((np.asarray(stats.tokens) ** 2).mean(0) if stats.gram is None else np.diag(stats.gram))


def weight_span(w: np.ndarray, name: str) -> np.ndarray:
    """[K]: the span of each input's weights, their largest magnitude or their root mean square."""
    return np.abs(w).max(1) if name == "AbsMax" else np.sqrt((w**2).mean(1))


def errors(
    w: Array, x: Array, scales: Array, *, weights: QuantSpec | None, inputs: QuantSpec | None, size: int
) -> Array:
    """[C, G]: the squared error, summed over tokens x [T, K] and outputs, of each group's share of the outputs.

    Each of `scales` [C, K] smooths, then weights and inputs are rounded; a group is `size` consecutive inputs.
    """
    grouped = lambda a: jnp.pad(a, ((0, 0), (0, -a.shape[1] % size))).reshape(len(a), -1, size)
    outputs = lambda x, w: einsum("tgs,ngs->gtn", grouped(x), grouped(w.T))
    expected = outputs(x, w)

    def error(scale: Array) -> Array:
        small, large = x / scale, w * scale[:, None]
        small = small if inputs is None else fake_quantize(small, inputs)
        large = large if weights is None else dequantize(quantize(large, weights))
        return ((outputs(small, large) - expected) ** 2).sum((1, 2))

    return lax.map(error, scales)


def best(scales: Array, errors: Array, size: int) -> Array:
    """[K]: for each group of `size` inputs the candidate of `scales` [C, K] with the least of `errors` [C, G]."""
    chosen = jnp.argmin(errors, 0).repeat(size)[: scales.shape[1]]
    return scales[chosen, jnp.arange(scales.shape[1])]

"""A low-rank branch in full precision beside a rounded weight (SVDQuant, arXiv 2411.05007).

Letters: K inputs, N outputs, r rank, T sampled tokens x [T, K]; w [K, N] the weight, L = down @ up the branch, Q(.)
rounding to nearest, x' the inputs as they will be rounded. The aim is a small |x' Q(w - L) + x L - x w|^2.

Where L changes by less than a step of the grid, Q(w - L) stays as it is, and L can compensate its error. So each round
sets L to the best rank-r approximation of w - Q(w - L), with the L of the round before on the right. "Best" is measured
in the outputs, with H = C C^T for the Gram matrix of x: |C^T (w - Q - L)|^2 is least for L = C^-T svd_r(C^T (w - Q)),
since C^T L runs through all matrices of rank r if L does (Eckart and Young). H is the Gram matrix plus two terms:
 - NOISE times the covariance of x' - x, which multiplies w - L: later rounds compensate the rounding of weights, but
   not that of inputs;
 - DAMPING times the mean of the diagonal. It makes H regular and keeps L small where inputs are weak: a large L there
   gains nothing and changes all codes of Q. As the term is the same for all inputs, the L of this H still has an output
   error no larger than the L of least |w - Q - L|^2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from sam2jq.errors import ConfigError, UserError, one_of
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.error import output_error
from sam2jq.quant.field_types import check_types
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, each_layer, map_base_weight, pair_specs

Array = jax.Array
NOISE, DAMPING = 10.0, 0.5  # tried: 1..30 and 0.003..1, on trained layers at W4A4 and W4A8; nearby values do as well


@dataclass(frozen=True)
class LowRankConfig:
    """How low-rank branches are fitted: the section `quant.wgts.low_rank`."""

    rank: int = 32  # rank of the branch
    exclusive: bool = False  # separate branches for q, k and v; only false: SAM 2 has them in one layer
    compensate: bool = False  # start from the error of rounding to nearest instead of from the weight
    num_iters: int = 1  # rounds of fitting and rounding; the best one is kept
    early_stop: bool = False  # stop at the first round that is worse than the one before
    objective: str = "output"  # what a branch approximates best: "output" or "weight"

    def __post_init__(self):
        check_types(self)
        if self.exclusive:
            raise ConfigError("exclusive: only false is supported: SAM 2's q, k and v are one layer with one branch")
        if self.rank < 1 or self.num_iters < 1:
            raise ConfigError(f"rank and num_iters must be at least 1, got {self.rank} and {self.num_iters}")
        one_of("objective", self.objective, ("output", "weight"))


@weight_leaf()
class LowRank:
    """A kernel with a branch: y = x @ inner + (x @ down) @ up; down: [*reduce, r], up: [r, N].

    The branch reads the unrounded x; a leaf that rounds x stands inside `inner`.
    """

    inner: object
    down: Array
    up: Array


@materialize.register
def _(w: LowRank) -> Array:
    return materialize(w.inner) + jnp.matmul(w.down, w.up, precision="highest")


@apply_kernel.register
def _(w: LowRank, x: Array, product) -> Array:
    return apply_kernel(w.inner, x, product) + product(w.down.astype(x.dtype), x) @ w.up.astype(x.dtype)


@map_base_weight.register
def _(w: LowRank, stats, fn):
    return LowRank(map_base_weight(w.inner, stats, fn), w.down, w.up)


class Branch(NamedTuple):
    """A branch down [K, r], up [r, N], and the mean squared error of the outputs with it, summed over outputs, []."""

    error: Array
    down: Array
    up: Array


def low_rank(
    weights: QuantSpec | Mapping[str, QuantSpec],
    inputs: QuantSpec | Mapping[str, QuantSpec] | None = None,
    config: LowRankConfig = LowRankConfig(),
    *,
    match: str = ".*",
) -> Transform:
    """A Transform that splits low-rank branches off kernels with `low_rank_kernel`.

    weights, inputs: how the rest of the weight and its input will be rounded; one spec or {layer: spec}; see
    `each_layer` for `match`.
    """
    fn = lambda w, stats, specs: low_rank_kernel(w, stats, *specs, config)
    description = f"rank {config.rank}, {config.num_iters} rounds"
    return each_layer(fn, pair_specs(weights, inputs), {"gram", "tokens"}, match=match, description=description)


def low_rank_kernel(
    w: Array,
    stats: Stats,
    weights: QuantSpec,
    inputs: QuantSpec | None = None,
    config: LowRankConfig = LowRankConfig(),
) -> LowRank:
    """`w` [*reduce, N] as a branch and the rest, which is an array that is still to be rounded.

    weights, inputs: how the rest and its input will be rounded; inputs None: not at all. stats needs tokens, or gram if
    inputs are not rounded. After rounding to nearest the output error is never above that without a branch, since the
    branch may be 0. Raises UserError for a rank above the kernel's size, a rounded weight, or numbers that are
    not finite.
    """
    if isinstance(w, QTensor):
        raise UserError("a low-rank branch is split off a weight before it is rounded, got a rounded one")
    shape, flat = w.shape, w.reshape(-1, w.shape[-1])
    if config.rank > min(flat.shape):
        raise UserError(
            f"rank {config.rank} of a branch is over what {flat.shape[0]} inputs and {flat.shape[1]} outputs allow: "
            f"set it to {min(flat.shape)} or less, or skip the layer"
        )
    if stats.tokens is None and (stats.gram is None or inputs is not None):
        raise UserError("a low-rank branch is fitted to outputs: collect tokens in calibration")
    for name, array in {"weight": w, "Gram matrix": stats.gram, "sampled inputs": stats.tokens}.items():
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    with jax.default_matmul_precision("highest"):  # accelerators would use fewer bits for float32
        inner, branch, errors = fit(flat, stats.gram, stats.tokens, weights, inputs, config)
    if not np.isfinite(errors).all():
        raise UserError("the Gram matrix is not that of any inputs: it is not positive semidefinite")
    return LowRank(inner.reshape(shape), branch.down.reshape(*shape[:-1], -1), branch.up)


@partial(jax.jit, static_argnames=("weights", "inputs", "config"))
def fit(
    w: Array,
    gram: Array | None,
    x: Array | None,
    weights: QuantSpec,
    inputs: QuantSpec | None,
    config: LowRankConfig,
) -> tuple[Array, Branch, Array]:
    """w - L [K, N], the best branch, and the errors [1 + num_iters] without a branch and after each round.

    Without config.compensate, the branch that compensates the error of rounding to nearest is tried too: where inputs
    are rounded finely, one round from there often gains more than several rounds from w.
    """
    w = w.astype(jnp.float32)
    rounded_x = x if inputs is None else fake_quantize(x, inputs)
    if config.objective == "weight":
        metric = jnp.eye(len(w))  # products with it are redundant; this objective is for comparisons only
    else:
        metric = regularized_hessian(
            x.T @ x / len(x) if gram is None else gram, None if inputs is None else rounded_x - x
        )
    error = error_function(w, gram if inputs is None else None, x, rounded_x)
    find = best_low_rank(w.shape, metric, config.rank)

    def attempt(down: Array, up: Array) -> tuple[Branch, Array]:
        """The branch with its error, and w - Q(w - L)."""
        rounded = dequantize(quantize(w - down @ up, weights))
        return Branch(error(rounded, down, up), down, up), w - rounded

    def one_round(state: tuple) -> tuple:
        i, target, best, errors = state
        branch, target = attempt(*find(target))
        return i + 1, target, better(best, branch), errors.at[i + 1].set(branch.error)

    def goes_on(state: tuple) -> Array:
        i, _, _, errors = state
        stopped = config.early_stop & (i > 1) & (errors[i] > errors[i - 1])
        return (i < config.num_iters) & ~stopped

    none, rest = attempt(jnp.zeros((len(w), config.rank)), jnp.zeros((config.rank, w.shape[1])))
    errors = jnp.full(1 + config.num_iters, none.error)
    target, best = (rest, none) if config.compensate else (w, better(none, attempt(*find(rest))[0]))
    _, _, best, errors = lax.while_loop(goes_on, one_round, (0, target, best, errors))
    return w - best.down @ best.up, best, errors


def better(a: Branch, b: Branch) -> Branch:
    """The branch with less error; `a` if they are equal."""
    return jax.tree.map(partial(jnp.where, b.error < a.error), b, a)


def error_function(w: Array, gram: Array | None, x: Array | None, rounded_x: Array | None) -> Callable[..., Array]:
    """error(q, down, up): the mean square, summed over outputs, of rounded_x @ q + (x @ down) @ up - x @ w.

    With `gram`, it is computed from that instead of from x and rounded_x, which are then equal.
    """
    if gram is not None:
        return lambda q, down, up: output_error(q + down @ up - w, gram).sum()
    expected = x @ w
    return lambda q, down, up: ((rounded_x @ q + (x @ down) @ up - expected) ** 2).sum() / len(x)


def regularized_hessian(gram: Array, noise: Array | None) -> Array:
    """H [K, K] of the module's docstring; noise [T, K]: the rounding errors of the inputs, None if there are none."""
    mean = jnp.diag(gram).mean()
    damped = gram + DAMPING * jnp.where(mean > 0, mean, 1) * jnp.eye(len(gram))
    return damped if noise is None else damped + NOISE / len(noise) * (noise.T @ noise)


def best_low_rank(shape: tuple[int, int], metric: Array, rank: int) -> Callable[[Array], tuple]:
    """find(target [K, N]) -> down [K, r], up [r, N]: the L of least |C^T (target - L)| for `metric` H = C C^T.

    Columns of down and rows of up have equal lengths, and both are rounded to bfloat16, which the rest compensates.

    With b = C^T target = U S V^T, L = C^-T U_r U_r^T b = target V_r V_r^T. U and V are the eigenvectors of b b^T [K, K]
    and b^T b [N, N]; those of the smaller matrix cost several times less than the SVD of b.
    """
    inputs, outputs = shape
    root = jnp.linalg.cholesky(metric) if inputs < outputs else None

    def find(target: Array) -> tuple[Array, Array]:
        if root is None:
            v = jnp.linalg.eigh(target.T @ metric @ target)[1][:, -rank:]
            return balance_factors(target @ v, v.T)
        u = jnp.linalg.eigh(root.T @ (target @ target.T) @ root)[1][:, -rank:]  # b b^T without b takes half the work
        return balance_factors(solve_triangular(root, u, trans="T", lower=True), (root @ u).T @ target)

    return find


def balance_factors(down: Array, up: Array) -> tuple[Array, Array]:
    """down and up with the same product in bfloat16, each column of `down` as long as its row of `up`."""
    lengths = jnp.linalg.norm(down, axis=0), jnp.linalg.norm(up, axis=1)
    down_factor, up_factor = (jnp.sqrt(lengths[0] * lengths[1]) / jnp.where(n > 0, n, 1) for n in lengths)
    half = partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return half(down * down_factor), half(up * up_factor[:, None])

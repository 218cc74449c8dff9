"""A branch of low rank and full precision beside a rounded weight (SVDQuant, arXiv 2411.05007).

Letters: K inputs, N outputs, r rank, T sampled tokens x [T, K]; w [K, N] the weight, L = down @ up the branch, Q(.)
rounding to nearest, x' the inputs as they will be rounded. What is wanted is small |x' Q(w - L) + x L - x w|^2.

Where L moves by less than a step of the grid, Q(w - L) stays as it is and L makes up for its error; so each round
brings L to the r-rank best of w - Q(w - L), where L was that of the round before. "Best" is measured in the outputs,
with H = C C^T for the Gram matrix of x: |C^T (w - Q - L)|^2 is least for L = C^-T svd_r(C^T (w - Q)), since C^T L runs
through all matrices of rank r if L does (Eckart and Young). H is the Gram matrix and two terms more:
 - the covariance of x' - x, which w - L is multiplied with: the later rounds make up for the weights' rounding but not
   for that of the inputs, so it counts NOISE times;
 - DAMPING times the mean of the diagonal. It makes H regular, and it keeps L small where inputs are weak: a large L
   there gains nothing and sends all codes of Q elsewhere. As it adds the same for all inputs, the L of this H is still
   no further off in the outputs than the one of least |w - Q - L|^2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.error import output_error
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats, map_base_weight

Array = jax.Array
NOISE, DAMPING = 10.0, 0.5  # of 1..30 and 0.003..1 tried on trained layers at W4A4 and W4A8; neighbours do as well


@weight_leaf()
class LowRank:
    """y = x @ inner + (x @ down) @ up; down: [*reduce, r], up: [r, N].

    The branch reads x as it comes: what rounds it stands inside `inner`.
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


@dataclass(frozen=True, kw_only=True)
class LowRankSpec:
    """num_iters: rounds of branch and rounding, of which the best is kept; early_stop: none after the first that is
    worse than the one before; objective: whether rounds bring L near in the "output" or in the "weight"; compensate:
    the first round starts from the error of plain rounding, not from w. weights, inputs: how the rest of the weight and
    what it reads will be rounded; inputs: None if they will not.
    """

    rank: int = 32
    num_iters: int = 1
    early_stop: bool = False
    objective: str = "output"
    compensate: bool = False
    weights: QuantSpec
    inputs: QuantSpec | None = None

    def __post_init__(self):
        if self.rank < 1 or self.num_iters < 1:
            raise UserError(f"rank and num_iters must be at least 1, got {self.rank} and {self.num_iters}")
        if self.objective not in ("output", "weight"):
            raise UserError(f"objective {self.objective!r}; allowed: output, weight")


class Branch(NamedTuple):
    """down [K, r], up [r, N]; error: the mean square of what it leaves of the outputs' error, summed over outputs."""

    error: Array
    down: Array
    up: Array


def low_rank(w: Array, stats: Stats, spec: LowRankSpec) -> LowRank:
    """`w` [*reduce, N] as a branch and the rest, an array that is left to round; stats need tokens, or gram if inputs
    stay as they are. After plain rounding the outputs are no further off than without the branch, which is 0 at worst.

    ValueError: a rank too high, a weight rounded already, or numbers that are not finite.
    """
    if isinstance(w, QTensor):
        raise UserError("a branch of low rank is split off a weight before it is rounded, got a rounded one")
    shape, flat = w.shape, w.reshape(-1, w.shape[-1])
    if spec.rank > min(flat.shape):
        raise UserError(f"rank {spec.rank} of a branch is over what {flat.shape[0]} inputs and {flat.shape[1]} outputs"
                         f" allow: set it to {min(flat.shape)} or less, or skip the layer")  # fmt: skip
    if stats.tokens is None and (stats.gram is None or spec.inputs is not None):
        raise UserError("a branch of low rank is judged by its outputs: calibrate for tokens")
    for name, array in {"weight": w, "Gram matrix": stats.gram, "sampled inputs": stats.tokens}.items():
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    with jax.default_matmul_precision("highest"):  # accelerators multiply f32 in fewer bits if they may
        inner, branch, errors = fit(flat, stats.gram, stats.tokens, spec)
    if not np.isfinite(errors).all():
        raise UserError("the Gram matrix is not that of any inputs: it is not positive semidefinite")
    return LowRank(inner.reshape(shape), branch.down.reshape(*shape[:-1], -1), branch.up)


@partial(jax.jit, static_argnames="spec")
def fit(w: Array, gram: Array | None, x: Array | None, spec: LowRankSpec) -> tuple[Array, Branch, Array]:
    """w - L [K, N], the best branch, and the errors [1 + num_iters] of no branch and of each round that took place.

    Without `compensate`, the branch that makes up for the error of plain rounding is tried besides: where inputs are
    rounded finely one round from there often gains more than the first of many from w.
    """
    w = w.astype(jnp.float32)
    read = x if spec.inputs is None else fake_quantize(x, spec.inputs)
    if spec.objective == "weight":
        metric = jnp.eye(len(w))  # whose products are wasted, for an objective that is there to compare with
    else:
        metric = regularized_hessian(
            x.T @ x / len(x) if gram is None else gram, None if spec.inputs is None else read - x
        )
    error = measure(w, gram if spec.inputs is None else None, x, read)
    find = best_low_rank(w.shape, metric, spec.rank)

    def attempt(down: Array, up: Array) -> tuple[Branch, Array]:
        """The branch with its error, and w - Q(w - L)."""
        rounded = dequantize(quantize(w - down @ up, spec.weights))
        return Branch(error(rounded, down, up), down, up), w - rounded

    def one_round(state: tuple) -> tuple:
        i, target, best, errors = state
        branch, target = attempt(*find(target))
        return i + 1, target, better(best, branch), errors.at[i + 1].set(branch.error)

    def goes_on(state: tuple) -> Array:
        i, _, _, errors = state
        stopped = spec.early_stop & (i > 1) & (errors[i] > errors[i - 1])
        return (i < spec.num_iters) & ~stopped

    none, rest = attempt(jnp.zeros((len(w), spec.rank)), jnp.zeros((spec.rank, w.shape[1])))
    errors = jnp.full(1 + spec.num_iters, none.error)
    target, best = (rest, none) if spec.compensate else (w, better(none, attempt(*find(rest))[0]))
    _, _, best, errors = lax.while_loop(goes_on, one_round, (0, target, best, errors))
    return w - best.down @ best.up, best, errors


def better(a: Branch, b: Branch) -> Branch:
    """The one with less error; `a` if both have the same."""
    return jax.tree.map(partial(jnp.where, b.error < a.error), b, a)


def measure(w: Array, gram: Array | None, x: Array | None, read: Array | None) -> Callable[..., Array]:
    """error(q, down, up): the mean square, summed over outputs, of read @ q + (x @ down) @ up - x @ w; by `gram`, where
    it is given, instead of x and `read`, which are then the same.
    """
    if gram is not None:
        return lambda q, down, up: output_error(q + down @ up - w, gram).sum()
    expected = x @ w
    return lambda q, down, up: ((read @ q + (x @ down) @ up - expected) ** 2).sum() / len(x)


def regularized_hessian(gram: Array, noise: Array | None) -> Array:
    """H [K, K]; noise [T, K]: what rounding adds to the inputs."""
    mean = jnp.diag(gram).mean()
    damped = gram + DAMPING * jnp.where(mean > 0, mean, 1) * jnp.eye(len(gram))
    return damped if noise is None else damped + NOISE / len(noise) * (noise.T @ noise)


def best_low_rank(shape: tuple[int, int], metric: Array, rank: int) -> Callable[[Array], tuple]:
    """find(target [K, N]): down [K, r] and up [r, N], columns and rows of equal length: the L with the least
    |C^T (target - L)|, `metric` H = C C^T, in bfloat16, which what is left to round makes up for.

    With b = C^T target = U S V^T it is C^-T U_r U_r^T b, which is target V_r V_r^T. U and V are the eigenvectors of
    b b^T [K, K] and b^T b [N, N]; those of the smaller are several times cheaper than all of b's decomposition.
    """
    inputs, outputs = shape
    root = jnp.linalg.cholesky(metric) if inputs < outputs else None

    def find(target: Array) -> tuple[Array, Array]:
        if root is None:
            v = jnp.linalg.eigh(target.T @ metric @ target)[1][:, -rank:]
            return balance_factors(target @ v, v.T)
        u = jnp.linalg.eigh(root.T @ (target @ target.T) @ root)[1][:, -rank:]  # b b^T without b: half the work
        return balance_factors(solve_triangular(root, u, trans="T", lower=True), (root @ u).T @ target)

    return find


def balance_factors(down: Array, up: Array) -> tuple[Array, Array]:
    """The same L = down @ up in bfloat16, each column of `down` as long as its row of `up`."""
    lengths = jnp.linalg.norm(down, axis=0), jnp.linalg.norm(up, axis=1)
    down_to, up_to = (jnp.sqrt(lengths[0] * lengths[1]) / jnp.where(one > 0, one, 1) for one in lengths)
    half = partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return half(down * down_to), half(up * up_to[:, None])

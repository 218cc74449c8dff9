"""GPTQ: one input is rounded after the other, and each makes up for the errors of those before it (arXiv 2210.17323).

Letters: K inputs, N outputs, G groups, B inputs in a block; w [K, N] the weight, w_hat what it is rounded to,
e = w - w_hat; h [K, K] the Gram matrix of the inputs. The outputs' square error is tr(e^T h e): make it small.

First pass. With the factors h = u diag(d) u^T, u unit upper triangular, that error is the sum over k of
d_k (e_k + sum_{j<k} u_jk e_j)^2. Once the inputs before k are rounded, the k-th term is least when
w_k + sum_{j<k} u_jk e_j is rounded in place of w_k. The paper computes the same numbers from the inverse of h
(why they are the same: arXiv 2307.13304, theorem 6).

Sweeps. The first pass never looks back, so others follow that give each input its best code while all others keep
theirs: w_k + sum_{j!=k} h_jk e_j / h_kk, rounded. No such step raises the error, nor does it need damping.

Last, an output that still errs more than after plain rounding, as happens with 2 bits, takes the codes of the latter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.errors import UserError
from sam2jq.quant.error import output_error
from sam2jq.quant.qtensor import (
    QTensor,
    by_group,
    compute_scale_zero_point,
    fit_scale_zero_point,
    round_to_grid,
    storage_dtype,
)
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats

Array = jax.Array
RATIOS = tuple(1 - i / 100 for i in range(61))  # of a group's range; with 2 bits the best go down to about half
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # accelerators multiply f32 in fewer bits if they may


@dataclass(frozen=True)
class GptqSpec:
    """damp_percentage: of the Gram matrix' mean diagonal, added to it; block_size: inputs that are rounded before the
    rest is corrected; num_inv_tries: factorizations with growing damping before giving up; sweeps: passes of
    coordinate descent; search_range: groups may clip a few weights where that makes the others more exact.
    """

    weights: QuantSpec
    damp_percentage: float = 0.01
    block_size: int = 128
    num_inv_tries: int = 200
    sweeps: int = 2
    search_range: bool = False

    def __post_init__(self):
        if not self.damp_percentage > 0:
            raise UserError(f"damp_percentage must be over 0, got {self.damp_percentage}")
        for name, least in {"block_size": 1, "num_inv_tries": 1, "sweeps": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")


def gptq(w: Array, stats: Stats, spec: GptqSpec) -> QTensor:
    """`w` [*reduce, out] rounded so that outputs change little for inputs like those in `stats`, which needs gram.

    Grids are those of plain rounding, but for `search_range`. Inputs that were always 0 are rounded plainly: a
    ReLU that was silent then may wake up.
    ValueError: numbers that are not finite, or a Gram matrix that no damping makes positive definite.
    """
    for name, array in {"weight": w, "Gram matrix": stats.gram}.items():
        if not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    if not np.diagonal(stats.gram).any():
        raise UserError("inputs were 0 throughout calibration: skip the layer, or calibrate on other images")
    order, h, u, d = ldl_factor(stats.gram, spec.damp_percentage, spec.num_inv_tries)
    if not np.isfinite(d).all():
        raise UserError(
            f"the Gram matrix is not positive definite after {spec.num_inv_tries} tries: "
            f"raise damp_percentage, now {spec.damp_percentage}, or num_inv_tries"
        )
    return gptq_round(w, order, h, u, d, spec)


@jax.jit
def ldl_factor(gram: Array, damp_percentage: float, tries: int) -> tuple[Array, Array, Array, Array]:
    """order [K], strongest inputs first, h in that order, and the factors u and d [K] of h + damping; NaN if all fail.

    The weakest come last since errors are made up for by what comes later, and the last ones' by nothing.
    """
    order = jnp.argsort(jnp.diag(gram), descending=True, stable=True)
    h = gram[order][:, order]
    damping = damp_percentage * jnp.diag(h).mean()

    def attempt(state):
        count, _ = state
        damped = h + damping * (1 + 0.1 * count) * jnp.eye(len(h))
        return count + 1, lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)

    failed = lambda state: (state[0] < tries) & jnp.isnan(state[1]).any()
    _, lower = lax.while_loop(failed, attempt, (0, jnp.full_like(h, jnp.nan)))
    upper = lower[::-1, ::-1]  # h = upper upper^T: turned round, a lower factor is an upper one
    return order, h, upper / jnp.diag(upper), jnp.diag(upper) ** 2


@partial(jax.jit, static_argnames="spec")
def gptq_round(w: Array, order: Array, h: Array, u: Array, d: Array, spec: GptqSpec) -> QTensor:
    """`w` [*reduce, out] rounded in `order`: the first pass and the sweeps differ in what pulls at an input."""
    grid, inputs, back = spec.weights, len(order), jnp.argsort(order)
    power = jnp.diag(h)  # 0 for dead inputs
    flat = w.astype(jnp.float32).reshape(inputs, -1)
    scale, zero_point = (
        search_grid(flat, d[back], grid) if spec.search_range else fit_scale_zero_point(by_group(flat, grid), grid)
    )
    scale, zero_point = scale[:, 0], zero_point[:, 0]  # [G, N]
    inverse = 1 / scale  # XLA makes the same of the division in `quantize`, so ties fall to the same side

    size = min(spec.block_size, inputs)
    fill = lambda x, axes: jnp.pad(x, [(0, -inputs % size)] * axes + [(0, 0)] * (x.ndim - axes))  # the last block
    rows, group = fill(flat[order], 1), fill(order // (grid.group_size or inputs), 1)

    def at_input(x: Array, k: Array) -> tuple[Array, Array]:
        """The codes of x [N] on the grids of input k, and what they stand for."""
        zeros = zero_point[group[k]]
        codes = round_to_grid(x * inverse[group[k]], 1, zeros, grid)
        return codes, (codes - zeros) * scale[group[k]]

    def one_pass(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        pull = jnp.where(i == 0, u, h / jnp.where(power > 0, power, 1)) * (1 - jnp.eye(inputs))
        return sweep(rows, state[0], fill(pull, 2), at_input, size)

    e, codes = lax.fori_loop(0, 1 + spec.sweeps, one_pass, (jnp.zeros_like(rows), jnp.zeros_like(rows)))
    plain, w_hat = at_input(rows, jnp.arange(len(rows)))
    lost = lambda e: output_error(e[:inputs], h)
    codes = jnp.where(lost(e) <= lost(rows - w_hat), codes, plain)
    qvalue = codes[back].reshape(w.shape).astype(storage_dtype(grid))
    return QTensor(qvalue, scale, None if grid.symmetric else zero_point, grid)


def sweep(w: Array, e: Array, pull: Array, round_to_grid: Callable, size: int) -> tuple[Array, Array]:
    """e and the codes [K, N] after each input k in turn was rounded at w_k + sum_j pull_jk e_j.

    What the errors of all other blocks add to a block of `size` inputs is one product, done when its turn comes.
    """

    def block(e: Array, first: Array) -> tuple[Array, Array]:
        cut = lambda x, axis=0: lax.dynamic_slice_in_dim(x, first, size, axis)
        put = lambda x: lax.dynamic_update_slice_in_dim(e, x, first, 0)
        columns = cut(pull, 1)  # [K, B]
        goal = cut(w) + matmul(columns.T, put(jnp.zeros_like(cut(e))))

        def row(mine: Array, case: tuple) -> tuple[Array, Array]:
            k, w_k, goal_k, pull_k = case
            codes, w_hat = round_to_grid(goal_k + matmul(pull_k, mine), first + k)
            return mine.at[k].set(w_k - w_hat), codes

        mine, codes = lax.scan(row, cut(e), (jnp.arange(size), cut(w), goal, cut(columns).T))
        return put(mine), codes

    e, codes = lax.scan(block, e, jnp.arange(0, len(w), size))
    return e, codes.reshape(w.shape)


def search_grid(w: Array, cost: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Scale and zero [G, 1, N] of the shrunken range of each group whose rounding has the least sum_k cost_k e_k^2.

    The cost is d [K]: what an error of input k still costs after the inputs that follow made up for it. The diagonal
    of h leaves that out, and finds worse grids than the unshrunken ones where inputs are alike in strength.
    """
    grouped, costs = by_group(w, spec), by_group(jnp.broadcast_to(cost[:, None], w.shape), spec)
    low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)

    def error(ratio: Array) -> Array:
        scale, zero_point = compute_scale_zero_point(ratio * low, ratio * high, spec)
        left = grouped - (round_to_grid(grouped, scale, zero_point, spec) - zero_point) * scale
        return (costs * jnp.square(left)).sum(axis=1, keepdims=True)

    ratios = jnp.array(RATIOS)
    best = ratios[jnp.argmin(lax.map(error, ratios), axis=0)]  # one ratio at a time: together they fill the memory
    return compute_scale_zero_point(best * low, best * high, spec)

"""GPTQ: inputs are rounded one after the other, and each compensates the errors of those before (arXiv 2210.17323).

Letters: K inputs, N outputs, G groups, B inputs in a block; K', N' and G' are the same with padding (padding.py);
w [K, N] the weight, w_hat the rounded weight, e = w - w_hat; h [K, K] the Gram matrix of the inputs. GPTQ makes the
squared error of the outputs, tr(e^T h e), small.

First pass. With the factors h = u diag(d) u^T, u unit upper triangular, that error is the sum over k of
d_k (e_k + sum_{j<k} u_jk e_j)^2. Once the inputs before k are rounded, the k-th term is least when
w_k + sum_{j<k} u_jk e_j is rounded in place of w_k. The paper computes the same numbers from the inverse of h
(arXiv 2307.13304, theorem 6, proves that they are equal).

Sweeps. The first pass never revises a code. Sweeps of coordinate descent follow: each input takes its best code while
all others keep theirs, which is w_k + sum_{j!=k} h_jk e_j / h_kk, rounded. No step raises the error or needs damping.

Finally, an output with a larger error than after rounding to nearest, as happens with 2 bits, takes the codes of that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.errors import ConfigError, UserError
from sam2jq.quant.error import output_error
from sam2jq.quant.exact import matmul
from sam2jq.quant.field_types import check_types
from sam2jq.quant.padding import pad_axes, pad_kernel, unpad_qtensor
from sam2jq.quant.qtensor import (
    QTensor,
    TracedSpec,
    by_group,
    compute_scale_zero_point,
    fit_scale_zero_point,
    join_bits,
    round_to_grid,
    split_bits,
    storage_dtype,
)
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, check_unrounded, each_layer

Array = jax.Array
RATIOS = tuple(1 - i / 100 for i in range(61))  # tried shares of a group's range; at 2 bits the best are about 0.5


@dataclass(frozen=True)
class GptqConfig:
    """How GPTQ runs: the section `quant.wgts.kernel_gptq`."""

    damp_percentage: float = 0.01  # damping, as a share of the mean diagonal of the Gram matrix
    block_size: int = 128  # inputs that are rounded before the other inputs are updated
    num_inv_tries: int = 200  # Cholesky factorizations, with growing damping, before giving up
    search_range: bool = False  # search a smaller range per group that clips the largest weights
    sweeps: int = 2  # passes of coordinate descent after the first pass

    def __post_init__(self):
        check_types(self)
        if not self.damp_percentage > 0:
            raise ConfigError(f"damp_percentage must be over 0, got {self.damp_percentage}")
        for name, least in {"block_size": 1, "num_inv_tries": 1, "sweeps": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


def gptq(
    weights: QuantSpec | Mapping[str, QuantSpec], config: GptqConfig = GptqConfig(), *, match: str = ".*"
) -> Transform:
    """A Transform that rounds kernels with GPTQ by `weights`, one spec or {layer: spec}; `match`: see `each_layer`."""
    fn = lambda w, stats, spec: gptq_kernel(w, stats, spec, config)
    return each_layer(fn, weights, {"gram"}, match=match, description="GPTQ")


def gptq_kernel(w: Array, stats: Stats, spec: QuantSpec, config: GptqConfig = GptqConfig()) -> QTensor:
    """`w` [*reduce, out] rounded with a small output error for inputs with the Gram matrix stats.gram.

    Scales and zero points are those of rounding to nearest, unless config.search_range. Inputs that were 0 throughout
    calibration are rounded to nearest, since they may be nonzero later (ReLU).

    Raises UserError if `w` is rounded already, if numbers are not finite, or if no damping makes the Gram matrix
    positive definite.
    """
    check_unrounded(w)
    for name, array in {"weight": w, "Gram matrix": stats.gram}.items():
        if not np.isfinite(array).all():
            raise UserError(f"the {name} holds NaN or infinity: look at the checkpoint and the calibration images")
    if not np.diagonal(stats.gram).any():
        raise UserError("all inputs were 0 in calibration: skip the layer, or calibrate on other images")
    inputs = len(stats.gram)
    factors = ldl_factor(pad_axes(stats.gram, 0, 1), inputs, config.damp_percentage, config.num_inv_tries)
    if not np.isfinite(factors[-1]).all():
        raise UserError(
            f"the Gram matrix is not positive definite after {config.num_inv_tries} tries: "
            f"raise damp_percentage, now {config.damp_percentage}, or num_inv_tries"
        )
    rounded = gptq_round(pad_kernel(w, inputs), *factors, *split_bits(spec), config)
    return unpad_qtensor(*rounded, w.shape, spec)


@jax.jit
def ldl_factor(gram: Array, inputs: int, damp_percentage: float, tries: int) -> tuple[Array, Array, Array, Array]:
    """order [K'] by falling diagonal, h [K', K'] in that order, and the factors u [K', K'], d [K'] of h + damping.

    gram: [K', K'], zero after the first `inputs` rows and columns. u and d are NaN if every try fails. The weakest
    inputs come last, since no later input can compensate their errors.
    """
    order = jnp.argsort(jnp.diag(gram), descending=True, stable=True)
    h = gram[order][:, order]
    damping = damp_percentage * jnp.trace(h) / inputs

    def attempt(state):
        count, _ = state
        damped = h + damping * (1 + 0.1 * count) * jnp.eye(len(h))
        return count + 1, lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)

    failed = lambda state: (state[0] < tries) & jnp.isnan(state[1]).any()
    _, lower = lax.while_loop(failed, attempt, (0, jnp.full_like(h, jnp.nan)))
    upper = lower[::-1, ::-1]  # h = upper upper^T, as both axes were reversed
    return order, h, upper / jnp.diag(upper), jnp.diag(upper) ** 2


@partial(jax.jit, static_argnames=("spec", "config"))
def gptq_round(
    w: Array, order: Array, h: Array, u: Array, d: Array, spec: QuantSpec, bits: Array, config: GptqConfig
) -> tuple[Array, Array, Array]:
    """Codes [K', N'], scale and zero point [G', N'] of `w` [K', N'], rounded in `order`.

    order, h, u, d: as `ldl_factor` returns them; spec, bits: from `split_bits`. The first pass and the sweeps differ
    only in the matrix `pull` by which other inputs' errors change an input.
    """
    inputs, back = len(order), jnp.argsort(order)
    power = jnp.diag(h)  # 0 for inputs that are always 0
    spec = join_bits(spec, bits)
    if config.search_range:
        scale, zero_point = search_grid(w, d[back], spec)
    else:
        scale, zero_point = fit_scale_zero_point(by_group(w, spec), spec)
    scale, zero_point = scale[:, 0], zero_point[:, 0]  # [G, N]
    inverse = 1 / scale  # the same reciprocal as in `round_to_grid`, so that ties round to the same side

    size = min(config.block_size, inputs)
    complete = lambda x, axes: jnp.pad(x, [(0, -inputs % size)] * axes + [(0, 0)] * (x.ndim - axes))  # the last block
    rows, group = complete(w[order], 1), complete(order // (spec.group_size or inputs), 1)

    def at_input(x: Array, k: Array) -> tuple[Array, Array]:
        """The codes of x [N] on the grids of input k, and the dequantized numbers."""
        zeros = zero_point[group[k]]
        codes = round_to_grid(x * inverse[group[k]], 1, zeros, spec)
        return codes, (codes - zeros) * scale[group[k]]

    def one_pass(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        pull = jnp.where(i == 0, u, h / jnp.where(power > 0, power, 1)) * (1 - jnp.eye(inputs))
        return sweep(rows, state[0], complete(pull, 2), at_input, size)

    e, codes = lax.fori_loop(0, 1 + config.sweeps, one_pass, (jnp.zeros_like(rows), jnp.zeros_like(rows)))
    plain, w_hat = at_input(rows, jnp.arange(len(rows)))
    error = lambda e: output_error(e[:inputs], h)
    codes = jnp.where(error(e) <= error(rows - w_hat), codes, plain)
    return codes[back].astype(storage_dtype(spec)), scale, zero_point


def sweep(w: Array, e: Array, pull: Array, round_input: Callable, size: int) -> tuple[Array, Array]:
    """e and the codes, [K, N] each, after every input k in turn was rounded at w_k + sum_j pull_jk e_j.

    For each block of `size` inputs, the errors of all other blocks are added by one matrix product.
    """

    def block(e: Array, first: Array) -> tuple[Array, Array]:
        cut = lambda x, axis=0: lax.dynamic_slice_in_dim(x, first, size, axis)
        put = lambda x: lax.dynamic_update_slice_in_dim(e, x, first, 0)
        columns = cut(pull, 1)  # [K, B]
        goal = cut(w) + matmul(columns.T, put(jnp.zeros_like(cut(e))))

        def row(mine: Array, case: tuple) -> tuple[Array, Array]:
            k, w_k, goal_k, pull_k = case
            codes, w_hat = round_input(goal_k + matmul(pull_k, mine), first + k)
            return mine.at[k].set(w_k - w_hat), codes

        mine, codes = lax.scan(row, cut(e), (jnp.arange(size), cut(w), goal, cut(columns).T))
        return put(mine), codes

    e, codes = lax.scan(block, e, jnp.arange(0, len(w), size))
    return e, codes.reshape(w.shape)


def search_grid(w: Array, cost: Array, spec: QuantSpec | TracedSpec) -> tuple[Array, Array]:
    """The scale and zero point [G, 1, N] of the share of each group's range that has the least sum_k cost_k e_k^2.

    The cost is d [K]: the output error of an error in input k after the later inputs compensated it. The diagonal of h
    ignores the compensation, and finds worse grids than the full range where inputs have similar strength.
    """
    grouped, costs = by_group(w, spec), by_group(jnp.broadcast_to(cost[:, None], w.shape), spec)
    low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)

    def error(ratio: Array) -> Array:
        scale, zero_point = compute_scale_zero_point(ratio * low, ratio * high, spec)
        left = grouped - (round_to_grid(grouped, scale, zero_point, spec) - zero_point) * scale
        return (costs * jnp.square(left)).sum(axis=1, keepdims=True)

    ratios = jnp.array(RATIOS)
    best = ratios[jnp.argmin(lax.map(error, ratios), axis=0)]  # one ratio at a time, to save memory
    return compute_scale_zero_point(best * low, best * high, spec)

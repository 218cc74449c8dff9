from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.gptq import RATIOS, GptqConfig, gptq, gptq_kernel, search_grid
from sam2jq.quant.error import output_error
from sam2jq.quant.qtensor import QTensor, by_group, compute_scale_zero_point, dequantize, fit_scale_zero_point, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats

K, N = 80, 12  # 80 is no multiple of 32: the last group and the last block are ragged


class Case(NamedTuple):
    """The last arguments of `gptq_kernel`."""

    weights: QuantSpec
    config: GptqConfig = GptqConfig(block_size=32)

    def with_config(self, **changes) -> "Case":
        return self._replace(config=replace(self.config, **changes))


CHANNEL = Case(QuantSpec(4))
GROUPS = Case(QuantSpec(4, symmetric=False, group_size=32))
COARSE = Case(QuantSpec(2, group_size=32))
UNSWEPT, SEARCHED = GROUPS.with_config(sweeps=0), CHANNEL.with_config(search_range=True)
SPECS = [CHANNEL, GROUPS, COARSE] + [
    Case(grid) for grid in (QuantSpec(3, symmetric=False, per_tensor=True), QuantSpec(8, group_size=32))
]
round_nearest = jax.jit(quantize, static_argnums=1)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.weights.dtype}-{spec.weights.group}")


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def inputs(tokens: int = 400, width: int = K) -> np.ndarray:
    """Correlated inputs [tokens, width] of unequal strength: those that GPTQ is for."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width)) * np.geomspace(3, 0.1, width)
    return (mixed + rng.standard_normal(width)).astype(np.float32)


def stats_of(x: np.ndarray) -> Stats:
    return with_gram(x.T @ x / len(x))


def with_gram(gram: np.ndarray) -> Stats:
    return Stats(*np.zeros((3, len(gram))), gram=jnp.asarray(gram, jnp.float32))


def error(q: QTensor | np.ndarray, w: np.ndarray, x: np.ndarray) -> float:
    """|x @ w_hat - x @ w|, in float64."""
    rounded = dequantize(q) if isinstance(q, QTensor) else q
    return np.linalg.norm(x.astype(np.float64) @ (np.asarray(rounded, np.float64) - w))


@every_spec
def test_outputs_err_less_than_after_rounding_to_nearest(spec):
    w, x = weights(K, N), inputs()
    q, nearest = gptq_kernel(w, stats_of(x), *spec), round_nearest(w, spec.weights)
    np.testing.assert_array_equal(q.scale, nearest.scale)
    assert q.qvalue.dtype == nearest.qvalue.dtype
    assert q.qvalue.min() >= spec.weights.qmin
    assert q.qvalue.max() <= spec.weights.qmax
    assert error(q, w, x) < 0.8 * error(nearest, w, x)


@every_spec
def test_with_an_identity_gram_it_is_rounding_to_nearest_to_the_bit(spec):
    w = np.round(weights(K, N) * 16) / 16  # so that some lie half way between two points
    got, nearest = gptq_kernel(w, with_gram(np.eye(K)), *spec), round_nearest(w, spec.weights)
    jax.tree.map(np.testing.assert_array_equal, got, nearest)


@pytest.mark.parametrize("tokens", [80, 200])
def test_no_output_errs_more_than_after_rounding_even_where_inputs_hardly_correlate(tokens):
    w, stats = weights(K, N) ** 3, stats_of(np.random.default_rng(1).standard_normal((tokens, K)).astype(np.float32))
    got, nearest = gptq_kernel(w, stats, *COARSE), round_nearest(w, COARSE.weights)
    lost = lambda q: output_error(dequantize(q) - w, stats.gram)
    assert (lost(got) <= lost(nearest) * (1 + 1e-5)).all()  # sums of K numbers in float32


def by_the_paper(w: np.ndarray, gram: np.ndarray, spec: Case) -> np.ndarray:
    """w_hat [K, N] by algorithm 1 of arXiv 2210.17323, over the inverse of the Gram matrix, in float64."""
    w, gram, grid = w.astype(np.float64), gram.astype(np.float64), spec.weights
    scale, zero = (
        np.asarray(x, np.float64)[:, 0] for x in fit_scale_zero_point(by_group(w.astype(np.float32), grid), grid)
    )
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram + spec.config.damp_percentage * np.diag(gram).mean() * np.eye(len(gram))
    u = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, rounded = w[order], np.zeros_like(w)
    for i, k in enumerate(order):
        s, z = (x[k // (grid.group_size or len(w))] for x in (scale, zero))
        rounded[k] = (np.clip(np.round(left[i] / s + z), grid.qmin, grid.qmax) - z) * s
        left[i:] -= np.outer(u[i, i:], (left[i] - rounded[k]) / u[i, i])
    return rounded


def test_without_sweeps_it_finds_the_codes_of_the_paper():
    w, stats = weights(K, N), stats_of(inputs())
    expected = by_the_paper(w, np.asarray(stats.gram), UNSWEPT)
    same = np.isclose(dequantize(gptq_kernel(w, stats, *UNSWEPT)), expected, atol=1e-4)
    assert same.mean() > 0.99  # a weight half way between two points may fall to either side and take others along


def test_the_size_of_blocks_does_not_matter():
    w, stats = weights(K, N), stats_of(inputs())
    whole = gptq_kernel(w, stats, *CHANNEL.with_config(block_size=128))
    assert (
        gptq_kernel(w, stats, *CHANNEL).qvalue == whole.qvalue
    ).mean() > 0.99  # sums in another order, ties as above


def test_no_sweep_makes_an_output_worse_and_in_the_end_no_single_code_could_be_better():
    w, stats, grid = weights(K, N), stats_of(inputs()), GROUPS.weights
    unswept, swept, settled = (
        gptq_kernel(w, stats, *spec) for spec in (UNSWEPT, GROUPS, GROUPS.with_config(sweeps=50))
    )
    errors = [output_error(dequantize(q) - w, stats.gram) for q in (unswept, swept, settled)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()  # as far as sums of K numbers in float32 can tell
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()
    h, e = np.asarray(stats.gram, np.float64), w - np.asarray(dequantize(settled), np.float64)
    codes, step = np.asarray(settled.qvalue, int), np.repeat(settled.scale, grid.group_size, axis=0)[:K]
    for fn in (-1, 1):
        gain = 2 * fn * step * (h @ e) - step**2 * np.diag(h)[:, None]
        allowed = (codes + fn >= grid.qmin) & (codes + fn <= grid.qmax)
        assert (np.where(allowed, gain, 0) <= 1e-5 * errors[2]).all()


def test_the_order_in_which_inputs_come_does_not_matter():
    w, x, order = weights(K, N), inputs(), np.random.default_rng(2).permutation(K)
    straight, mixed = gptq_kernel(w, stats_of(x), *CHANNEL), gptq_kernel(w[order], stats_of(x[:, order]), *CHANNEL)
    assert (straight.qvalue[order] == mixed.qvalue).mean() > 0.99  # ties as above


def test_the_size_of_inputs_does_not_matter():
    w, x = weights(K, N), inputs()
    np.testing.assert_array_equal(
        gptq_kernel(w, stats_of(x), *GROUPS).qvalue, gptq_kernel(w, stats_of(x / 256), *GROUPS).qvalue
    )


@pytest.mark.parametrize("spec", [CHANNEL, GROUPS], ids=["channel", "groups"])
def test_inputs_that_never_come_are_rounded_plainly(spec):
    w, x, dead = weights(K, N), inputs(), np.array([0, 7, 79])
    x[:, dead] = 0
    plain = round_nearest(w, spec.weights)
    q = gptq_kernel(w, stats_of(x), *spec)
    np.testing.assert_array_equal(dequantize(q)[dead], dequantize(plain)[dead])
    assert error(q, w, x) < 0.8 * error(plain, w, x)


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_inputs_are_enough(tokens):
    w, x = weights(K, N), inputs()
    calib = x[:tokens]
    assert error(gptq_kernel(w, stats_of(calib), *CHANNEL), w, calib) < 0.2 * error(
        round_nearest(w, CHANNEL.weights), w, calib
    )
    assert error(gptq_kernel(w, stats_of(calib), *CHANNEL), w, x) < 2 * error(round_nearest(w, CHANNEL.weights), w, x)


def test_damping_grows_until_the_gram_matrix_can_be_factorized():
    gram = np.diag(np.linspace(2, 0.1, K))
    gram[:2, :2] = [[2, 2.1], [2.1, 2]]  # an eigenvalue of -0.1; the damping starts at 0.01
    q = gptq_kernel(weights(K, N), with_gram(gram), *CHANNEL)
    assert np.isfinite(dequantize(q)).all()
    with pytest.raises(ValueError, match="not positive definite after 3 tries: raise damp_percentage, now 0.01"):
        gptq_kernel(weights(K, N), with_gram(gram), *CHANNEL.with_config(num_inv_tries=3))


@pytest.mark.parametrize(
    ("weight", "gram", "message"),
    [(1, np.nan, "Gram matrix holds NaN"), (np.nan, 1, "weight holds NaN"), (np.inf, 1, "weight holds NaN")]
    + [(1, 0, "all inputs were 0 in calibration: skip the layer")],
)
def test_numbers_that_mean_nothing_are_refused(weight, gram, message):
    with pytest.raises(ValueError, match=message):
        gptq_kernel(weight * weights(K, N), with_gram(gram * np.eye(K)), *CHANNEL)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"damp_percentage": 0}, "over 0, got 0"), ({"block_size": 0}, "block_size must be at least 1, got 0")]
    + [({"num_inv_tries": 0}, "at least 1, got 0"), ({"sweeps": -1}, "at least 0, got -1")],
)
def test_an_impossible_spec_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        GptqConfig(**setting)


def test_a_convolution_is_rounded_as_the_matrix_of_its_patches():
    w, stats = weights(4, 4, 5, N), stats_of(inputs())
    got, flat = gptq_kernel(w, stats, *GROUPS), gptq_kernel(w.reshape(K, N), stats, *GROUPS)
    assert got.qvalue.shape == w.shape
    np.testing.assert_array_equal(dequantize(got), dequantize(flat).reshape(w.shape))


def test_as_a_transform_it_changes_the_layers_named():
    params, stats = {"a": {"kernel": weights(K, N)}, "b": {"kernel": weights(K, N)}}, stats_of(inputs())
    transform = gptq({"a": CHANNEL.weights}, CHANNEL.config)
    assert transform.needs == {"gram"}
    changed = transform.apply(params, {"a": stats})
    np.testing.assert_array_equal(
        changed["a"]["kernel"].qvalue, gptq_kernel(params["a"]["kernel"], stats, *CHANNEL).qvalue
    )
    assert changed["b"]["kernel"] is params["b"]["kernel"]


def test_no_range_errs_more_than_the_whole_one_or_any_that_was_not_chosen():
    spec = QuantSpec(3, symmetric=False, group_size=32)
    w, cost = weights(K, N) ** 3, np.linspace(2, 0.1, K, dtype=np.float32)
    grouped, costs = by_group(w, spec), by_group(jnp.broadcast_to(cost[:, None], w.shape), spec)
    low, high = grouped.min(1, keepdims=True), grouped.max(1, keepdims=True)

    def weighted(scale, zero):
        rounded = (jnp.clip(jnp.round(grouped / scale + zero), spec.qmin, spec.qmax) - zero) * scale
        return (costs * (grouped - rounded) ** 2).sum(1)

    found = weighted(*search_grid(w, cost, spec))
    assert (found <= weighted(*fit_scale_zero_point(grouped, spec))).all()
    assert found.sum() < 0.95 * weighted(*fit_scale_zero_point(grouped, spec)).sum()
    for ratio in RATIOS[1::20]:
        assert (found <= weighted(*compute_scale_zero_point(ratio * low, ratio * high, spec)) * (1 + 1e-5)).all()


def test_where_few_inputs_are_strong_a_searched_range_helps():
    w, x = weights(K, N), inputs()
    x[:, :3] *= 30
    assert error(gptq_kernel(w, stats_of(x), *SEARCHED), w, x) < 0.9 * error(
        gptq_kernel(w, stats_of(x), *CHANNEL), w, x
    )


@pytest.mark.parametrize("kind", ["", ".outlier"])
@pytest.mark.parametrize(("name", "symmetric"), [("gptq_s4", True), ("gptq_u4", False)])
def test_real_inputs_err_no_more_than_with_the_reference_library(shared, kind, name, symmetric):
    folder = shared / "golden" / "ptq"
    case, peer = (np.load(folder / f"blocks.0.attn.qkv{kind}.{part}.npz") for part in ("inputs", "peer"))
    w, x = case["w"].T, np.concatenate([case["x0"], case["x1"]])
    q = gptq_kernel(w, stats_of(x), QuantSpec(4, symmetric=symmetric, group_size=int(case["group"])))
    reference = peer[f"{name}.what"].T
    assert error(q, w, x) <= error(reference, w, x)
    assert error(q, w, case["xe"]) <= error(reference, w, case["xe"])  # images that neither was calibrated on

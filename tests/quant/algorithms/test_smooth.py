from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.algorithms.smooth import SmoothConfig, Smoothed, candidates, errors, recover_alpha_beta, smooth_kernel
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import map_base_weight

K, N = 48, 10
W4, A4, A8 = QuantSpec(4), QuantSpec(4), QuantSpec(8)


class Case(NamedTuple):
    """The last arguments of `smooth_kernel`."""

    weights: QuantSpec | None
    inputs: QuantSpec | None
    config: SmoothConfig


GRID = SmoothConfig(strategy="GridSearch", num_grids=10)
SEARCH = Case(W4, A4, GRID)
SPECS = [
    Case(None, None, SmoothConfig(strategy="Manual", alpha=0.5)),
    Case(None, None, SmoothConfig(strategy="Manual", alpha=-1, beta=0.3)),
    SEARCH,
    SEARCH._replace(config=replace(GRID, alpha=0.5, beta=-2, spans=(("AbsMax", "AbsMax"), ("RMS", "RMS")))),
    Case(QuantSpec(4, group_size=16), A4, replace(GRID, granularity="ChannelGroup")),
    Case(W4, None, GRID),
]
every_spec = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture
def w():
    return jnp.array(np.random.default_rng(0).standard_normal((K, N)), jnp.float32)


@pytest.fixture
def x():
    """Tokens [300, K] of which three channels are far stronger than the others."""
    rng = np.random.default_rng(1)
    return jnp.array(rng.standard_normal((300, K)) * np.where(np.arange(K) % 16 == 3, 20, 1), jnp.float32)


def stats_of(x) -> Stats:
    return Stats(x.mean(0), x.min(0), x.max(0), x.T @ x / len(x), x, jnp.float32(len(x)))


def error(scale, w, x, weights=W4, inputs=A4) -> float:
    """What smoothing by `scale` and rounding add to the outputs, in numpy's float64."""
    small = fake_quantize(jnp.asarray(x / scale), inputs)
    large = dequantize(quantize(jnp.asarray(w) * scale[:, None], weights))
    return float(np.square(np.float64(small) @ np.float64(large) - np.float64(x) @ np.float64(w)).sum())


@every_spec
def test_a_smoothed_layer_computes_and_stands_for_the_same(w, x, spec):
    """To 1e-5, in float32."""
    layer = smooth_kernel(w, stats_of(x), *spec)
    assert relative_error(matmul(layer, x), x @ w) <= 1e-5
    assert relative_error(materialize(layer), w) <= 1e-5
    assert not np.allclose(layer.scale, 1)


@every_spec
def test_the_inner_part_is_told_of_smoothed_inputs(w, x, spec):
    layer = smooth_kernel(w, stats_of(x), *spec)
    received = []
    map_base_weight(layer, stats_of(x), lambda inner, stats: received.append(stats) or inner)
    for got, expected in zip(received[0], stats_of(x / layer.scale)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.config.strategy == "GridSearch" and s.inputs])
def test_a_search_is_never_worse_than_no_smoothing_and_here_far_better(w, x, spec):
    scale = smooth_kernel(w, stats_of(x), *spec).scale
    assert error(scale, w, x, spec.weights) < 0.5 * error(jnp.ones(K), w, x, spec.weights)


def test_where_nothing_helps_the_scale_is_one(x):
    """Weights of one power of two and whole inputs: rounding loses nothing, and (0, 0) comes first."""
    w = jnp.full((K, N), 0.5)
    x = jnp.round(jnp.clip(x, -7, 7)).at[:, 0].set(7)
    np.testing.assert_array_equal(smooth_kernel(w, stats_of(x), *SEARCH).scale, 1)


def test_dead_channels_keep_a_scale_of_one(w, x):
    x = x.at[:, 5].set(0)
    assert smooth_kernel(w, stats_of(x), *SPECS[0]).scale[5] == 1


@pytest.mark.parametrize(
    ("alpha", "beta", "first"), [(0.5, -1, (0.5, 0.5)), (-1, 0.3, (0.7, 0.3)), (0.4, 0.2, (0.4, 0.2))]
)
def test_manual_takes_what_it_is_given(w, x, alpha, beta, first):
    scale = smooth_kernel(w, stats_of(x), config=SmoothConfig(strategy="Manual", alpha=alpha, beta=beta)).scale
    np.testing.assert_allclose(scale, jnp.abs(x).max(0) ** first[0] / jnp.abs(w).max(1) ** first[1], rtol=1e-5)


@every_spec
def test_the_strength_that_was_chosen_is_found_again(w, x, spec):
    found = recover_alpha_beta(w, stats_of(x), spec.config, smooth_kernel(w, stats_of(x), *spec).scale)
    if spec.config.granularity == "Layer":
        assert found in spec.config.pairs
        again = replace(spec.config, strategy="Manual", alpha=found[0], beta=found[1], spans=spec.config.spans[:1])
        if len(spec.config.spans) == 1:
            np.testing.assert_allclose(
                smooth_kernel(w, stats_of(x), config=again).scale, smooth_kernel(w, stats_of(x), *spec).scale, rtol=1e-5
            )
    else:
        mixed = jnp.where(jnp.arange(K) < 16, 2.0, 0.1)
        assert recover_alpha_beta(w, stats_of(x), spec.config, mixed) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "Best"}, "strategy 'Best': allowed are Manual, GridSearch"),
        ({"strategy": "Manual", "alpha": -0.5, "beta": -0.5}, "Manual allows 0 to 1"),
        ({"strategy": "GridSearch", "num_grids": 1}, "num_grids must be at least 2"),
        ({"strategy": "GridSearch", "spans": (("Mean", "RMS"),)}, "spans 'Mean': allowed are AbsMax, RMS, RootMean"),
        ({"strategy": "GridSearch", "spans": (("RMS",),)}, "allowed are pairs of AbsMax"),
    ],
)
def test_settings_that_cannot_be_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SmoothConfig(**settings)


def test_a_layer_that_cannot_be_smoothed_is_an_error(w, x):
    with pytest.raises(ValueError, match="a rounded weight"):
        smooth_kernel(quantize(w, W4), stats_of(x), *SEARCH)
    with pytest.raises(ValueError, match="neither weights nor inputs"):
        smooth_kernel(w, stats_of(x), config=GRID)
    with pytest.raises(ValueError, match="needs tokens"):
        smooth_kernel(w, stats_of(x)._replace(tokens=None), *SEARCH)
    with pytest.raises(ValueError, match="the weight holds NaN"):
        smooth_kernel(w.at[0, 0].set(jnp.nan), stats_of(x), *SEARCH)


@pytest.mark.parametrize("kind", ["", ".outlier"])
@pytest.mark.parametrize(("name", "inputs", "beta"), [("w4a8_b-1", A8, -1), ("w4a4_b-1", A4, -1), ("w4a4_b-2", A4, -2)])
def test_captured_layers_find_what_the_reference_found(shared, kind, name, inputs, beta):
    """The same candidates with the same errors, to 1e-4, as a tie may fall to either side; the best is the reference's
    best, on other images too."""
    folder = shared / "golden" / "ptq"
    case, peer = (np.load(folder / f"blocks.0.attn.qkv{kind}.{part}.npz") for part in ("inputs", "peer"))
    w, x = jnp.array(case["w"].T), jnp.array(np.concatenate([case["x0"], case["x1"]]))
    spec = Case(W4, inputs, SmoothConfig(strategy="GridSearch", beta=beta))
    np.testing.assert_allclose(spec.config.pairs, peer[f"smooth_{name}.pairs"])
    listed = peer[f"smooth_{name}.errors"]
    search = jax.jit(errors, static_argnames=("weights", "inputs", "size"))
    found = search(w, x, candidates(w, stats_of(x), spec.config), weights=W4, inputs=inputs, size=len(w))[:, 0]
    np.testing.assert_allclose(found, listed, rtol=1e-4)
    scale = smooth_kernel(w, stats_of(x), *spec).scale
    assert isinstance(smooth_kernel(w, stats_of(x), *spec), Smoothed)
    assert error(scale, w, x, inputs=inputs) <= listed.min() * (1 + 1e-5)
    reference = jnp.array(peer[f"smooth_{name}.scale"])
    assert error(scale, w, case["xe"], inputs=inputs) <= error(reference, w, case["xe"], inputs=inputs) * (1 + 1e-3)


def test_deepcompressors_name_of_a_span_is_taken(w, x):
    named = SmoothConfig(spans=[["RootMeanSquare", "AbsMax"]])
    assert named.spans == (("RootMeanSquare", "AbsMax"),)
    short = SmoothConfig(spans=[["RMS", "AbsMax"]])
    scales = [smooth_kernel(w, stats_of(x), config=config).scale for config in (named, short)]
    np.testing.assert_array_equal(*scales)

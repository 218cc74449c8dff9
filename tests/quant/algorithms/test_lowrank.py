from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.algorithms.lowrank import LowRank, LowRankConfig, low_rank_kernel
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import conv, materialize, matmul
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import map_base_weight

K, N = 48, 30
W4, A4, A8 = QuantSpec(4), QuantSpec(4), QuantSpec(8)


class Case(NamedTuple):
    """The last arguments of `low_rank_kernel`."""

    weights: QuantSpec
    inputs: QuantSpec | None
    config: LowRankConfig


def case(weights: QuantSpec = W4, inputs: QuantSpec | None = None, **settings) -> Case:
    return Case(weights, inputs, LowRankConfig(**settings))


SPECS = [
    case(rank=4, weights=W4),
    case(rank=4, weights=W4, inputs=A8, num_iters=5),
    case(rank=8, weights=W4, inputs=A4, num_iters=5, early_stop=True),
    case(rank=4, weights=QuantSpec(2, group_size=16), inputs=A4, num_iters=3, compensate=True),
    case(rank=4, weights=W4, inputs=A8, num_iters=3, objective="weight"),
]
every_spec = pytest.mark.parametrize("spec", SPECS)
shapes = pytest.mark.parametrize("shape", [(K, N), (N, K)], ids=["tall", "wide"])  # each takes the smaller eigenproblem


def weights(*shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def tokens(width: int, count: int = 400) -> jax.Array:
    """Correlated inputs of unequal strength."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) * np.geomspace(3, 0.1, width)
    return jnp.array(mixed, jnp.float32)


def stats_of(x) -> Stats:
    return Stats(x.mean(0), x.min(0), x.max(0), x.T @ x / len(x), x)


def error(layer: LowRank | None, w, x, spec: Case) -> float:
    """The square error of outputs after plain rounding, in float64; of no branch for None."""
    inner, down, up = (w, 0 * w[:, :1], 0 * w[:1]) if layer is None else (layer.inner, layer.down, layer.up)
    read = x if spec.inputs is None else fake_quantize(x, spec.inputs)
    f64 = lambda a: np.asarray(a, np.float64)
    got = f64(read) @ f64(dequantize(quantize(inner, spec.weights))) + f64(x) @ f64(down) @ f64(up)
    return float(np.square(got - f64(x) @ f64(w)).sum())


@every_spec
@shapes
def test_before_rounding_the_layer_computes_and_stands_for_the_same(shape, spec):
    """To 1e-5, in float32."""
    w, x = weights(*shape), tokens(shape[0])
    layer = low_rank_kernel(w, stats_of(x), *spec)
    assert (layer.down.shape, layer.up.shape) == ((shape[0], spec.config.rank), (spec.config.rank, shape[1]))
    assert jnp.abs(layer.down @ layer.up).max() > 0
    assert relative_error(matmul(layer, x), x @ w) <= 1e-5
    assert relative_error(materialize(layer), w) <= 1e-5


@every_spec
@shapes
def test_outputs_are_nearer_than_without_a_branch(shape, spec):
    w, x = weights(*shape), tokens(shape[0])
    assert error(low_rank_kernel(w, stats_of(x), *spec), w, x, spec) < 0.95 * error(None, w, x, spec)


def test_a_branch_that_cannot_help_is_nothing():
    """Weights that lie on their grid lose nothing; the branch must not bring in an error."""
    w, x = jnp.tile(jnp.arange(-7.0, 8.0)[:, None], (3, 4)), tokens(45)
    layer = low_rank_kernel(w, stats_of(x), *case(rank=2, weights=W4, num_iters=3))
    assert error(layer, w, x, case(weights=W4)) <= error(None, w, x, case(weights=W4)) + 1e-6


def test_more_rounds_and_more_rank_do_not_hurt():
    w, x = weights(K, N), tokens(K)

    def at(**changes) -> float:
        spec = SPECS[1]._replace(config=replace(SPECS[1].config, **changes))
        return error(low_rank_kernel(w, stats_of(x), *spec), w, x, spec)

    assert at(num_iters=10) <= at(num_iters=5) <= at(num_iters=1)
    assert at(rank=16) < at(rank=8) < at(rank=2)


def test_the_output_objective_beats_the_weights():
    w, x = weights(K, N), tokens(K)

    def at(objective: str) -> float:
        spec = case(rank=4, objective=objective)
        return error(low_rank_kernel(w, stats_of(x), *spec), w, x, spec)

    assert at("output") < 0.8 * at("weight")


def test_a_convolution_has_a_branch_too():
    w, x = weights(3, 3, 4, 12), tokens(36)
    layer = low_rank_kernel(w, stats_of(x), *case(rank=3, weights=W4))
    image = weights(2, 8, 8, 4)
    settings = {"stride": 1, "padding": 1, "groups": 1}
    assert layer.down.shape == (3, 3, 4, 3)
    assert relative_error(conv(layer, image, **settings), conv(w, image, **settings)) <= 1e-5


def test_the_inner_part_reads_the_same_inputs():
    w, x = weights(K, N), tokens(K)
    received = []
    map_base_weight(
        low_rank_kernel(w, stats_of(x), *SPECS[0]), stats_of(x), lambda inner, stats: received.append(stats) or inner
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, received[0], stats_of(x)))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda w, s: (quantize(w, W4), s), "got a rounded one"),
        (lambda w, s: (w[:, :3], s), r"rank 4 of a branch is over what 48 inputs and 3 outputs allow: set it to 3"),
        (lambda w, s: (w.at[0, 0].set(jnp.inf), s), "the weight holds NaN or infinity"),
        (lambda w, s: (w, s._replace(gram=None, tokens=None)), "collect tokens in calibration"),
        (lambda w, s: (w.T, stats_of(tokens(N))._replace(gram=-s.gram[:N, :N])), "not positive semidefinite"),
    ],
)
def test_what_has_no_branch_is_an_error(fn, message):
    with pytest.raises(ValueError, match=message):
        low_rank_kernel(*fn(weights(K, N), stats_of(tokens(K))), *SPECS[0])


@pytest.mark.parametrize("settings", [{"rank": 0}, {"num_iters": 0}, {"objective": "loss"}])
def test_settings_that_cannot_be_are_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LowRankConfig(**settings)


@pytest.mark.parametrize("kind", ["", ".outlier"])
@pytest.mark.parametrize(("name", "inputs"), [("w4a8", A8), ("w4a4", A4)])
def test_captured_layers_err_less_than_the_references_ten_rounds(shared, kind, name, inputs):
    """The reference lists the square error over its 2048 calibration tokens; its factors are tried on others."""
    folder = shared / "golden" / "ptq"
    case, peer = (np.load(folder / f"blocks.0.attn.qkv{kind}.{part}.npz") for part in ("inputs", "peer"))
    w, x, unseen = jnp.array(case["w"].T), jnp.array(np.concatenate([case["x0"], case["x1"]])), jnp.array(case["xe"])
    spec = Case(W4, inputs, LowRankConfig(rank=32, num_iters=10))
    layer = low_rank_kernel(w, stats_of(x), *spec)
    assert error(layer, w, x, spec) < 0.7 * peer[f"svd_r32_i10_{name}.errors"].min()
    down, up = (jnp.array(peer[f"svd_r32_i10_{name}.{part}"].T) for part in "AB")
    assert error(layer, w, unseen, spec) < error(LowRank(w - down @ up, down, up), w, unseen, spec)

"""Laws of every pair of transforms on one layer, in the order in which a recipe applies them."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.activations import materialize_weights, quantize_inputs
from sam2jq.quant.algorithms.gptq import GptqSpec, gptq
from sam2jq.quant.algorithms.lowrank import LowRankSpec, low_rank
from sam2jq.quant.algorithms.recalibrate import ridge
from sam2jq.quant.algorithms.rotate import RotationSpec, rotate
from sam2jq.quant.algorithms.smooth import SmoothSpec, smooth
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.packing import pack_leaf, unpack_leaf
from sam2jq.quant.qtensor import QTensor, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats, Transform, chain, each_layer

K, N = 64, 20
W4 = QuantSpec(4, group_size=32)
NEAREST = lambda w, _, spec: quantize(w, spec)
PLAIN = {  # what changes no output before something is rounded
    "rotate": each_layer(rotate, {"a": RotationSpec(random=True, seed=3)}),
    "smooth": each_layer(smooth, {"a": SmoothSpec(strategy="GridSearch", num_grids=5, weights=W4)}),
    "low rank": each_layer(low_rank, {"a": LowRankSpec(rank=4, weights=W4)}),
}
ROUNDED = {
    "rtn": each_layer(NEAREST, {"a": W4}),
    "gptq": each_layer(gptq, {"a": GptqSpec(W4, block_size=32)}),
}
INPUTS = {
    "inputs": each_layer(quantize_inputs, {"a": QuantSpec(8)}),
    "static inputs": each_layer(
        lambda w, s, spec: quantize_inputs(w, s, spec, static=True), {"a": QuantSpec(8, False, per_tensor=True)}
    ),
}
ORDER = PLAIN | ROUNDED | INPUTS
PAIRS = [(a, b) for a, b in combinations(ORDER, 2) if {a, b} not in ({"rtn", "gptq"}, set(INPUTS))]


@pytest.fixture(scope="module")
def x():
    """Correlated tokens of unequal strength, one channel an outlier."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((500, K)) @ rng.standard_normal((K, K)) * np.geomspace(3, 0.3, K)
    return jnp.array(mixed * np.where(np.arange(K) == 7, 10, 1), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return {"a": {"kernel": jnp.array(np.random.default_rng(0).standard_normal((K, N)), jnp.float32)}}


@pytest.fixture(scope="module")
def stats(x):
    return {"a": Stats(x.mean(0), x.min(0), x.max(0), x.T @ x / len(x), x)}


def made(params, stats, *names: str):
    """The leaf that the named transforms make, one after the other."""
    return chain(*(ORDER[name] for name in names)).apply(params, stats)["a"]["kernel"]


@pytest.mark.parametrize("pair", combinations(PLAIN, 2), ids="+".join)
def test_before_rounding_a_pair_changes_no_output(params, stats, x, pair):
    """To 1e-5, in float32."""
    leaf, w = made(params, stats, *pair), params["a"]["kernel"]
    assert relative_error(matmul(leaf, x), x @ w) <= 1e-5
    assert relative_error(materialize(leaf), w) <= 1e-5


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_computes_what_it_stands_for(params, stats, x, pair):
    """Its effective weight to 1e-5, or to what 8 bits leave of the inputs: on one static grid,
    which the outlier widens, worse than on one for each token."""
    leaf, limit = made(params, stats, *pair), {"inputs": 0.02, "static inputs": 0.08}
    assert relative_error(matmul(leaf, x), x @ materialize(leaf)) <= limit.get(pair[1], 1e-5)
    again = materialize_weights({"a": {"kernel": leaf}})["a"]["kernel"]
    assert relative_error(matmul(again, x), matmul(leaf, x)) <= 1e-5


@pytest.mark.parametrize(
    "around", [(), *[(name,) for name in PLAIN], *combinations(PLAIN, 2), tuple(PLAIN)], ids="+".join
)
def test_gptq_errs_less_than_rounding_to_nearest_inside_anything(params, stats, x, around):
    """By more than a tenth: what it is told passes through all that stands around it."""
    error = lambda name: relative_error(matmul(made(params, stats, *around, name), x), x @ params["a"]["kernel"])
    assert error("gptq") < 0.9 * error("rtn")


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_package_keeps_a_pair_to_the_bit(params, stats, x, pair):
    leaf = made(params, stats, *pair)
    back = jax.tree.map(jnp.asarray, unpack_leaf(pack_leaf(leaf)))
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(jax.jit(matmul)(back, x), jax.jit(matmul)(leaf, x))


def test_ridge_comes_before_all_others(params, stats, x):
    """It shrinks w, so later transforms start from what it left."""
    shrunk = each_layer(ridge, {"a": 0.1}, frozenset({"gram"}))
    leaf = chain(shrunk, PLAIN["rotate"], PLAIN["smooth"]).apply(params, stats)
    wanted = shrunk.apply(params, stats)["a"]["kernel"]
    assert relative_error(wanted, params["a"]["kernel"]) > 0.01
    assert relative_error(materialize(leaf["a"]["kernel"]), wanted) <= 1e-5


def test_a_chain_needs_what_its_parts_need_and_applies_them_from_left_to_right():
    note = lambda text: lambda params, _: params | {"said": params.get("said", "") + text}
    both = chain(Transform(frozenset({"gram"}), note("a")), Transform(frozenset({"tokens"}), note("b")))
    assert both.needs == {"gram", "tokens"}
    assert both.apply({}, {})["said"] == "ab"


def test_an_error_names_the_layer(params, stats):
    with pytest.raises(ValueError, match="layer a: rank 99"):
        each_layer(low_rank, {"a": LowRankSpec(rank=99, weights=W4)}).apply(params, stats)
    with pytest.raises(ValueError, match="no statistics of a: calibration never reached them"):
        each_layer(gptq, {"a": GptqSpec(W4)}, frozenset({"gram"})).apply(params, {})


def test_a_leaf_around_stays_when_its_inside_changes(params, stats):
    leaf = made(params, stats, "smooth", "rtn")
    assert isinstance(leaf.inner, QTensor)
    np.testing.assert_array_equal(leaf.scale, made(params, stats, "smooth").scale)

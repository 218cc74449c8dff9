"""Laws of every pair of transforms on one layer, in the order in which a recipe applies them."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import materialize_weights, quantize_activations, quantize_outputs
from sam2jq.quant.algorithms.gptq import GptqConfig, gptq
from sam2jq.quant.algorithms.lowrank import LowRankConfig, low_rank
from sam2jq.quant.algorithms.ridge import ridge
from sam2jq.quant.algorithms.rotate import rotate
from sam2jq.quant.algorithms.rtn import rtn
from sam2jq.quant.algorithms.smooth import SmoothConfig, smooth
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.packing import pack_leaf, unpack_leaf
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, chain, named_chain

K, N = 64, 20
W4 = QuantSpec(4, group_size=32)
PLAIN = {  # these change no output before something is rounded
    "rotate": rotate(random=True, seed=3),
    "smooth": smooth(W4, config=SmoothConfig(strategy="GridSearch", num_grids=5)),
    "low rank": low_rank(W4, config=LowRankConfig(rank=4)),
}
ROUNDED = {"rtn": rtn(W4), "gptq": gptq(W4, GptqConfig(block_size=32))}
INPUTS = {
    "inputs": quantize_activations(QuantSpec(8)),
    "static inputs": quantize_activations(QuantSpec(8, False, per_tensor=True), static=True),
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
    """By more than a tenth: its statistics pass through all leaves around it."""
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
    shrunk = ridge(0.1)
    leaf = chain(shrunk, PLAIN["rotate"], PLAIN["smooth"]).apply(params, stats)
    expected = shrunk.apply(params, stats)["a"]["kernel"]
    assert relative_error(expected, params["a"]["kernel"]) > 0.01
    assert relative_error(materialize(leaf["a"]["kernel"]), expected) <= 1e-5


def test_a_chain_needs_what_its_parts_need_and_applies_them_from_left_to_right():
    note = lambda text: lambda params, _: params | {"said": params.get("said", "") + text}
    both = chain(Transform(frozenset({"gram"}), note("a")), Transform(frozenset({"tokens"}), note("b")))
    assert both.needs == {"gram", "tokens"}
    assert both.apply({}, {})["said"] == "ab"


@pytest.mark.parametrize("first", ["gptq", "rtn"])
@pytest.mark.parametrize("second", [ORDER["gptq"], ORDER["rtn"], ridge(0.1)], ids=["gptq", "rtn", "ridge"])
def test_a_layer_is_rounded_once(params, stats, first, second):
    once = ORDER[first].apply(params, stats)
    with pytest.raises(UserError, match="^layer a: the weight is rounded already, it is a QTensor"):
        second.apply(once, stats)


@pytest.mark.parametrize("make", [rtn, gptq, quantize_activations, quantize_outputs])
def test_a_spec_for_a_layer_that_does_not_exist_is_an_error(params, stats, make):
    with pytest.raises(UserError, match="the params have no layer nope"):
        make({"nope": QuantSpec(4)}).apply(params, stats | {"nope": stats["a"]})


def test_rotation_of_a_layer_that_does_not_exist_is_an_error(params, stats):
    with pytest.raises(UserError, match="the params have no layer nope"):
        rotate(layers=["nope"]).apply(params, stats)


def test_a_pattern_that_is_no_regular_expression_is_an_error(params, stats):
    with pytest.raises(UserError, match="is not a regular expression"):
        rtn(QuantSpec(4), match="(").apply(params, stats)


@pytest.mark.parametrize(
    "wrong", [[rtn(QuantSpec(4))], None, gptq, QuantSpec(4)], ids=lambda value: type(value).__name__
)
def test_what_is_no_transform_is_refused_when_a_chain_is_made(wrong):
    for make in (lambda: chain(wrong), lambda: named_chain(("weights", wrong))):
        with pytest.raises(UserError, match="expected a transform"):
            make()


@pytest.mark.parametrize("fields", [{"bits": 4.5}, {"bits": "4"}, {"bits": 4, "group_size": 64.0},
                                    {"bits": 4, "codes": "hex"}], ids=str)  # fmt: skip
def test_a_spec_with_fields_of_another_kind_is_an_error(fields):
    with pytest.raises(UserError, match="whole number|codes must be"):
        QuantSpec(**fields)


def test_an_error_names_the_layer(params, stats):
    with pytest.raises(ValueError, match="layer a: rank 99"):
        low_rank(W4, config=LowRankConfig(rank=99)).apply(params, stats)
    with pytest.raises(ValueError, match="no statistics of a: these layers never ran"):
        gptq(W4).apply(params, {})


def test_a_leaf_around_stays_when_its_inside_changes(params, stats):
    leaf = made(params, stats, "smooth", "rtn")
    assert isinstance(leaf.inner, QTensor)
    np.testing.assert_array_equal(leaf.scale, made(params, stats, "smooth").scale)


def test_a_composed_chain_equals_the_hand_written_steps(params, stats):
    steps = params
    for name in ("rotate", "smooth", "low rank", "gptq"):
        steps = ORDER[name].apply(steps, stats)
    composed = chain(*(ORDER[name] for name in ("rotate", "smooth", "low rank", "gptq"))).apply(params, stats)
    jax.tree.map(np.testing.assert_array_equal, composed, steps)


def test_a_named_chain_yields_every_stage_and_ends_as_the_chain(params, stats):
    stages = named_chain(("smoothing", ORDER["smooth"]), ("rounding", ORDER["rtn"]))
    assert stages.needs == {"gram", "tokens"}
    steps = dict(stages.steps(params, stats))
    assert list(steps) == ["smoothing", "rounding"]
    jax.tree.map(np.testing.assert_array_equal, steps["rounding"], stages.apply(params, stats))
    with pytest.raises(ValueError, match="different names, got a, a"):
        named_chain(("a", ORDER["rtn"]), ("a", ORDER["rtn"]))


def test_one_spec_takes_the_layers_that_match_and_none_is_an_error(params):
    both = params | {"b": params["a"]}
    assert isinstance(rtn(W4, match="a").apply(both, {})["a"]["kernel"], QTensor)
    assert rtn(W4, match="a").apply(both, {})["b"]["kernel"] is both["b"]["kernel"]
    with pytest.raises(ValueError, match="match 'c' fits no layer; layers are named like a, b"):
        rtn(W4, match="c").apply(both, {})

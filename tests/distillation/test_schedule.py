import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.distillation.schedule import bit_search, candidates, confident_layers, init_schedule, observe, reduce_bits

NAMES = ["a", "b", "c"]
SIZES = np.array([100, 100, 200])


def watched(*rows, bits=(8, 8, 8), window=3):
    state = init_schedule(jnp.array(bits, jnp.float32), window)
    for row in rows:
        state = observe(state, jnp.array(row, jnp.float32))
    return state


def test_confidence_waits_for_a_full_window_and_forgets_what_is_older():
    calm = [0.01, 0.01, 0.5]
    state = watched(calm, calm)
    assert not confident_layers(state, "baseline", 0.1, 0.05).any()
    np.testing.assert_array_equal(
        confident_layers(observe(state, jnp.array(calm)), "baseline", 0.1, 0.05), [True, True, False]
    )
    state = watched([9, 9, 9], calm, calm, calm)
    np.testing.assert_array_equal(confident_layers(state, "baseline", 0.1, 0.05), [True, True, False])


def test_variance_is_judged_against_each_layer_s_own_scale():
    """A layer whose loss halves and doubles is not sure, however small its loss; one at a thousandth may be."""
    state = watched([1e-5, 0.010, 0.05], [4e-5, 0.011, 0.05], [1e-5, 0.009, 0.05])
    np.testing.assert_array_equal(confident_layers(state, "variance", 0.1, 0.05), [False, True, True])
    np.testing.assert_array_equal(confident_layers(state, "baseline", 0.1, 0.05), [True, True, True])


def test_candidates_are_the_surest_of_those_that_have_a_bit_to_give():
    state = watched(*[[0.03, 0.01, 0.02]] * 3, bits=(8, 4, 8))
    np.testing.assert_array_equal(candidates(state, np.array([True, True, True]), 4, None), [2, 0])
    np.testing.assert_array_equal(candidates(state, np.array([True, True, True]), 4, 1), [2])
    assert len(candidates(state, np.array([False, True, False]), 4, None)) == 0


def test_layers_are_lowered_cheapest_first_until_the_budget_is_spent():
    """Every impact is against the loss before any layer was touched: what is accepted adds up to the budget at most."""
    tried, impacts = np.array([0, 1, 2]), np.array([0.2, 0.1, 0.3])
    state, decisions = reduce_bits(watched(), NAMES, SIZES, tried, impacts, threshold=0.5, budget=0.45)
    np.testing.assert_array_equal(state.bits, [8, 7, 7])
    assert [(d.layer, d.accepted) for d in decisions] == [("b", True), ("c", True), ("a", False)]
    assert "budget" in decisions[-1].reason
    assert sum(d.impact for d in decisions if d.accepted) <= 0.45


def test_a_layer_over_the_threshold_keeps_its_bits_and_so_does_one_without_a_finite_loss():
    impacts = np.array([0.2, 0.6, np.nan])
    state, decisions = reduce_bits(watched(), NAMES, SIZES, np.arange(3), impacts, threshold=0.5, budget=9)
    np.testing.assert_array_equal(state.bits, [7, 8, 8])
    assert all("threshold" in d.reason for d in decisions if not d.accepted)


def test_lowering_ends_at_the_target():
    state, decisions = reduce_bits(
        watched(), NAMES, SIZES, np.arange(3), np.array([0.1, 0.2, 0.3]), threshold=1, budget=9, target=7.75
    )
    assert float((np.asarray(state.bits) * SIZES).sum() / SIZES.sum()) <= 7.75
    assert decisions[-1].reason == "the target is reached"


def test_a_layer_that_lost_a_bit_starts_a_new_history():
    state = watched(*[[0.01] * 3] * 3)
    state, _ = reduce_bits(state, NAMES, SIZES, np.array([0]), np.array([0.0]), threshold=1, budget=1)
    np.testing.assert_array_equal(confident_layers(state, "baseline", 0.1, 0.05), [False, True, True])


def test_decisions_replayed_give_the_same_bits():
    rng = np.random.default_rng(0)
    impacts = rng.uniform(0, 0.5, 3)
    state, decisions = reduce_bits(watched(), NAMES, SIZES, np.arange(3), impacts, threshold=0.4, budget=0.6)
    bits = dict.fromkeys(NAMES, 8)
    for decision in decisions:
        bits[decision.layer] -= decision.accepted
    assert list(bits.values()) == np.asarray(state.bits).tolist()


def test_the_ladder_is_walked_down_to_the_last_rung_that_holds():
    errors = {"a": {8: 0.001, 6: 0.01, 4: 0.05}, "b": {8: 0.01, 6: 0.2, 4: 0.02}}
    assert bit_search(errors, [4, 8, 6], 0.03) == {"a": 6, "b": 8}  # not past a rung that breaks
    with pytest.raises(ValueError, match=r"layer a: even 8 bits err by 0\.001"):
        bit_search(errors, [8, 6], 0.0005)

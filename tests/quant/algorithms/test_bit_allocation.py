import itertools

import numpy as np
import pytest

from sam2jq.config.quant import CalibConfig, InputsConfig, QuantConfig, WeightsConfig
from sam2jq.ptq.bit_targets import choose_bits, choose_input_bits, multiplications
from sam2jq.ptq.recipe import activation_specs
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.algorithms.bit_allocation import WIDTHS, assign_bits, error_by_width, input_error_by_width
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats


def problem(seed: int, layers: int = 5):
    """Errors that fall with every bit, and sizes."""
    rng = np.random.default_rng(seed)
    start, fall = rng.uniform(0.1, 10, layers), rng.uniform(2, 5, layers)
    errors = {f"l{i}": {bits: start[i] * fall[i] ** -bits for bits in range(2, 9)} for i in range(layers)}
    return errors, {f"l{i}": int(n) for i, n in enumerate(rng.integers(10, 1000, layers))}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [2.5, 4, 4.5])
def test_the_assignment_keeps_the_budget_and_is_nearly_the_best_there_is(seed, target):
    """Within 5 % of the best of all 7^4 assignments, by the sum of errors."""
    errors, sizes = problem(seed, 4)
    budget = target * sum(sizes.values())
    got = assign_bits(errors, sizes, budget)
    spent = lambda bits: sum(sizes[layer] * b for layer, b in bits.items())
    total = lambda bits: sum(errors[layer][b] for layer, b in bits.items())
    assert spent(got) <= budget
    every = (dict(zip(errors, choice)) for choice in itertools.product(range(2, 9), repeat=4))
    assert total(got) <= 1.05 * min(total(bits) for bits in every if spent(bits) <= budget)


@pytest.mark.parametrize("bits", range(2, 9))
def test_it_is_never_worse_than_one_width_for_all(bits):
    errors, sizes = problem(9, 30)
    got = assign_bits(errors, sizes, bits * sum(sizes.values()))
    assert sum(errors[layer][b] for layer, b in got.items()) <= sum(of[bits] for of in errors.values())


def test_a_budget_below_two_bits_is_out_of_reach():
    errors, sizes = problem(0)
    with pytest.raises(ValueError, match=r"out of reach: the least is 2.00 bits on average"):
        assign_bits(errors, sizes, 1.9 * sum(sizes.values()))


def test_the_error_of_each_width_is_that_of_rounded_outputs():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((24, 6)).astype(np.float32), rng.standard_normal((100, 24)).astype(np.float32)
    got = error_by_width(w, x.T @ x / len(x), QuantSpec(4, group_size=8))
    for bits, error in zip(WIDTHS, got):
        lost = x @ np.asarray(dequantize(quantize(w, QuantSpec(bits, group_size=8)))) - x @ w
        np.testing.assert_allclose(error, np.square(lost).sum() / np.square(x @ w).sum(), rtol=1e-3)


def test_the_error_of_each_width_of_inputs_is_that_of_outputs_of_rounded_inputs():
    """A Conv's patches, [k, k, C] flattened, are rounded as one token."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((3, 3, 4, 6)).astype(np.float32), rng.standard_normal((100, 36)).astype(np.float32)
    got = input_error_by_width(w, x, QuantSpec(4, group_size=12))
    flat = w.reshape(36, 6)
    for bits, error in zip(WIDTHS, got):
        lost = np.asarray(fake_quantize(x, QuantSpec(bits, group_size=12))) @ flat - x @ flat
        np.testing.assert_allclose(error, np.square(lost).sum() / np.square(x @ flat).sum(), rtol=1e-3)


def test_a_target_for_inputs_is_their_mean_over_multiplications():
    """A layer that few tokens enter has many bits for little; one that is given its bits keeps them."""
    rng = np.random.default_rng(0)
    flat = {f"{name}/kernel": rng.standard_normal((64, 32)).astype(np.float32) for name in "abc"}
    tokens = rng.standard_normal((100, 64)).astype(np.float32)
    counts = dict(zip("abc", (1000.0, 1000.0, 10.0)))
    stats = {name: Stats(None, None, None, None, tokens, np.float32(count)) for name, count in counts.items()}
    config = QuantConfig(calib=CalibConfig("photos"), ipts=InputsConfig("uint4", bits={"b": 3}, target_bits=4.0))
    got = choose_input_bits(config, flat, stats).ipts
    assert (got.bits, got.target_bits) == ({"a": 4, "b": 3, "c": 8}, None)  # with 5 bits for a, the mean were 4.02
    specs = activation_specs(got, "abc")
    assert {name: spec.bits for name, spec in specs.items()} == got.bits


def test_inputs_that_are_always_0_lose_nothing_and_those_that_are_not_finite_are_an_error():
    flat = {f"{name}/kernel": np.ones((8, 4), np.float32) for name in "ab"}
    stats = lambda value: Stats(None, None, None, None, np.full((5, 8), value, np.float32), np.float32(5))
    random = Stats(None, None, None, None, np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32), 5)
    config = QuantConfig(calib=CalibConfig("photos"), ipts=InputsConfig("uint4", target_bits=4.0))
    assert choose_input_bits(config, flat, {"a": stats(0), "b": random}).ipts.bits == {"a": 2, "b": 6}
    with pytest.raises(ValueError, match="^a: the weight or its inputs hold NaN or infinity"):
        choose_input_bits(config, flat, {"a": stats(np.nan), "b": random})


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [("a", (8, 4), 320), ("conv", (3, 3, 8, 4), 2880), ("dwconv", (7, 7, 1, 64), 490)],
)
def test_multiplications_are_those_of_every_token_with_every_weight_that_it_meets(layer, shape, expected):
    """10 tokens. Those of a depthwise Conv are of one channel each."""
    assert multiplications(layer, shape, Stats(None, None, None, count=np.float32(10))) == expected


def test_a_target_becomes_bits_of_layers_that_keep_it():
    """Fixed bits stay; those of the others are what is left of 4.5 bits a weight, or of a package's megabytes."""
    rng = np.random.default_rng(0)
    flat = {f"{name}/kernel": rng.standard_normal((64, 32)).astype(np.float32) * 10**i for i, name in enumerate("abcd")}
    flat["a/bias"] = np.zeros(32, np.float32)
    stats = {name: Stats(None, None, None, np.eye(64, dtype=np.float32)) for name in "abcd"}
    got = choose_bits(WeightsConfig(dtype="sint4", bits={"b": 8}, target_bits=4.5), flat, stats)
    assert got.bits["b"] == 8
    assert not got.mixed
    assert 4.2 < np.mean(list(got.bits.values())) <= 4.5
    size = lambda bits: (sum(bits.values()) * 64 * 32 + 4 * 32 * 32 + 32 * 32) / 8e6
    for target in (0.005, 0.006):
        got = choose_bits(WeightsConfig(dtype="sint4", target_mb=target), flat, stats)
        assert target - 3e-4 < size(got.bits) <= target
    with pytest.raises(ValueError, match="out of reach"):
        choose_bits(WeightsConfig(dtype="sint4", target_mb=0.001), flat, stats)


def test_layers_that_change_the_masks_more_get_more_bits():
    """Each bit divides a change by 4 or more, so a change 4^6 times as large is worth the widest grid."""
    flat = {f"{name}/kernel": np.ones((64, 32), np.float32) for name in "abcd"}
    config = WeightsConfig(dtype="uint2", bits={"d": 3}, bits_by="masks", target_bits=4.0)
    got = choose_bits(config, flat, {}, {"a": 0.0, "b": 1.0, "c": 4.0**6, "d": 4.0**9}).bits
    assert got["a"] == 2
    assert got["a"] < got["b"] < got["c"]
    assert got["d"] == 3
    assert sum(got.values()) <= 16


def test_what_a_target_compares_is_one_of_two():
    with pytest.raises(ValueError, match="bits_by 'mask'"):
        WeightsConfig(bits_by="mask")

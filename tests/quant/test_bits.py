import itertools

import numpy as np
import pytest

from sam2jq.quant.bits import assign_bits


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
    with pytest.raises(ValueError, match=r"out of reach: 2.00 bits per weight are the least"):
        assign_bits(errors, sizes, 1.9 * sum(sizes.values()))

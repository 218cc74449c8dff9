"""How many bits each layer gets, so that all of them together err least within a budget."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.fake_quant import to_fake_quant
from sam2jq.quant.error import output_error
from sam2jq.quant.leaves import materialize
from sam2jq.quant.spec import QuantSpec

Array = jax.Array
WIDTHS = tuple(range(2, 9))


@partial(jax.jit, static_argnames="spec")
def error_by_width(w: Array, gram: Array, spec: QuantSpec) -> Array:
    """[7]: the square error of the outputs of `w` [*reduce, out] with 2..8 bits, relative to that of the outputs."""
    return by_width(w, spec, lambda m: output_error(m.reshape(len(gram), -1), gram).sum())


@partial(jax.jit, static_argnames="spec")
def input_error_by_width(w: Array, tokens: Array, spec: QuantSpec) -> Array:
    """[7]: the same with inputs `tokens` [T, K] of 2..8 bits under `w` as it is; the patch of a Conv is one token."""
    flat = w.reshape(tokens.shape[1], -1)
    return by_width(tokens.T, spec, lambda columns: jnp.square(columns.T @ flat).sum())


def by_width(x: Array, spec: QuantSpec, energy: Callable[[Array], Array]) -> Array:
    """[7]: the energy of what x [*reduce, out] loses with 2..8 bits, relative to its own; 0 where that is 0."""
    grids = to_fake_quant(x, spec)  # whose bits are data: one product to compile, not seven
    lost = lambda bits: materialize(replace(grids, bits=bits)) - x
    whole = energy(x)
    return jax.lax.map(lambda bits: energy(lost(bits)), jnp.array(WIDTHS, jnp.float32)) / jnp.where(whole, whole, 1)


def assign_bits(errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, float], budget: float) -> dict[str, int]:
    """{layer: bits} with sum(costs * bits) <= budget and a sum of errors that is least or next to it.

    errors: {layer: {bits: error}}; costs: of one bit, such as the number of weights. For a price per bit every layer
    takes the width whose error + price is least (Everett 1963); the price falls until the budget is spent, and what is
    left over buys the best single steps. Never worse than one width for all layers.
    """
    layers, widths = list(errors), sorted({bits for of in errors.values() for bits in of})
    cost = np.array([[costs[layer] * bits for bits in widths] for layer in layers], float)
    error = np.array([[errors[layer][bits] for bits in widths] for layer in layers])
    rows = np.arange(len(layers))
    spent = lambda choice: cost[rows, choice].sum()
    if spent(np.zeros_like(rows)) > budget:
        least = spent(np.zeros_like(rows)) / sum(costs.values())
        raise UserError(f"a budget of {budget:.0f} bits is out of reach: {least:.2f} on average are the least")
    best = np.full_like(rows, max(i for i in range(len(widths)) if spent(np.full_like(rows, i)) <= budget))
    for price in np.geomspace(1e12, 1e-12, 400) / sum(costs.values()):
        choice = greedy_fill(np.argmin(error + price * cost, axis=1), cost, error, budget)
        if spent(choice) <= budget and error[rows, choice].sum() <= error[rows, best].sum():
            best = choice
    return {layer: widths[i] for layer, i in zip(layers, best)}


def greedy_fill(choice: np.ndarray, cost: np.ndarray, error: np.ndarray, budget: float) -> np.ndarray:
    """`choice` with single steps to more bits while the budget lasts, the most error per bit first."""
    rows, choice = np.arange(len(choice)), choice.copy()
    left = budget - cost[rows, choice].sum()
    while left > 0:
        more = np.minimum(choice + 1, cost.shape[1] - 1)
        price, gain = (table[rows, more] - table[rows, choice] for table in (cost, -error))
        worth = np.where((price > 0) & (price <= left) & (gain > 0), gain / np.maximum(price, 1), 0)
        if not worth.any():
            break
        row = worth.argmax()
        choice[row], left = more[row], left - price[row]
    return choice

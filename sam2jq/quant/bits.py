"""How many bits each layer gets, so that all of them together err least within a budget."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import output_error

Array = jax.Array
WIDTHS = tuple(range(2, 9))


@partial(jax.jit, static_argnames="spec")
def error_by_width(w: Array, gram: Array, spec: QuantSpec) -> Array:
    """[7]: the square error of the outputs of `w` [*reduce, out] with 2..8 bits, relative to that of the outputs."""
    lost = lambda bits: dequantize(quantize(w, replace(spec, bits=bits))) - w
    energy = lambda m: output_error(m.reshape(len(gram), -1), gram).sum()
    return jnp.stack([energy(lost(bits)) for bits in WIDTHS]) / energy(w)


def assign_bits(errors: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], budget: float) -> dict[str, int]:
    """{layer: bits} with sum(weights * bits) <= budget and a sum of errors that is least or next to it.

    errors: {layer: {bits: error}}. For a price per bit every layer takes the width whose error + price is least
    (Everett 1963); the price falls until the budget is spent, and what is left over buys the best single steps. Never
    worse than one width for all layers.
    """
    layers, widths = list(errors), sorted({bits for of in errors.values() for bits in of})
    cost = np.array([[weights[layer] * bits for bits in widths] for layer in layers], float)
    error = np.array([[errors[layer][bits] for bits in widths] for layer in layers])
    rows = np.arange(len(layers))
    spent = lambda choice: cost[rows, choice].sum()
    if spent(np.zeros_like(rows)) > budget:
        least = spent(np.zeros_like(rows)) / sum(weights.values())
        raise ValueError(f"a budget of {budget:.0f} bits is out of reach: {least:.2f} bits per weight are the least")
    best = np.full_like(rows, max(i for i in range(len(widths)) if spent(np.full_like(rows, i)) <= budget))
    for price in np.geomspace(1e12, 1e-12, 400) / sum(weights.values()):
        choice = fill(np.argmin(error + price * cost, axis=1), cost, error, budget)
        if spent(choice) <= budget and error[rows, choice].sum() <= error[rows, best].sum():
            best = choice
    return {layer: widths[i] for layer, i in zip(layers, best)}


def fill(choice: np.ndarray, cost: np.ndarray, error: np.ndarray, budget: float) -> np.ndarray:
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

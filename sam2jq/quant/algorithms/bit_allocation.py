"""Bit allocation: the bits of each layer that give the least total error within a budget."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.error import output_error
from sam2jq.quant.exact import matmul
from sam2jq.quant.padding import pad_axes, pad_kernel
from sam2jq.quant.qtensor import dequantize, join_bits, quantize, split_bits
from sam2jq.quant.spec import QuantSpec

Array = jax.Array
WIDTHS = tuple(range(2, 9))


def error_by_width(w: Array, gram: Array, spec: QuantSpec) -> Array:
    """[7]: the squared output error of `w` [*reduce, out] rounded to 2..8 bits, relative to the squared outputs.

    gram: the Gram matrix [K, K] of the inputs.
    """
    spec, _ = split_bits(spec)
    return _error_by_width(pad_kernel(w, len(gram)), pad_axes(gram, 0, 1), spec)


def input_error_by_width(w: Array, tokens: Array, spec: QuantSpec) -> Array:
    """[7]: the same for inputs `tokens` [T, K] rounded to 2..8 bits; `w` is unrounded, a Conv's patch is one token."""
    spec, _ = split_bits(spec)
    return _input_error_by_width(pad_kernel(w, tokens.shape[1]), pad_axes(tokens, 1), spec)


@partial(jax.jit, static_argnames="spec")
def _error_by_width(w: Array, gram: Array, spec: QuantSpec) -> Array:
    return by_width(w, spec, lambda m: output_error(m, gram).sum())


@partial(jax.jit, static_argnames="spec")
def _input_error_by_width(w: Array, tokens: Array, spec: QuantSpec) -> Array:
    return by_width(tokens.T, spec, lambda columns: jnp.square(matmul(columns.T, w)).sum())


def by_width(x: Array, spec: QuantSpec, energy: Callable[[Array], Array]) -> Array:
    """[7]: energy(rounded x - x) for x [K, out] in 2..8 bits, relative to energy(x); 0 where that is 0."""
    rounding_error = lambda bits: dequantize(quantize(x, join_bits(spec, bits))) - x
    total = energy(x)
    return jax.lax.map(lambda bits: energy(rounding_error(bits)), jnp.array(WIDTHS, jnp.float32)) / jnp.where(
        total, total, 1
    )


def assign_bits(errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, float], budget: float) -> dict[str, int]:
    """{layer: bits} with sum(costs * bits) <= budget and a sum of errors that is least or close to it.

    errors: {layer: {bits: error}}; costs: {layer: cost of one bit}, such as the number of weights. For a price per bit,
    each layer takes the width of least error + price * cost (Lagrange multipliers, Everett 1963). The price falls until
    the budget is spent; `greedy_fill` spends the rest. The result is never worse than one width for all layers.

    Raises UserError if the narrowest width of all layers exceeds the budget.
    """
    layers, widths = list(errors), sorted({bits for row in errors.values() for bits in row})
    cost = np.array([[costs[layer] * bits for bits in widths] for layer in layers], float)
    error = np.array([[errors[layer][bits] for bits in widths] for layer in layers])
    rows = np.arange(len(layers))
    spent = lambda choice: cost[rows, choice].sum()
    if spent(np.zeros_like(rows)) > budget:
        least = spent(np.zeros_like(rows)) / sum(costs.values())
        raise UserError(f"a budget of {budget:.0f} bits is out of reach: the least is {least:.2f} bits on average")
    best = np.full_like(rows, max(i for i in range(len(widths)) if spent(np.full_like(rows, i)) <= budget))
    for price in np.geomspace(1e12, 1e-12, 400) / sum(costs.values()):
        choice = greedy_fill(np.argmin(error + price * cost, axis=1), cost, error, budget)
        if spent(choice) <= budget and error[rows, choice].sum() <= error[rows, best].sum():
            best = choice
    return {layer: widths[i] for layer, i in zip(layers, best)}


def greedy_fill(choice: np.ndarray, cost: np.ndarray, error: np.ndarray, budget: float) -> np.ndarray:
    """`choice` with single steps to the next width while the budget lasts, largest error reduction per bit first."""
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

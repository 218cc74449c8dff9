"""What enters a layer, folded into sums of fixed size call by call, so that calibration takes any number of images.

Letters: n tokens of one call, K inputs, T sampled tokens. Each fold is (state so far or None, x [n, K] and real [n]) ->
state; tokens that are not real, such as the padding of windows, do not count; None: all are. States start from zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
TokensAndMask = tuple[Array, Array | None]
TOKENS = 512
FIRST_DRAWS = np.random.default_rng(0).integers(2**32, size=(2, TOKENS), dtype=np.uint32)


class Range(NamedTuple):
    """count: tokens seen; total, low, high: [K], low and high of all tokens and 0."""

    count: Array
    total: Array
    low: Array
    high: Array


class Sample(NamedTuple):
    """Each of the T tokens [T, K] is one of the `count` seen so far, any as likely as any other.

    draws: uint32 [2, T], two linear congruential generators a slot; a better one takes minutes to compile in all the
    places where layers are called.
    """

    count: Array
    tokens: Array
    draws: Array


def fold_range(state: Range | None, tokens_and_mask: TokensAndMask) -> Range:
    x, number = mask_tokens(tokens_and_mask)
    state = state or Range(*jnp.zeros((1,)), *jnp.zeros((3, x.shape[1])))
    low, high = jnp.minimum(state.low, x.min(0)), jnp.maximum(state.high, x.max(0))
    return Range(state.count + number, state.total + x.sum(0), low, high)


def fold_gram(state: Array | None, tokens_and_mask: TokensAndMask) -> Array:
    """[K, K]: the sum of x^T x."""
    x, _ = mask_tokens(tokens_and_mask)
    return (0 if state is None else state) + x.T @ x


def fold_tokens(state: Sample | None, tokens_and_mask: TokensAndMask) -> Sample:
    """Every slot of the sample goes on by itself: it takes a token of this call with the chance that it should."""
    x, mask = tokens_and_mask
    state = state or Sample(*jnp.zeros((1,)), jnp.zeros((TOKENS, x.shape[1])), jnp.zeros((2, TOKENS), jnp.uint32))
    draws = jnp.where(state.count == 0, FIRST_DRAWS, state.draws) * jnp.uint32(1664525) + jnp.uint32(1013904223)
    which, chance = (draws >> 8) / 2**24
    if mask is None:
        number, drawn = len(x), (which * len(x)).astype(int)
    else:
        number = mask.sum()
        drawn = jnp.searchsorted(jnp.cumsum(mask), which * number, side="right", method="compare_all")
    count = state.count + number
    return Sample(count, jnp.where((chance * count < number)[:, None], x[drawn], state.tokens), draws)


def mask_tokens(tokens_and_mask: TokensAndMask) -> tuple[Array, Array | int]:
    """x with zeros for the tokens that do not count, and the number of those that do."""
    x, mask = tokens_and_mask
    return (x, len(x)) if mask is None else (jnp.where(mask[:, None], x, 0), mask.sum())


FOLDS = {"range": fold_range, "gram": fold_gram, "tokens": fold_tokens}

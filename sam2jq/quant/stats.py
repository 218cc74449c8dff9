"""Statistics of a layer's inputs, accumulated call by call in arrays of fixed size.

Calibration takes any number of images, since the memory for statistics does not grow with them.

Letters: n tokens of one call, K inputs of a layer, T sampled tokens, D devices. Each fold is a function (state or None,
(x [n, K], mask bool [n] or None)) -> state. Tokens outside the mask, such as the padding of windows, are not counted.
Each merge is a function (state, own state of each device, name of the mesh axis) -> state, for use in `shard_map`: the
state of all calls, the same on every device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.quant.exact import matmul

Array = jax.Array
TokensAndMask = tuple[Array, Array | None]
TOKENS = 512  # T, the size of the sample
FIRST_DRAWS = np.random.default_rng(0).integers(2**32, size=(2, TOKENS), dtype=np.uint32)
FIRST_MERGE_DRAWS = np.random.default_rng(1).integers(2**32, size=(2, TOKENS), dtype=np.uint32)


class Stats(NamedTuple):
    """Statistics of the inputs x [tokens, K] of one layer. Fields that no transform needs are None.

    The tokens of a Conv are the patches under its kernel; those of a grouped Conv are the patches of all groups.
    """

    mean: Array  # [K]
    low: Array  # [K] minimum of all tokens and 0
    high: Array  # [K] maximum of all tokens and 0
    gram: Array | None = None  # [K, K]: x^T x / tokens
    tokens: Array | None = None  # [T, K]: a uniform sample of all tokens
    count: Array | None = None  # []: number of tokens

    def scaled(self, factor: Array) -> "Stats":
        """The statistics of x * factor, for factors [K] > 0."""
        gram = None if self.gram is None else self.gram * factor[:, None] * factor
        tokens = None if self.tokens is None else self.tokens * factor
        return Stats(self.mean * factor, self.low * factor, self.high * factor, gram, tokens, self.count)

    def rotated(self, rotate: Callable[[Array], Array]) -> "Stats":
        """The statistics of rotate(x), a linear function of rows [..., K]. The range is that of the sampled tokens."""
        gram = None if self.gram is None else rotate(rotate(self.gram).T).T
        tokens = None if self.tokens is None else rotate(self.tokens)
        low, high = (self.low, self.high) if tokens is None else (tokens.min(0), tokens.max(0))
        return Stats(rotate(self.mean), low, high, gram, tokens, self.count)


class Range(NamedTuple):
    """The state of `fold_range`: count [], and total, low, high [K]; low and high include 0."""

    count: Array
    total: Array
    low: Array
    high: Array


class Sample(NamedTuple):
    """The state of `fold_tokens`: each of tokens [T, K] is one of the `count` so far, all with equal probability.

    draws: uint32 [2, T], two linear congruential generators per slot. A better generator takes minutes to compile,
    since every layer has its own copy.
    """

    count: Array
    tokens: Array
    draws: Array


def fold_range(state: Range | None, tokens_and_mask: TokensAndMask) -> Range:
    """`state` with the count, sum, minimum and maximum of one more call."""
    x, number = mask_tokens(tokens_and_mask)
    state = state or Range(*jnp.zeros((1,)), *jnp.zeros((3, x.shape[1])))
    low, high = jnp.minimum(state.low, x.min(0)), jnp.maximum(state.high, x.max(0))
    return Range(state.count + number, state.total + x.sum(0), low, high)


def fold_gram(state: Array | None, tokens_and_mask: TokensAndMask) -> Array:
    """[K, K]: the sum of x^T x over all calls."""
    x, _ = mask_tokens(tokens_and_mask)
    return (0 if state is None else state) + matmul(x.T, x)


def fold_tokens(state: Sample | None, tokens_and_mask: TokensAndMask) -> Sample:
    """`state` after one more call: each slot takes one of its tokens with probability n / count."""
    x, mask = tokens_and_mask
    state = state or Sample(*jnp.zeros((1,)), jnp.zeros((TOKENS, x.shape[1])), jnp.zeros((2, TOKENS), jnp.uint32))
    draws = next_draws(jnp.where(state.count == 0, FIRST_DRAWS, state.draws))
    which, chance = (draws >> 8) / 2**24
    if mask is None:
        number, drawn = len(x), (which * len(x)).astype(int)
    else:
        number = mask.sum()
        drawn = jnp.searchsorted(jnp.cumsum(mask), which * number, side="right", method="compare_all")
    count = state.count + number
    return Sample(count, jnp.where((chance * count < number)[:, None], x[drawn], state.tokens), draws)


def next_draws(draws: Array) -> Array:
    """The numbers of linear congruential generators after `draws`, uint32 each."""
    return draws * jnp.uint32(1664525) + jnp.uint32(1013904223)


def mask_tokens(tokens_and_mask: TokensAndMask) -> tuple[Array, Array | int]:
    """x [n, K] with zeros for the tokens outside the mask, and the number of the tokens inside."""
    x, mask = tokens_and_mask
    return (x, len(x)) if mask is None else (jnp.where(mask[:, None], x, 0), mask.sum())


def merge_range(state: Range, own: Range, axis: str) -> Range:
    """`state` with the counts, sums, minima and maxima of all devices."""
    low, high = jnp.minimum(state.low, lax.pmin(own.low, axis)), jnp.maximum(state.high, lax.pmax(own.high, axis))
    return Range(state.count + lax.psum(own.count, axis), state.total + lax.psum(own.total, axis), low, high)


def merge_gram(state: Array, own: Array, axis: str) -> Array:
    """`state` with the Gram matrices of all devices added."""
    return state + lax.psum(own, axis)


def merge_tokens(state: Sample, own: Sample, axis: str) -> Sample:
    """Each slot keeps its token or takes that of one device; the probability of each is its share of all tokens.

    The draws are not those of `fold_tokens`, with which every own state begins: a slot must not take a device's token
    because of the draw that chose this token.
    """
    draws = next_draws(jnp.where(state.count == 0, FIRST_MERGE_DRAWS, state.draws))
    ends = jnp.cumsum(jnp.append(state.count, lax.all_gather(own.count, axis)))  # [1 + D]
    taken = ((draws[1] >> 8) / 2**24 * ends[-1] >= ends[:, None]).sum(0)  # [T], 0 for the token in `state`
    is_own = taken == 1 + lax.axis_index(axis)
    found = lax.psum(jnp.where(is_own[:, None], own.tokens, 0), axis)
    return Sample(ends[-1], jnp.where((taken == 0)[:, None], state.tokens, found), draws)


FOLDS = {"range": fold_range, "gram": fold_gram, "tokens": fold_tokens}
MERGES = {"range": merge_range, "gram": merge_gram, "tokens": merge_tokens}

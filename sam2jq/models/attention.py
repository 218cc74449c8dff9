"""Scaled dot-product attention in chunks of queries and blocks of keys.

Letters: B batch, N queries, M keys, C channels of a head's queries and keys, Cv of its values.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sam2jq.models.chunking import chunked_map, cpu_chunk_rows, largest_divisor

Array = jax.Array
product = partial(jnp.matmul, preferred_element_type=jnp.float32)  # of any dtype, summed and kept in float32
MASKED = -1e9  # added to the score of a masked key
QUERY_CHUNK = 1024  # rows of a score matrix
KEY_BLOCK = 512  # columns of a score matrix
WIDE_KEY_BLOCK = 2048  # the same on an accelerator where no key is masked: fewer passes over what was summed so far


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """softmax(q kT / sqrt(C)) v, [B, N, heads, Cv], for q, k [B, N or M, heads, C] and v [B, M, heads, Cv].

    key_mask: bool [B, M], False where a key is ignored; None uses all keys. The softmax is in float32. A score matrix
    [N, M] of more than QUERY_CHUNK * KEY_BLOCK entries is computed in parts of this size, so that it is never in memory
    as a whole, nor stored for the gradient.
    """
    batch, length, heads, channels = q.shape
    scale = channels**-0.5
    if q.dtype == jnp.float32:  # cheaper than scaling the scores, but in fewer bits it would round q once more
        q, scale = q * scale, 1.0
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, N or M, C] for batched products
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, MASKED)
    if length * k.shape[2] <= QUERY_CHUNK * KEY_BLOCK:
        return softmax_attention(q, k, v, None if bias is None else bias[:, None, None], scale).swapaxes(1, 2)
    flat = tuple(x.reshape(batch * heads, *x.shape[2:]) for x in (q, k, v))
    flat += (None if bias is None else jnp.repeat(bias, heads, axis=0),)
    one_head = lambda arrays: blocked_attention(*arrays, scale, KEY_BLOCK)
    # on a CPU as many heads at a time as their scores fit in the caches
    together = min(batch * heads, cpu_chunk_rows(QUERY_CHUNK * min(k.shape[2], KEY_BLOCK)))
    one_at_a_time = partial(jax.lax.map, one_head)
    some_at_a_time = one_at_a_time if together == 1 else partial(jax.lax.map, one_head, batch_size=together)
    all_at_once = jax.vmap(lambda arrays: blocked_attention(*arrays, scale, WIDE_KEY_BLOCK))
    if bias is not None:  # without a batch axis, so that `lax.cond` can skip
        y = one_at_a_time(flat)
    else:
        y = jax.lax.platform_dependent(flat, cpu=some_at_a_time, default=all_at_once)
    return y.reshape(batch, heads, length, -1).swapaxes(1, 2)


def scores_of(q: Array, k: Array, bias: Array | None, scale: float) -> Array:
    """scale q kT + bias, float32 [..., N, M]."""
    scores = product(q, k.swapaxes(-1, -2)) * scale
    return scores if bias is None else scores + bias


def softmax_attention(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """softmax(scale q kT + bias) v, [..., N, Cv].

    Dividing the output [N, Cv] instead of the scores [N, M] saves one pass over the scores.
    """
    scores = scores_of(q, k, bias, scale)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # it cancels, so its gradient is zero
    scores = jnp.exp(scores - top)
    sums = scores.sum(-1, keepdims=True)
    return (product(scores.astype(v.dtype), v) / sums).astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blocked_attention(q: Array, k: Array, v: Array, bias: Array | None, scale: float, key_block: int) -> Array:
    """softmax(scale q kT + bias) v of one head, [N, Cv], for q [N, C], k [M, C], v [M, Cv] and bias [M]."""
    return _blocked_attention_forward(q, k, v, bias, scale, key_block)[0]


def _blocked_attention_forward(q: Array, k: Array, v: Array, bias: Array | None, scale: float, key_block: int):
    y, log_sums = chunked_map(lambda rows: online_softmax(rows, k, v, bias, scale, key_block), q, QUERY_CHUNK)
    return y, (q, k, v, bias, y, log_sums)


def online_softmax(
    q: Array, k: Array, v: Array, bias: Array | None, scale: float, key_block: int
) -> tuple[Array, Array]:
    """softmax(scale q kT + bias) v, [N, Cv], and the logarithm of the softmax denominators, float32 [N, 1].

    One pass over blocks of keys with the highest score so far (arXiv 1805.02867). A block is not computed if all of its
    keys are masked.
    """

    def add(state: tuple[Array, Array, Array], k: Array, v: Array, bias: Array | None):
        top, sums, y = state
        scores = scores_of(q, k, bias, scale)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        y = y * rescale + product(weights.astype(v.dtype), v)
        return new_top, sums * rescale + weights.sum(-1, keepdims=True), y

    def step(state, block):
        if bias is None:
            return add(state, *block, None), None
        return jax.lax.cond((block[2] > MASKED).any(), lambda: add(state, *block), lambda: state), None

    arrays = (k, v) if bias is None else (k, v, bias)
    whole = len(k) // key_block * key_block
    column = jnp.full((len(q), 1), 2 * MASKED, jnp.float32)  # below the score of a masked key
    state = column, jnp.zeros_like(column), jnp.zeros((len(q), v.shape[-1]), jnp.float32)
    state, _ = jax.lax.scan(step, state, tuple(x[:whole].reshape(-1, key_block, *x.shape[1:]) for x in arrays))
    if whole < len(k):
        state, _ = step(state, tuple(x[whole:] for x in arrays))
    top, sums, y = state
    return (y / sums).astype(v.dtype), top + jnp.log(sums)


def _blocked_attention_backward(scale: float, key_block: int, residuals, dy: Array):
    """Computes the scores again, chunk by chunk (as in FlashAttention, arXiv 2205.14135)."""
    q, k, v, bias, y, log_sums = residuals
    rows = largest_divisor(len(q), QUERY_CHUNK)
    chunked = lambda x: x.reshape(-1, rows, x.shape[-1])

    def chunk(sums, part):
        (dk, dv), (q, y, log_sums, dy) = sums, part
        weights = jnp.exp(scores_of(q, k, bias, scale) - log_sums)
        dscores = (product(dy, v.T) - (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)) * weights
        weights, dscores = weights.astype(v.dtype), (dscores * scale).astype(k.dtype)
        return (dk + product(q.T, dscores), dv + product(dy.T, weights)), dscores @ k

    # accumulated transposed, to avoid transposing the scores
    zeros = jnp.zeros(k.T.shape, jnp.float32), jnp.zeros(v.T.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(chunk, zeros, tuple(map(chunked, (q, y, log_sums, dy))))
    dk, dv = dk.T.astype(k.dtype), dv.T.astype(v.dtype)
    return dq.reshape(q.shape), dk, dv, None if bias is None else jnp.zeros_like(bias)


blocked_attention.defvjp(_blocked_attention_forward, _blocked_attention_backward)

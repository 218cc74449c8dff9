"""Scaled dot-product attention in chunks of queries.

Letters: B batch, N queries, M keys, C channels of a head.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sam2jq.models.chunking import chunked_map, cpu_chunk_rows, largest_divisor

Array = jax.Array
MASKED = -1e9  # added to the score of a masked key
QUERY_CHUNK = 512  # query rows per score matrix


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """softmax(q kT / sqrt(C)) v, [B, N, heads, C], for q [B, N, heads, C] and k, v [B, M, heads, C].

    key_mask: bool [B, M], False where a key is ignored; None uses all keys. The softmax is in float32. More than
    QUERY_CHUNK queries run in chunks, so that a head's full score matrix [N, M] is never in memory, nor stored for
    the gradient.
    """
    batch, length, heads, channels = q.shape
    q, k, v = (x.swapaxes(1, 2) for x in (q * channels**-0.5, k, v))  # [B, heads, N or M, C] for batched products
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, MASKED)[:, None, None]
    if length <= QUERY_CHUNK:
        return softmax_attention(q, k, v, bias)[0].swapaxes(1, 2)
    flat = tuple(x.reshape(batch * heads, -1, channels) for x in (q, k, v))
    flat += (None if key_mask is None else jnp.repeat(bias[:, 0], heads, axis=0),)
    one_head = lambda arrays: chunked_softmax_attention(*arrays)
    batch_size = min(batch * heads, cpu_chunk_rows(QUERY_CHUNK * k.shape[2]))  # heads whose scores fit in the caches
    in_batches = partial(jax.lax.map, one_head, batch_size=batch_size)
    y = jax.lax.platform_dependent(flat, cpu=in_batches, default=jax.vmap(one_head))
    return y.reshape(batch, heads, length, channels).swapaxes(1, 2)


def softmax_attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> tuple[Array, Array]:
    """softmax(q kT + bias) v, [..., N, C], and the logarithm of the softmax denominators, [..., N, 1].

    Dividing the output [N, C] instead of the scores [N, M] saves one pass over the scores.
    """
    scores = (q @ k.swapaxes(-1, -2)).astype(jnp.float32)
    scores = scores if bias is None else scores + bias
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # it cancels, so its gradient is zero
    scores = jnp.exp(scores - top)
    sums = scores.sum(-1, keepdims=True)
    return (scores.astype(v.dtype) @ v / sums).astype(v.dtype), top + jnp.log(sums)


@jax.custom_vjp
def chunked_softmax_attention(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """`softmax_attention` of one head, q [N, C], k, v [M, C], bias [1, M], for QUERY_CHUNK rows of q at a time."""
    return _chunked_attention_forward(q, k, v, bias)[0]


def _chunked_attention_forward(q: Array, k: Array, v: Array, bias: Array | None):
    y, log_sums = chunked_map(lambda rows: softmax_attention(rows, k, v, bias), q, QUERY_CHUNK)
    return y, (q, k, v, bias, y, log_sums)


def _chunked_attention_backward(residuals, dy: Array):
    """Computes the scores again, chunk by chunk (as in FlashAttention, arXiv 2205.14135)."""
    q, k, v, bias, y, log_sums = residuals
    rows = largest_divisor(len(q), QUERY_CHUNK)
    chunked = lambda x: x.reshape(-1, rows, x.shape[-1])

    def chunk(sums, part):
        (dk, dv), (q, y, log_sums, dy) = sums, part
        scores = (q @ k.T).astype(jnp.float32)
        scores = scores if bias is None else scores + bias
        weights = jnp.exp(scores - log_sums).astype(v.dtype)
        dscores = (dy @ v.T - (dy * y).sum(-1, keepdims=True)) * weights
        return (dk + q.T @ dscores, dv + dy.T @ weights), dscores @ k

    zeros = jnp.zeros_like(k.T), jnp.zeros_like(v.T)  # accumulated transposed, to avoid transposing the scores
    (dk, dv), dq = jax.lax.scan(chunk, zeros, tuple(map(chunked, (q, y, log_sums, dy))))
    return dq.reshape(q.shape), dk.T, dv.T, None if bias is None else jnp.zeros_like(bias)


chunked_softmax_attention.defvjp(_chunked_attention_forward, _chunked_attention_backward)

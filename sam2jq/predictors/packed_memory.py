"""Memories and object pointers of tracked clips in 8 or 4 bits.

A token x [C], a pointer or one position of a memory, becomes bytes: integer codes of `bits` bits, and a scale. They are
those of x, or of x h / sqrt(C) with a Hadamard matrix h, which spreads outliers over all channels, if its error is
smaller; then the scale is negative. The memory bank holds bytes in place of floats, and only `condition_on_memory`
reads them. Bytes of 0 are a token of zeros.
"""

import jax
import jax.numpy as jnp

from sam2jq.errors import UserError
from sam2jq.models.variants import MEMORY_BITS
from sam2jq.quant.algorithms.hadamard import fast_hadamard

Array = jax.Array
SCALE_BYTES = 2  # a bfloat16


def pack_tokens(x: Array, bits: int) -> Array:
    """uint8 [..., C * bits / 8 + SCALE_BYTES] of tokens [..., C]: 4-bit codes of the first half of the channels are the
    low halves of bytes, and the scale comes last."""
    x = x.astype(jnp.float32)
    plain, rotated = (round_tokens(each, bits) for each in (x, fast_hadamard(x)))
    better = rotated[2] < plain[2]
    codes, scale = jnp.where(better, rotated[0], plain[0]), jnp.where(better, -rotated[1], plain[1])
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if bits == 4:
        low, high = jnp.split(codes & 15, 2, axis=-1)
        codes = low | (high << 4)
    return jnp.concatenate([codes, jax.lax.bitcast_convert_type(scale[..., 0], jnp.uint8)], axis=-1)


def round_tokens(x: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes int8 [..., C], scale bfloat16 [..., 1] and squared error [..., 1] of tokens rounded to nearest."""
    most = 2 ** (bits - 1) - 1
    scale = (jnp.abs(x).max(-1, keepdims=True) / most).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)
    codes = jnp.round(x / jnp.where(step == 0, 1, step)).clip(-most, most)
    return codes.astype(jnp.int8), scale, jnp.square(codes * step - x).sum(-1, keepdims=True)


def unpack_tokens(packed: Array, channels: int) -> Array:
    """The tokens [..., channels] in float32 of `pack_tokens`; other arrays, which are no bytes, as they are."""
    if packed.dtype != jnp.uint8:
        return packed
    codes, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    packs_two = codes.shape[-1] < channels
    if packs_two:
        codes = jnp.concatenate([codes << 4, codes], axis=-1)  # the high half of a byte holds the code and its sign
    codes = jax.lax.bitcast_convert_type(codes, jnp.int8) >> (4 if packs_two else 0)
    scale = jax.lax.bitcast_convert_type(scale, jnp.bfloat16).astype(jnp.float32)[..., None]
    x = codes.astype(jnp.float32) * jnp.abs(scale)
    return jnp.where(scale < 0, fast_hadamard(x), x)


def check_memory_bits(bits: int | None) -> int | None:
    """`bits`. Raises UserError unless it is one of MEMORY_BITS, or None for memories as sam2 has them, in bfloat16."""
    if bits is not None and bits not in MEMORY_BITS:
        raise UserError(f"memory_bits {bits!r}: it must be 8, 4 or None, for bfloat16")
    return bits

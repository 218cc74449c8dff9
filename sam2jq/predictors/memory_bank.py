"""The memory bank of a tracked clip, and a frame's objects conditioned on it (SAM 2, arXiv 2408.00714, section 4).

Letters: B objects, K conditioning frames (those with a prompt), R non-conditioning entries, S the model's image side,
[h, w] its coarsest map, C and Cm the channels of pointers and memories. All functions are pure and may be traced.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.models.decoder import Decoded
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import SAM2, ObjectOutput
from sam2jq.models.variants import MEMORIES
from sam2jq.predictors.bank_arrays import EMPTY, FrameInfo, FrameOutput, MemoryBank, shift_bank
from sam2jq.predictors.packed_memory import pack_tokens, unpack_tokens

Array = jax.Array


def condition_on_memory(sam: SAM2, coarse: Array, bank: MemoryBank, info: FrameInfo) -> Array:
    """`coarse` [1 or B, h, w, C] of the frame `info` conditioned on the bank, [B, h, w, C].

    Pointers of later frames are ignored.
    """
    coarse = jnp.broadcast_to(coarse, (len(bank.cond_frames), *coarse.shape[1:]))
    slots = bank.non_cond_memory.shape[1]
    times = np.array([0] * bank.cond_frames.shape[1] + list(range(MEMORIES - 1, MEMORIES - 1 - slots, -1)))
    cond_ages, cond_valid = (info.frame - bank.cond_frames) * info.direction, bank.cond_frames != EMPTY
    ages = jnp.arange(1, bank.non_cond_valid.shape[1] + 1)
    pointer_valid = bank.non_cond_valid & (ages <= info.max_age)
    join = lambda *parts: jnp.concatenate(parts, axis=1)
    tokens = lambda channels, *parts: unpack_tokens(join(*parts), channels).astype(coarse.dtype)
    return sam.attend_memory(
        coarse,
        tokens(sam.variant.memory_features, bank.cond_memory, bank.non_cond_memory),
        times,
        tokens(sam.variant.features, bank.cond_pointer, bank.non_cond_pointer),
        join(cond_ages, jnp.broadcast_to(ages, pointer_valid.shape)) / info.max_age,
        join(cond_valid, bank.non_cond_valid[:, :slots], cond_valid & (cond_ages >= 0), pointer_valid),
    )


def update_memory_bank(bank: MemoryBank, output: FrameOutput, valid: Array) -> MemoryBank:
    """`shift_bank` of jax arrays."""
    return shift_bank(bank, output, valid, jnp.concatenate)


def track_objects_in_frame(
    sam: SAM2, features: list[Array], conditioned: Array, memory_bits: int | None = None
) -> tuple[FrameOutput, Decoded]:
    """B objects in a frame with feature maps [1, ...], and all masks of which the best was chosen.

    conditioned: [B, h, w, C] of `condition_on_memory`. memory_bits: as of `memorize`.
    """
    *fine, coarse = features
    padding_point = jnp.zeros((len(conditioned), 1, 2)), jnp.full((len(conditioned), 1), -1)
    decoded = sam.decode_masks([*fine, conditioned], padding_point, multimask=True)
    best, coarse = sam.select_best_mask(decoded), jnp.broadcast_to(coarse, conditioned.shape)
    return memorize(sam, coarse, best, memory_bits=memory_bits), decoded


def memorize(
    sam: SAM2,
    coarse: Array,
    output: ObjectOutput | FrameOutput,
    *,
    binarize: bool = False,
    memory_bits: int | None = None,
) -> FrameOutput:
    """`output` of B objects with its memory; coarse: the frame's map [B, h, w, C]; see `SAM2.encode_memory`.

    memory_bits: of the memory and the pointer; None for a memory in bfloat16, as in the original.
    """
    mask = resize(output.mask[..., None], (sam.variant.image_size,) * 2).astype(coarse.dtype)
    memory = sam.encode_memory(coarse, mask, output.object_score, binarize=binarize)
    if memory_bits is None:
        return FrameOutput(output.mask, output.pointer, output.object_score, memory.astype(jnp.bfloat16))
    packed = pack_tokens(output.pointer, memory_bits), output.object_score, pack_tokens(memory, memory_bits)
    return FrameOutput(output.mask, *packed)

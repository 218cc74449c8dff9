"""The arrays of the video predictors, of jax or of numpy: letters as in memory_bank.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any
EMPTY = -1  # frame number of an empty entry


class FrameOutput(NamedTuple):
    """The masks of B objects in one frame, and the memory of it."""

    mask: Array  # logits [B, S / 4, S / 4]
    pointer: Array  # [B, C]
    object_score: Array  # logits [B, 1]
    memory: Any  # bfloat16 [B, h, w, Cm], as in the original; None until it is encoded


class MemoryBank(NamedTuple):
    """The memories of B objects, in arrays whose shapes do not depend on how many frames were tracked.

    Entry i of the non-conditioning frames was i + 1 frames ago (is i + 1 frames ahead, in reverse). A bank for T
    frames with one conditioning frame needs only R = T - 2 entries; R = POINTERS is enough for any clip. Memories are
    kept for the newest R' = min(R, MEMORIES - 1) entries.
    """

    cond_frames: Array  # int32 [B, K] frame numbers, or EMPTY
    cond_memory: Array  # [B, K, h, w, Cm]
    cond_pointer: Array  # [B, K, C]
    non_cond_valid: Array  # bool [B, R], False at empty entries
    non_cond_memory: Array  # [B, R', h, w, Cm]
    non_cond_pointer: Array  # [B, R, C]


class FrameInfo(NamedTuple):
    """frame: its number; direction: 1, or -1 in reverse; max_age: frames after which a pointer is ignored."""

    frame: Array
    direction: Array
    max_age: Array


def shift_bank(bank: MemoryBank, output: FrameOutput, valid: Array, concatenate: Callable) -> MemoryBank:
    """The bank one frame later: `output` [B] becomes the newest non-conditioning entry, empty where not `valid` [B].

    concatenate: of the library that made the arrays, jax.numpy or numpy.
    """
    shift = lambda old, new: concatenate([new[:, None].astype(old.dtype), old[:, :-1]], axis=1)
    return bank._replace(
        non_cond_valid=shift(bank.non_cond_valid, valid),
        non_cond_memory=shift(bank.non_cond_memory, output.memory),
        non_cond_pointer=shift(bank.non_cond_pointer, output.pointer),
    )

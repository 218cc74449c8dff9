"""The compiled steps of the video predictor: one frame encoded, conditioned on memories, prompted, tracked, memorized.

Each is a program of its own, so that another number of objects or points compiles nothing of the image encoder.

Letters as in memory_bank.py: B objects, S the model's image side.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sam2jq.models.layers import resize
from sam2jq.models.sam2 import SAM2, ObjectOutput
from sam2jq.predictors.memory_bank import (
    FrameInfo,
    FrameOutput,
    MemoryBank,
    condition_on_memory,
    memorize,
    track_objects_in_frame,
    update_memory_bank,
)

Array = jax.Array


@partial(jax.jit, static_argnames="dtype")
def normalize_frame(image: Array, mean: Array, std: Array, dtype) -> Array:
    """A frame uint8 [1, S, S, 3] as the image encoder takes it: (image / 255 - mean) / std in float32, then `dtype`.

    Equal to the bit to numpy's. XLA divides by a broadcast number as a product with its reciprocal, which is rounded
    twice; the divisors below differ from pixel to pixel, as far as XLA can tell.
    """
    image = image.astype(jnp.float32)
    is_pixel = image >= 0
    return ((image / jnp.where(is_pixel, 255.0, 1.0) - mean) / jnp.where(is_pixel, std, 1.0)).astype(dtype)


@partial(jax.jit, static_argnames="model")
def encode_frame(model: SAM2, params: dict, image: Array) -> list[Array]:
    """The feature maps of one preprocessed image [1, S, S, 3]."""
    return model.apply({"params": params}, image, method="encode_image")


@partial(jax.jit, static_argnames="model")
def condition_frame(model: SAM2, params: dict, coarse: Array, bank: MemoryBank, info: FrameInfo) -> Array:
    """The coarsest map [1, h, w, C] of a frame conditioned on the memories of B objects, [B, h, w, C]."""
    return model.apply({"params": params}, coarse, bank, info, method=condition_on_memory)


@partial(jax.jit, static_argnames=("model", "memory_bits"))
def track_frame(
    model: SAM2,
    params: dict,
    features: list[Array],
    conditioned: Array,
    bank: MemoryBank,
    cond: FrameOutput,
    is_cond: Array,
    memory_bits: int | None = None,
) -> tuple[FrameOutput, MemoryBank]:
    """The objects in one frame of a clip, from its maps and `condition_frame`, and the bank for the next frame.

    Where `is_cond` [B], this is a conditioning frame of the object: its output is `cond`, which the bank holds already.
    """
    args = features, conditioned, memory_bits
    tracked, _ = model.apply({"params": params}, *args, method=track_objects_in_frame)
    select = lambda given, own: jnp.where(is_cond.reshape(-1, *[1] * (own.ndim - 1)), given, own)
    output = jax.tree.map(select, cond, tracked)
    return output, update_memory_bank(bank, output, ~is_cond)


@partial(jax.jit, static_argnames=("model", "multimask"))
def prompt_frame(
    model: SAM2,
    params: dict,
    features: list[Array],
    conditioned: Array | None,
    points: tuple[Array, Array],
    mask_input: Array | None,
    *,
    multimask: bool,
) -> FrameOutput:
    """An object from points on a frame, with its `condition_frame` if given; mask_input: earlier logits to refine."""

    def run(sam: SAM2):
        maps = sam.add_no_memory_embed(features) if conditioned is None else [*features[:-1], conditioned]
        return sam.decode_object(maps, points, mask_input, multimask=multimask)

    return to_frame_output(model.apply({"params": params}, method=run))


@partial(jax.jit, static_argnames="model")
def mask_frame(model: SAM2, params: dict, features: list[Array], mask: Array) -> FrameOutput:
    """An object from its mask [1, S, S, 1] of 0 and 1."""
    return to_frame_output(model.apply({"params": params}, features, mask, method="object_from_mask"))


def to_frame_output(output: ObjectOutput) -> FrameOutput:
    """`output` as a FrameOutput whose memory is not encoded yet."""
    return FrameOutput(output.mask, output.pointer, output.object_score, None)


@partial(jax.jit, static_argnames=("model", "memory_bits"))
def memorize_prompted(
    model: SAM2, params: dict, coarse: Array, output: FrameOutput, memory_bits: int | None = None
) -> FrameOutput:
    """`output` [1, ...] of a prompted frame with its memory, made from the thresholded mask."""
    settings = {"binarize": True, "memory_bits": memory_bits}
    return model.apply({"params": params}, coarse, output, method=memorize, **settings)


@partial(jax.jit, static_argnames=("size", "count", "antialias"))
def resize_maps(maps: Array, size: tuple[int, int], count: int | None, antialias: bool) -> Array:
    """The first `count` of maps [B, H, W], None for all -> [count, *size]."""
    return resize(maps[:count, ..., None], size, antialias=antialias)[..., 0]

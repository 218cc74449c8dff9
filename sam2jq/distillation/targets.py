"""What a student is trained to reproduce: the teacher's outputs for prompts on a clip.

Letters: T frames of a clip, S side of the image in pixels, P prompts, O tracked objects, M masks a prompt, h = S / 4,
C channels.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam2jq.data.prompts import boxes, random_points
from sam2jq.models.capture import OUTPUTS
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.tree import flatten

Array = jax.Array
AFFINITY_SIDE = 8  # affinities are between AFFINITY_SIDE x AFFINITY_SIDE cells of a feature map
LOGIT_LIMIT = 32  # mask logits are clipped to +-32 before they serve as a prompt, as in SAM 2


class Prompts(NamedTuple):
    """Prompts on frame 0, and the masks in frame 0 of the objects to track into the last frame. Positions in pixels."""

    clicks: Array  # [P, 2, 2]: two (x, y) an object
    labels: Array  # int32 [P, 2]: 1 foreground, 0 background
    boxes: Array  # [P, 2, 2]: two corners
    mask_inputs: Array  # logits [P, h, h, 1]
    memory_masks: Array  # logits [O, h, h, 1]


class ModelOutputs(NamedTuple):
    """What distillation compares; all float32."""

    features: list[Array]  # FPN maps [T, H, W, C] as the mask decoder gets them
    masks: Array  # logits [3P, M, h, h] for first clicks, boxes, and two clicks with a mask input
    ious: Array  # [3P, M], estimated
    scores: Array  # object score logits [3P, 1]
    tracked: tuple[Array, Array, Array]  # masks, ious and scores [O, ...] in the last frame
    pointers: Array  # object pointers [O, C]
    affinity: Array | None  # [stages, T, N, N]: cosines between N cells of each trunk stage's map
    moments: dict[str, tuple[Array, Array]]  # {layer: ([calls, C], [calls, C])}: mean and variance of its outputs


class DistillBatch(NamedTuple):
    """One example, or a batch of them with a leading axis. frames: float32 [T, S, S, 3], preprocessed; outputs: of the
    teacher."""

    frames: Array
    prompts: Prompts
    outputs: ModelOutputs


@partial(jax.jit, static_argnames=("model", "num_prompts", "num_objects", "dtype"))
def make_targets(
    model: SAM2,
    params: dict,
    frames: Array,
    key: Array,
    *,
    num_prompts: int = 8,
    num_objects: int = 2,
    dtype: str = "float32",
) -> DistillBatch:
    """The training example of a clip [T, S, S, 3]: random prompts and the teacher's outputs for them.

    Each of `num_prompts` random clicks gives a mask; the second click, the box and the mask input derive from that
    mask. `num_objects` of the masks, every second one by size, are tracked. dtype: of the teacher's computation; the
    outputs are float32.
    """
    params, size = materialize_weights(params), model.variant.image_size
    first_key, second_key, side_key = jax.random.split(key, 3)
    first_clicks = jax.random.uniform(first_key, (num_prompts, 1, 2), maxval=size - 1)
    low_precision = frames.astype(dtype)
    masks, ious = model.apply({"params": params}, low_precision[:1], first_clicks, method=decode_clicks)
    best = jnp.take_along_axis(masks, ious.argmax(-1)[:, None, None, None], 1)[:, 0]
    is_object = (best > 0).astype(jnp.float32)
    second_clicks, labels = second_click(is_object, second_key, side_key, size)
    mask_inputs = jnp.clip(best, -LOGIT_LIMIT, LOGIT_LIMIT)[..., None]
    tracked = jnp.argsort(-is_object.sum((1, 2)), stable=True)[: 2 * num_objects : 2]
    prompts = Prompts(
        jnp.concatenate([first_clicks, second_clicks], 1),
        jnp.stack([jnp.ones_like(labels), labels], 1),
        boxes(is_object > 0) * size / is_object.shape[-1],
        mask_inputs,
        mask_inputs[tracked],
    )
    return DistillBatch(frames, prompts, forward_with_capture(model, params, low_precision, prompts))


def second_click(is_object: Array, point_key: Array, side_key: Array, size: int) -> tuple[Array, Array]:
    """Clicks [P, 1, 2] in pixels, each inside or outside its mask [P, h, h] at random, and their labels [P]."""
    count, cells = is_object.shape[0], is_object.shape[-1]
    region = jnp.where(jax.random.bernoulli(side_key, 0.5, (count, 1, 1)), is_object, 1 - is_object)
    region = jnp.where(region.any((1, 2), keepdims=True), region, 1 - region)
    clicks = random_points(point_key, region, size)
    cell = jnp.clip((clicks[:, 0] + 0.5) * cells / size, 0, cells - 1).astype(int)
    return clicks, is_object[jnp.arange(count), cell[:, 1], cell[:, 0]].astype(jnp.int32)


def decode_clicks(sam: SAM2, frames: Array, clicks: Array) -> tuple[Array, Array]:
    """Logits [P, 3, h, h] and estimated IoUs [P, 3] of the three masks for clicks [P, 1, 2] on one frame; float32."""
    maps = sam.add_no_memory_embed(sam.encode_image(frames))
    decoded = sam.decode_masks(maps, (clicks, jnp.ones((len(clicks), 1), jnp.int32)), multimask=True)
    return decoded.masks.astype(jnp.float32), decoded.ious.astype(jnp.float32)


def forward_with_capture(
    model: SAM2, params: dict, frames: Array, prompts: Prompts, capture: bool = True
) -> ModelOutputs:
    """The outputs of a model, plain or fake-quantized, for `prompts`; computed in the dtype of `frames`.

    capture: also record affinities and the moments of each layer's outputs. This keeps layers from running in chunks
    and so takes more memory.
    """
    outputs, sown = model.apply(
        {"params": params}, frames, prompts, method=forward_all, mutable=[OUTPUTS] if capture else []
    )
    sown = flatten(sown.get(OUTPUTS, {}))
    moments = {
        path.removesuffix("/moments").replace("/", "."): tuple(map(jnp.stack, zip(*calls)))
        for path, calls in sown.items()
        if path.endswith("/moments")
    }
    stages = next((maps for path, maps in sown.items() if path.endswith("/stages")), [])
    return outputs._replace(moments=moments, affinity=jnp.stack([affinity(x) for x in stages]) if stages else None)


def forward_all(sam: SAM2, frames: Array, prompts: Prompts) -> ModelOutputs:
    """The outputs of every part of SAM 2, without moments and affinities.

    Memories are made of `prompts.memory_masks`, not of the model's own masks, so that teacher and student see the same
    inputs.
    """
    maps = sam.encode_image(frames)
    first_frame = sam.add_no_memory_embed([level[:1] for level in maps])
    decoded = sam.sam_mask_decoder.decode(first_frame, *embed_prompts(sam, prompts))
    tracked, pointers = track_into_last_frame(sam, maps, prompts.memory_masks)
    as_float32 = lambda out: tuple(x.astype(jnp.float32) for x in (out.masks, out.ious, out.object_scores))
    return ModelOutputs(
        [level.astype(jnp.float32) for level in maps],
        *as_float32(decoded),
        as_float32(tracked),
        pointers.astype(jnp.float32),
        None,
        {},
    )


def embed_prompts(sam: SAM2, prompts: Prompts) -> tuple[Array, Array, Array]:
    """Sparse embeddings, dense embeddings and position code of 3P prompts: first clicks, boxes, two clicks with a mask
    input."""
    count = len(prompts.clicks)
    padding = -jnp.ones((count, 1), jnp.int32)
    points = jnp.concatenate([prompts.clicks, prompts.boxes, prompts.clicks])
    corners = jnp.tile(jnp.array([[2, 3]]), (count, 1))
    labels = jnp.concatenate([jnp.concatenate([prompts.labels[:, :1], padding], 1), corners, prompts.labels])
    sparse, dense_mask, position = sam.sam_prompt_encoder((points, labels), prompts.mask_inputs)
    dense = jnp.broadcast_to(sam.sam_prompt_encoder(None, None)[1], (2 * count, *dense_mask.shape[1:]))
    return sparse, jnp.concatenate([dense, dense_mask]), position


def track_into_last_frame(sam: SAM2, maps: list[Array], memory_masks: Array):
    """The decoder's outputs for O objects in the last frame, given their masks in frame 0, and their pointers."""
    count, size, dtype = len(memory_masks), sam.variant.image_size, maps[-1].dtype
    frame = lambda t: [jnp.repeat(level[t][None], count, 0) for level in maps]
    masks = resize(memory_masks, (size, size)).astype(dtype)
    given = sam.object_from_mask(frame(0), (masks > 0).astype(dtype))
    memory = sam.encode_memory(frame(0)[-1], masks, given.object_score)
    *fine, coarse = frame(-1)
    pointers = given.pointer[:, None]
    coarse = sam.attend_memory(coarse, memory[:, None], jnp.zeros(1, int), pointers, jnp.ones((1, 1)))
    no_points = jnp.zeros((count, 1, 2)), -jnp.ones((count, 1), jnp.int32)
    return sam.decode_all_masks([*fine, coarse], no_points), given.pointer


def affinity(x: Array) -> Array:
    """[T, N, N]: cosines between the cells of maps [T, H, W, C], averaged to N = AFFINITY_SIDE ** 2 cells.

    Their shape does not depend on C, so maps of different widths can be compared.
    """
    x = resize(x.astype(jnp.float32), (AFFINITY_SIDE, AFFINITY_SIDE), antialias=True)
    x = x.reshape(len(x), AFFINITY_SIDE**2, -1)
    x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
    return x @ x.swapaxes(1, 2)

"""What a student learns from its teacher: answers to the same questions about the same frames, and losses on these.

Letters: T frames of a clip, S the image's side, P prompts, O objects followed, M masks a prompt, h = S / 4, C channels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam2jq.data.prompts import boxes, random_points
from sam2jq.models.capture import OUTPUTS
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.training.losses import soft_dice
from sam2jq.tree import flatten

Array = jax.Array
SIDE = 8  # affinities are between SIDE x SIDE places of a map
PARTS = ("layers", "affinity", "features", "masks", "ious", "memory")


class Prompts(NamedTuple):
    """What is asked of frame 0, and of the last frame about what was seen there: pixels, and logits of masks."""

    clicks: Array  # [P, 2, 2], two on each object
    labels: Array  # int32 [P, 2]
    boxes: Array  # [P, 2, 2]
    mask_inputs: Array  # [P, h, h, 1]
    memory_masks: Array  # [O, h, h, 1]


class ModelOutputs(NamedTuple):
    """features: FPN maps [T, H, W, C] as the decoder gets them; masks [3P, M, h, h], ious and object scores of clicks,
    boxes and clicks with hints; followed: masks, ious and scores [O, ...] in the last frame; pointers [O, C];
    affinity: [stage, T, N, N], cosines between N places; moments: {layer: [calls, 2, C]}, mean and variance of outputs.
    """

    features: list[Array]
    masks: Array
    ious: Array
    scores: Array
    followed: tuple[Array, Array, Array]
    pointers: Array
    affinity: Array
    moments: dict[str, Array]


class DistillBatch(NamedTuple):
    """frames: [T, S, S, 3], preprocessed."""

    frames: Array
    prompts: Prompts
    outputs: ModelOutputs


@partial(jax.jit, static_argnames=("model", "asked", "followed"))
def make_targets(
    model: SAM2, params: dict, frames: Array, key: Array, *, asked: int = 8, followed: int = 2
) -> DistillBatch:
    """The lesson on a clip [T, S, S, 3]: `asked` random clicks, and what the teacher makes of these asked again."""
    params, size = materialize_weights(params), model.variant.image_size
    places, again, inside = jax.random.split(key, 3)
    first = jax.random.uniform(places, (asked, 1, 2), maxval=size - 1)
    ask = partial(model.apply, {"params": params}, method=decode_clicks)
    masks, ious = ask(frames[:1], first)
    best = jnp.take_along_axis(masks, ious.argmax(-1)[:, None, None, None], 1)[:, 0]
    found = (best > 0).astype(jnp.float32)
    rim = jnp.where(jax.random.bernoulli(inside, 0.5, (asked, 1, 1)), found, 1 - found)
    rim = jnp.where(rim.any((1, 2), keepdims=True), rim, 1 - rim)
    second = random_points(again, rim, size)
    cell = jnp.clip((second[:, 0] + 0.5) * found.shape[-1] / size, 0, found.shape[-1] - 1).astype(int)
    label = found[jnp.arange(asked), cell[:, 1], cell[:, 0]].astype(jnp.int32)
    mask_inputs = jnp.clip(best, -32, 32)[..., None]
    largest = jnp.argsort(-found.sum((1, 2)), stable=True)[: 2 * followed : 2]
    prompts = Prompts(
        jnp.concatenate([first, second], 1),
        jnp.stack([jnp.ones_like(label), label], 1),
        boxes(found > 0) * size / found.shape[-1],
        mask_inputs,
        mask_inputs[largest],
    )
    return DistillBatch(frames, prompts, forward_with_capture(model, params, frames, prompts))


def decode_clicks(sam: SAM2, frames: Array, clicks: Array) -> tuple[Array, Array]:
    """Masks 1..3 of clicks [P, 1, 2] on one frame, and their estimated IoUs."""
    maps = sam.add_no_memory_embed(sam.encode_image(frames))
    decoded = sam.decode_masks(maps, (clicks, jnp.ones((len(clicks), 1), jnp.int32)), multimask=True)
    return decoded.masks.astype(jnp.float32), decoded.ious


def forward_with_capture(
    model: SAM2, params: dict, frames: Array, prompts: Prompts, capture: bool = True
) -> ModelOutputs:
    """What the model of `params`, plain or simulated, answers; watch: with what leaves each layer, which keeps layers
    from running in chunks and so takes more memory."""
    outputs, sown = model.apply(
        {"params": params}, frames, prompts, method=forward_all, mutable=[OUTPUTS] if capture else []
    )
    sown = flatten(sown.get(OUTPUTS, {}))
    moments = {
        path.removesuffix("/moments").replace("/", "."): jnp.stack(calls)
        for path, calls in sown.items()
        if path.endswith("/moments")
    }
    stages = next((maps for path, maps in sown.items() if path.endswith("/stages")), [])
    return outputs._replace(moments=moments, affinity=jnp.stack([affinity(x) for x in stages]) if stages else None)


def forward_all(sam: SAM2, frames: Array, prompts: Prompts) -> ModelOutputs:
    """Every part of SAM 2, run on the same inputs whatever the params: memories are of the masks that are known."""
    size, q = sam.variant.image_size, prompts
    maps = sam.encode_image(frames)
    *fine, coarse = maps
    first = sam.add_no_memory_embed([level[:1] for level in maps])
    many = len(q.clicks)
    nowhere = -jnp.ones((many, 1), jnp.int32)
    points = jnp.concatenate([q.clicks, q.boxes, q.clicks])
    labels = [jnp.concatenate([q.labels[:, :1], nowhere], 1), jnp.tile(jnp.array([[2, 3]]), (many, 1)), q.labels]
    sparse, hinted, position = sam.sam_prompt_encoder((points, jnp.concatenate(labels)), q.mask_inputs)
    plain = jnp.broadcast_to(sam.sam_prompt_encoder(None, None)[1], (2 * many, *hinted.shape[1:]))
    asked = sam.sam_mask_decoder.decode(first, sparse, jnp.concatenate([plain, hinted]), position)
    count = len(q.memory_masks)
    at = lambda t: [jnp.repeat(level[t][None], count, 0) for level in maps]
    masks = resize(q.memory_masks, (size, size)).astype(coarse.dtype)
    given = sam.object_from_mask(at(0), (masks > 0).astype(coarse.dtype))
    memory = sam.encode_memory(at(0)[-1], masks, given.object_score)
    *fine, now = at(-1)
    now = sam.attend_memory(now, memory[:, None], jnp.zeros(1, int), given.pointer[:, None], jnp.ones((1, 1)))
    empty = jnp.zeros((count, 1, 2)), -jnp.ones((count, 1), jnp.int32)
    later = sam.decode_all_masks([*fine, now], empty)
    single = lambda *arrays: tuple(x.astype(jnp.float32) for x in arrays)
    return ModelOutputs(
        [level.astype(jnp.float32) for level in maps],
        *single(asked.masks, asked.ious, asked.object_scores),
        single(later.masks, later.ious, later.object_scores),
        given.pointer.astype(jnp.float32),
        None,
        {},
    )


def affinity(x: Array) -> Array:
    """[T, N, N]: cosines between the places of maps [T, H, W, C], averaged to N = SIDE x SIDE; C does not matter."""
    x = resize(x.astype(jnp.float32), (SIDE, SIDE), antialias=True).reshape(len(x), SIDE**2, -1)
    x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
    return x @ x.swapaxes(1, 2)


def relative(got: Array, wanted: Array) -> Array:
    """[]: the square error of `got`, relative to the square of `wanted`."""
    return jnp.square(got - wanted).sum() / (jnp.square(wanted).sum() + 1e-12)


def moment_losses(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Array]:
    """{layer: []} of layers with the same calls and width in both: how far mean and deviation [calls, 2, C] of its
    outputs are off, relative to the teacher's root mean square, squared."""
    alike = [layer for layer in got if layer in wanted and got[layer].shape == wanted[layer].shape]
    parts = lambda moments: (moments[:, 0], jnp.sqrt(moments[:, 1] + 1e-12))

    def loss(layer: str) -> Array:
        (mean, deviation), (mean_, deviation_) = parts(got[layer]), parts(wanted[layer])
        energy = jnp.square(mean_) + jnp.square(deviation_)
        off = jnp.square(mean - mean_) + jnp.square(deviation - deviation_)
        return off.sum() / (energy.sum() + 1e-12)

    return {layer: loss(layer) for layer in alike}


def mask_distance(got: Array, wanted: Array) -> Array:
    """[]: of mask logits [..., h, h] from a teacher's: the Kullback-Leibler divergence of their pixels + soft Dice;
    0 where they are equal."""
    target = jax.nn.sigmoid(wanted)
    divergence = optax.sigmoid_binary_cross_entropy(got, target) - optax.sigmoid_binary_cross_entropy(wanted, target)
    return divergence.mean() + soft_dice(jax.nn.sigmoid(got), target).mean()


def distances(got: ModelOutputs, wanted: ModelOutputs) -> tuple[dict[str, Array], dict[str, Array]]:
    """Each of PARTS, and the loss of each layer that both have."""
    layers = moment_losses(got.moments, wanted.moments)
    features = sum(relative(a, b) for a, b in zip(got.features, wanted.features)) / len(got.features)
    followed = mask_distance(got.followed[0], wanted.followed[0])
    scores = lambda a, b: jnp.square(jax.nn.sigmoid(a) - jax.nn.sigmoid(b)).mean()
    parts = {
        "layers": sum(layers.values()) / max(len(layers), 1),
        "affinity": jnp.float32(0)
        if got.affinity is None or got.affinity.shape != wanted.affinity.shape
        else jnp.square(got.affinity - wanted.affinity).mean(),
        "features": features,
        "masks": mask_distance(got.masks, wanted.masks),
        "ious": jnp.square(got.ious - wanted.ious).mean() + scores(got.scores, wanted.scores),
        "memory": followed
        + jnp.square(got.followed[1] - wanted.followed[1]).mean()
        + scores(got.followed[2], wanted.followed[2])
        + relative(got.pointers, wanted.pointers),
    }
    return parts, layers


def distillation_loss(model: SAM2, weights: Mapping[str, float], dtype=jnp.float32, capture: bool = True) -> Callable:
    """loss(params, lessons [B, ...], key) -> the mean of sum(weights * parts), and {"parts", "layers"} of it.

    weights: {part of PARTS: factor}. Without `capture` layers and affinity are not looked at, and layers run in chunks.
    """

    def of_one(params: dict, example: DistillBatch):
        got = forward_with_capture(model, params, example.frames.astype(dtype), example.prompts, capture)
        return distances(got, example.outputs)

    def loss(params: dict, batch: DistillBatch, key: Array | None = None):
        parts, layers = jax.vmap(partial(of_one, materialize_weights(params)))(batch)
        parts, layers = jax.tree.map(jnp.mean, (parts, layers))
        return sum(weights[part] * parts[part] for part in PARTS), {"parts": parts, "layers": layers}

    return loss

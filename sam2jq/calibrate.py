"""Calibration: what enters every layer of SAM 2 while it segments and tracks, as sums of fixed size."""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data import prompts
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import MEMORIES, SAM2
from sam2jq.quant.observe import Range, Sample
from sam2jq.quant.transform import Stats
from sam2jq.tree import flatten, layer_name

Array = jax.Array
CLICKS = 4  # per side of a frame
FOLLOWED = 4  # of the objects that the clicks found


def rehearse(sam: SAM2, frames: Array) -> None:
    """Runs every part of SAM 2 on a clip [T, S, S, 3], preprocessed: a single image is a clip in which nothing moves.

    There are no prompts to go by, so the model makes them: a grid of clicks on the first frame, then the boxes round
    what those found, with its masks; some of the objects are then looked for in the last frame.
    """
    size = sam.variant.image_size
    *fine, coarse = sam.encode_image(frames)
    first = sam.without_memory([level[:1] for level in (*fine, coarse)])
    centres = (jnp.arange(CLICKS) + 0.5) * size / CLICKS
    clicks = jnp.stack(jnp.meshgrid(centres, centres), -1).reshape(-1, 1, 2)
    found = sam.choose(sam.decode_masks(first, (clicks, jnp.ones((len(clicks), 1), int)), multimask=True))
    boxes = prompts.boxes(found.mask > 0) * size / found.mask.shape[-1], jnp.tile(jnp.array([2, 3]), (len(clicks), 1))
    again = sam.choose(sam.decode_masks(first, boxes, found.mask[..., None], multimask=False))

    followed = jnp.argsort(-(found.mask > 0).sum((1, 2)), stable=True)[: 2 * FOLLOWED : 2]
    both = jax.tree.map(lambda *of: jnp.concatenate([leaf[followed] for leaf in of]), found, again)
    masks = resize(both.mask[..., None], (size, size))
    sam.mask_downsample((masks > 0).astype(coarse.dtype))
    at = lambda t, count: [jnp.repeat(level[t][None], count, 0) for level in (*fine, coarse)]
    memories = sam.encode_memory(at(0, 2 * FOLLOWED)[-1], masks, both.object_score)
    by_object = lambda of: of.reshape(2, FOLLOWED, *of.shape[1:]).swapaxes(0, 1)  # two memories each
    times, ages = np.array([0, MEMORIES - 1]), np.array([[1.0, 0.5]])  # the prompted frame and the last one
    *details, now = at(-1, FOLLOWED)
    now = sam.attend_memory(now, by_object(memories), times, by_object(both.pointer), ages)
    sam.decode_object([*details, now], None, multimask=True)


def collect(model: SAM2, params: dict, clips: Iterable[np.ndarray], needs: Iterable[str]) -> dict[str, Stats]:
    """{layer: Stats} of all layers over clips [T, S, S, 3] of one length T, preprocessed, in one pass.

    needs: any of "gram" and "tokens". Memory does not grow with the number of clips.
    """
    mutable = tuple(sorted({"range", *needs}))
    folded = None
    for clip in clips:
        if folded is None:
            shapes = jax.eval_shape(partial(_fold, model, mutable), params, {}, clip)
            folded = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        folded = _fold(model, mutable, params, folded, clip)
    if folded is None:
        raise ValueError("nothing to calibrate on: no clip was given")
    folded, stats = flatten(folded), {}
    for path, kernel in flatten(params).items():
        if path.endswith("/kernel"):
            name = path.replace("kernel", "input")
            parts = [folded.get(f"{fold}/{name}") for fold in ("range", "gram", "tokens")]
            stats[layer_name(path)] = to_stats(*parts, inputs=math.prod(kernel.shape[:-1]))
    return stats


@partial(jax.jit, static_argnames=("model", "mutable"), donate_argnames="folded")
def _fold(model: SAM2, mutable: tuple[str, ...], params: dict, folded: dict, clip: Array) -> dict:
    _, folded = model.apply({"params": params, **folded}, clip, method=rehearse, mutable=mutable)
    return folded


def to_stats(seen: Range, gram: Array | None, sample: Sample | None, inputs: int) -> Stats:
    """The Stats of a layer with `inputs` inputs an output.

    A ConvTranspose has as many as its kernel has places, but an output sees one of these at a time.
    """
    mean, both = seen.total / seen.count, None if gram is None else gram / seen.count
    tokens, places = sample and sample.tokens, inputs // len(mean)
    if places == 1:
        return Stats(mean, seen.low, seen.high, both, tokens)
    if both is not None:
        both = jnp.kron(jnp.eye(places), both) / places
    if tokens is not None:
        turns = jax.nn.one_hot(jnp.arange(len(tokens)) % places, places)
        tokens = (turns[..., None] * tokens[:, None]).reshape(len(tokens), -1)
    return Stats(jnp.tile(mean, places) / places, jnp.tile(seen.low, places), jnp.tile(seen.high, places), both, tokens)

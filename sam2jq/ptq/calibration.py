"""Calibration: what enters every layer of SAM 2 while it segments and tracks, as sums of fixed size."""

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data import prompts
from sam2jq.errors import UserError
from sam2jq.files import atomic_write
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import MEMORIES, SAM2
from sam2jq.quant.stats import Range, Sample
from sam2jq.quant.transform import Stats
from sam2jq.tree import flatten, layer_name, unflatten

Array = jax.Array
CLICKS = 4  # per side of a frame
KEEP = 16  # clips after which the sums of so far are kept
FOLLOWED = 4  # of the objects that the clicks found


def calibration_forward(sam: SAM2, frames: Array) -> None:
    """Runs every part of SAM 2 on a clip [T, S, S, 3], preprocessed: a single image is a clip in which nothing moves.

    There are no prompts to go by, so the model makes them: a grid of clicks on the first frame, then the boxes round
    what those found, with its masks; some of the objects are then looked for in the last frame.
    """
    size = sam.variant.image_size
    *fine, coarse = sam.encode_image(frames)
    first = sam.add_no_memory_embed([level[:1] for level in (*fine, coarse)])
    centres = (jnp.arange(CLICKS) + 0.5) * size / CLICKS
    clicks = jnp.stack(jnp.meshgrid(centres, centres), -1).reshape(-1, 1, 2)
    found = sam.select_best_mask(sam.decode_masks(first, (clicks, jnp.ones((len(clicks), 1), int)), multimask=True))
    boxes = prompts.boxes(found.mask > 0) * size / found.mask.shape[-1], jnp.tile(jnp.array([2, 3]), (len(clicks), 1))
    again = sam.select_best_mask(sam.decode_masks(first, boxes, found.mask[..., None], multimask=False))

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


def collect(
    model: SAM2,
    params: dict,
    clips: Callable[[int], Iterable[np.ndarray]],
    needs: Iterable[str],
    kept: Path | None = None,
    layers: Iterable[str] | None = None,
) -> dict[str, Stats]:
    """{layer: Stats} of `layers`, or of all, over clips [T, S, S, 3] of one length T, preprocessed, in one pass.

    clips(n): an iterator over the clips after the first n. needs: any of "gram" and "tokens". Memory does not grow
    with the number of clips. kept: a file in which the sums of so far are kept, and from which a later call goes on,
    be it of another process; what it holds must be of the same model, params, clips and needs (see `fingerprint`).
    """
    mutable = tuple(sorted({"range", *needs}))
    seen = None if layers is None else frozenset(layers)
    step = partial(_fold, model, mutable, seen)
    clip = next(iter(clips(0)), None)
    if clip is None:
        raise UserError("nothing to calibrate on: no clip was given")
    shapes = jax.eval_shape(step, params, {}, clip)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    folded = accumulate(partial(step, params), zeros, clips, kept)
    folded, stats = flatten(folded), {}
    for path, kernel in flatten(params).items():
        if path.endswith("/kernel") and (seen is None or layer_name(path) in seen):
            name = path.replace("kernel", "input")
            parts = [folded.get(f"{fold}/{name}") for fold in ("range", "gram", "tokens")]
            stats[layer_name(path)] = to_stats(*parts, inputs=math.prod(kernel.shape[:-1]))
    return stats


def accumulate(fold: Callable, sums, clips: Callable[[int], Iterable[np.ndarray]], kept: Path | None):
    """`sums` after sums = fold(sums, clip) of every clip, or of those after the ones whose sums are in `kept`."""
    done, (leaves, treedef) = 0, jax.tree.flatten(sums)
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            done, leaves = int(file["done"]), [file[str(i)] for i in range(len(leaves))]
        sums = treedef.unflatten(map(jnp.asarray, leaves))
    begin = done
    for done, clip in enumerate(clips(begin), begin + 1):
        jax.block_until_ready(sums)  # while which `clip` was read; JAX would let 32 of them pile up
        sums = fold(sums, clip)
        if kept is not None and done % KEEP == 0:
            keep(kept, done, jax.tree.leaves(sums))
    if kept is not None and done > begin and done % KEEP:
        keep(kept, done, jax.tree.leaves(sums))
    return sums


def keep(path: Path, done: int, sums: list[Array]) -> None:
    """Writes the sums over the first `done` clips, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, done=done, **{str(i): x for i, x in enumerate(sums)})


def fingerprint(params: dict, *parts: object) -> str:
    """A hexadecimal number that two runs share only where all of these are equal to the bit; bytes, or with a repr."""
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:32]


@partial(jax.jit, static_argnames=("model", "mutable", "layers"), donate_argnames="folded")
def _fold(
    model: SAM2, mutable: tuple[str, ...], layers: frozenset | None, params: dict, folded: dict, clip: Array
) -> dict:
    """What nobody asked for is not returned, and so neither compiled nor computed."""
    _, folded = model.apply({"params": params, **folded}, clip, method=calibration_forward, mutable=mutable)
    wanted = lambda path: layers is None or layer_name(path.partition("/")[2]) in layers
    return unflatten({path: leaf for path, leaf in flatten(folded).items() if wanted(path)})


def to_stats(seen: Range, gram: Array | None, sample: Sample | None, inputs: int) -> Stats:
    """The Stats of a layer with `inputs` inputs an output.

    A ConvTranspose has as many as its kernel has places, but an output sees one of these at a time.
    """
    mean, both = seen.total / seen.count, None if gram is None else gram / seen.count
    tokens, places = sample and sample.tokens, inputs // len(mean)
    if places == 1:
        return Stats(mean, seen.low, seen.high, both, tokens, seen.count)
    if both is not None:
        both = jnp.kron(jnp.eye(places), both) / places
    if tokens is not None:
        turns = jax.nn.one_hot(jnp.arange(len(tokens)) % places, places)
        tokens = (turns[..., None] * tokens[:, None]).reshape(len(tokens), -1)
    mean, low, high = jnp.tile(mean, places) / places, jnp.tile(seen.low, places), jnp.tile(seen.high, places)
    return Stats(mean, low, high, both, tokens, seen.count)

"""Calibration: statistics of the inputs of every layer of SAM 2 while it segments and tracks.

Letters: T frames of a clip, S the side of the model's input, K inputs of a layer, D devices.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sam2jq.data import prompts
from sam2jq.errors import UserError
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import MEMORIES, SAM2, ObjectOutput, is_image_only
from sam2jq.ptq.stats_cache import accumulate
from sam2jq.quant.stats import MERGES, Range, Sample, Stats
from sam2jq.training.sharding import compute_devices, data_sharding, make_mesh, put_if_needed, replicated
from sam2jq.tree import flatten, kernels, layer_name, unflatten

Array = jax.Array
# clips(n, step=1): each step-th of the clips [T, S, S, 3] after the first n
Clips = Callable[..., Iterable[np.ndarray]]
CLICKS = 4  # clicks per side of a frame
TRACKED = 4  # objects that are tracked into the last frame


def calibration_forward(sam: SAM2, frames: Array) -> list[ObjectOutput]:
    """The masks of clicks, of boxes and of tracked objects of a preprocessed clip [T, S, S, 3], by every part of SAM 2.

    A single image is a clip of one frame. There are no given prompts, so the model makes them: a grid of clicks on the
    first frame, then the boxes of the masks that these gave, with the masks as mask input. Some of the objects are then
    tracked into the last frame.
    """
    size = sam.variant.image_size
    *fine, coarse = sam.encode_image(frames)
    first = sam.add_no_memory_embed([level[:1] for level in (*fine, coarse)])
    clicked = sam.select_best_mask(sam.decode_masks(first, prompts.click_grid(CLICKS, size), multimask=True))
    boxes = prompts.boxes(clicked.mask > 0) * size / clicked.mask.shape[-1]
    corners = boxes, jnp.tile(jnp.array([2, 3]), (len(boxes), 1))
    boxed = sam.select_best_mask(sam.decode_masks(first, corners, clicked.mask[..., None], multimask=False))

    largest = jnp.argsort(-(clicked.mask > 0).sum((1, 2)), stable=True)[: 2 * TRACKED : 2]
    both = jax.tree.map(lambda a, b: jnp.concatenate([a[largest], b[largest]]), clicked, boxed)
    masks = resize(both.mask[..., None], (size, size))
    sam.mask_downsample((masks > 0).astype(coarse.dtype))
    at = lambda t, count: [jnp.repeat(level[t][None], count, 0) for level in (*fine, coarse)]
    memories = sam.encode_memory(at(0, 2 * TRACKED)[-1], masks, both.object_score)
    by_object = lambda x: x.reshape(2, TRACKED, *x.shape[1:]).swapaxes(0, 1)  # two memories each
    times, ages = np.array([0, MEMORIES - 1]), np.array([[1.0, 0.5]])  # the conditioning frame and the last one
    *details, now = at(-1, TRACKED)
    now = sam.attend_memory(now, by_object(memories), times, by_object(both.pointer), ages)
    return [clicked, boxed, sam.decode_object([*details, now], None, multimask=True)]


def collect(
    model: SAM2,
    params: dict,
    clips: Clips,
    needs: Iterable[str],
    cache_file: Path | None = None,
    layers: Iterable[str] | None = None,
) -> dict[str, Stats]:
    """{layer: Stats} of `layers`, or of all, over clips of one length, in one pass.

    needs: any of "gram" and "tokens"; the range is always collected. Memory does not grow with the number of clips.
    cache_file: keeps the sums over the clips so far, from which a later call goes on, also in another process. Its name
    must tell model, params, clips and needs apart (see `tree.fingerprint`).

    The clips are split over `compute_devices`. With several processes all of them call this, with the same arguments;
    each reads its share of the clips, and all return the same. Another number of devices gives sums in another order
    and another sample of tokens.

    Raises UserError if there is no clip, or if the params are those of an image-only model.
    """
    if is_image_only(params):
        raise UserError("this is an image-only model, without the weights of the memory, which calibration runs too")
    mutable = tuple(sorted({"range", *needs}))
    chosen = None if layers is None else frozenset(layers)
    step = partial(fold_clip, model, mutable, chosen)
    clip = next(iter(clips(0, sys.maxsize)), None)  # the first alone: others might be read ahead
    if clip is None:
        raise UserError("calibration got no clip or image")
    shapes = jax.eval_shape(step, params, {}, clip)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    devices = compute_devices()
    if len(devices) == 1:
        folded = accumulate(partial(step, params), zeros, clips, cache_file)
    else:
        mesh = make_mesh(devices)
        on_all = partial(put_if_needed, sharding=replicated(mesh))
        step, params = partial(fold_clips, model, mutable, chosen, mesh), on_all(params)
        fold = lambda folded, batch: step(params, on_all(folded), *batch)
        folded = accumulate(fold, zeros, partial(batches, clips, clip.shape, mesh), cache_file, mesh.size)
    folded, stats = flatten(jax.device_get(folded)), {}
    for path, kernel in kernels(flatten(params)).items():
        if chosen is None or layer_name(path) in chosen:
            name = path.removesuffix("kernel") + "input"
            parts = [folded.get(f"{fold}/{name}") for fold in ("range", "gram", "tokens")]
            stats[layer_name(path)] = to_stats(*parts, inputs=math.prod(kernel.shape[:-1]))
    return stats


@partial(jax.jit, static_argnames=("model", "mutable", "layers"), donate_argnames="folded")
def fold_clip(
    model: SAM2, mutable: tuple[str, ...], layers: frozenset | None, params: dict, folded: dict, clip: Array
) -> dict:
    """`folded` after one more clip. Statistics of other layers are not returned, so XLA does not compute them."""
    _, folded = model.apply({"params": params, **folded}, clip, method=calibration_forward, mutable=mutable)
    is_chosen = lambda path: layers is None or layer_name(path.partition("/")[2]) in layers
    return unflatten({path: leaf for path, leaf in flatten(folded).items() if is_chosen(path)})


@partial(jax.jit, static_argnames=("model", "mutable", "layers", "mesh"), donate_argnames="folded")
def fold_clips(
    model: SAM2,
    mutable: tuple[str, ...],
    layers: frozenset | None,
    mesh: Mesh,
    params: dict,
    folded: dict,
    clips: Array,
    is_clip: Array,
) -> dict:
    """`folded` after one more of the clips [D, T, S, S, 3] on each device of `mesh`; is_clip: bool [D], False for none.

    Each device runs `fold_clip` on its own clip, and only the statistics are sent between devices.
    """

    def fold_own(params: dict, folded: dict, clip: Array, is_clip: Array) -> dict:
        empty = jax.tree.map(jnp.zeros_like, folded)
        fold = lambda: fold_clip(model, mutable, layers, params, empty, clip[0])
        states, own = flatten(folded), flatten(jax.lax.cond(is_clip[0], fold, lambda: empty))
        merge = lambda path: MERGES[path.partition("/")[0]](states[path], own[path], "data")
        return unflatten({path: merge(path) for path in states})

    full, split = replicated(mesh).spec, data_sharding(mesh).spec
    specs = {"in_specs": (full, full, split, split), "out_specs": full}
    return jax.shard_map(fold_own, mesh=mesh, **specs, check_vma=False)(params, folded, clips, is_clip)


def batches(clips: Clips, shape: tuple[int, ...], mesh: Mesh, start: int) -> Iterator[tuple[Array, Array]]:
    """Yields (clips [D, *shape], bool [D]: whether it is one), one for each device of `mesh`, after the first `start`.

    Each process reads its own share. All processes yield equally often; where clips run out, the rest is zeros.
    """
    number, place = len(mesh.local_devices), partial(jax.make_array_from_process_local_data, data_sharding(mesh))
    own = iter(clips(start + jax.process_index(), jax.process_count()))
    is_any = lambda batch: np.any(multihost_utils.process_allgather(np.array(len(batch) > 0)))
    while is_any(batch := list(islice(own, number))):
        missing = number - len(batch)
        yield place(np.stack(batch + [np.zeros(shape, np.float32)] * missing)), place(np.arange(number) < len(batch))


def to_stats(totals: Range, gram: np.ndarray | None, sample: Sample | None, inputs: int) -> Stats:
    """The Stats, numpy arrays, of a layer with `inputs` = K inputs per output, from the states of the folds.

    A ConvTranspose has an input for each place of its kernel, but an output reads one place at a time; `places` counts
    them, and the statistics of one place are spread over all.
    """
    mean = totals.total / totals.count
    gram = None if gram is None else gram / totals.count
    tokens, places = sample and sample.tokens, inputs // len(mean)
    if places == 1:
        return Stats(mean, totals.low, totals.high, gram, tokens, totals.count)
    if gram is not None:
        gram = np.kron(np.eye(places, dtype=np.float32), gram) / places
    if tokens is not None:
        place = np.eye(places, dtype=np.float32)[np.arange(len(tokens)) % places]
        tokens = (place[..., None] * tokens[:, None]).reshape(len(tokens), -1)
    low, high = np.tile(totals.low, places), np.tile(totals.high, places)
    return Stats(np.tile(mean, places) / places, low, high, gram, tokens, totals.count)

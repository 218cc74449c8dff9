"""Drawn scenes and clips with labels, to train the demo model.

Letters: B clips a batch, T frames, S side of the image in pixels, P prompts.
"""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data.synthetic.scenes import MAX_OBJECTS, build_world, promptable_objects, render

Array = jax.Array
MIN_AREA = 0.005  # of the image: objects of which less is visible are not prompted


class Batch(NamedTuple):
    """A batch of clips."""

    images: np.ndarray  # uint8 [B, T, S, S, 3]
    labels: np.ndarray  # uint8 [B, T, S, S]: the number of the visible object, 0 for background


def draw_labelled_clip(seed: int, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [T, S, S, 3] and labels uint8 [T, S, S] of the clip of a seed, whose frames are 1 to 4 time steps
    apart."""
    world = build_world(seed)
    images, owners = zip(*[render(world, t * (1 + seed % 4), size) for t in range(frames)])
    number = np.zeros(MAX_OBJECTS + 1, np.uint8)
    listed = promptable_objects(owners[0])
    number[listed] = np.arange(1, len(listed) + 1)
    return np.stack(images), number[np.stack(owners)]


def generate_batches(clips: int, frames: int, size: int, first: int, prefetch: int = 8) -> Iterator[Batch]:
    """Yields batches of clips of seeds first, first + 1, ..., drawn by another process `prefetch` batches ahead."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        for seed in itertools.count(first, clips):
            seeds = range(seed, seed + clips)
            pending.append(pool.map(draw_labelled_clip, seeds, [frames] * clips, [size] * clips))
            if len(pending) > prefetch:
                yield Batch(*map(np.stack, zip(*pending.popleft())))


class Targets(NamedTuple):
    """The masks that prompts are trained to give."""

    masks: Array  # bool [P, S, S]
    coverage: Array  # [P, S / 4, S / 4]: the share of each cell that the object covers


def each_object(labels: Array) -> Targets:
    """Targets of objects 1 to MAX_OBJECTS of labels [S, S]; the masks of absent ones are empty."""
    masks = labels == jnp.arange(1, MAX_OBJECTS + 1)[:, None, None]
    side = labels.shape[0] // 4
    return Targets(masks, masks.reshape(MAX_OBJECTS, side, 4, side, 4).mean((2, 4), dtype=jnp.float32))


def sample_objects(labels: Array, count: int, key: Array) -> Targets:
    """`count` targets of labels [S, S] in random order; each visible object occurs equally often, up to one."""
    targets = each_object(labels)
    is_visible = targets.masks.mean((1, 2)) > MIN_AREA
    order = jnp.argsort(jnp.where(is_visible, jax.random.uniform(key, is_visible.shape), 1))
    which = order[jnp.arange(count) % jnp.maximum(is_visible.sum(), 1)]
    return jax.tree.map(lambda leaf: leaf[which], targets)

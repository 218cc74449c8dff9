"""Frames and short clips for training: selection, order, and prefetching by threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from sam2jq.data.folders import SAV_FRAMES
from sam2jq.data.images import preprocess
from sam2jq.data.sources import Item, find_images, read_images, source_of
from sam2jq.data.video_frames import videos_below
from sam2jq.errors import UserError
from sam2jq.files import home


def split_of(root: str, split: str) -> str:
    """The folder of `split` in an SA-V root, with frames or with videos, or `root` itself if it has no such split."""
    inside = Path(home(root)) / split
    found = (inside / SAV_FRAMES).is_dir() or (inside.is_dir() and videos_below(inside))
    return str(inside) if found else root


def find_items(spec: str, num_samples: int | None, seed: int, frames: int = 1, stride: int = 1) -> list[Item]:
    """`num_samples` items of `frames` frames, `stride` apart, of a data source; all if None.

    More than one frame needs a source with videos: scenes:<seed>, an SA-V folder, or a folder of folders of frames.
    Raises UserError if the source holds fewer than `num_samples`.
    """
    if frames == 1:
        names = find_images(spec, num_samples, seed)
        items = [Item(name, (name,), partial(read_images, (name,))) for name in names]
    else:
        spec = home(spec)
        items = source_of(spec).windows(spec, num_samples, frames, stride)
        if num_samples is not None and num_samples < len(items):
            chosen = np.random.default_rng(seed).choice(len(items), num_samples, replace=False)
            items = [items[i] for i in sorted(chosen)]
    if not items or (num_samples is not None and len(items) < num_samples):
        held = f"{len(items)} images" if frames == 1 else f"{len(items)} clips of {frames} frames"
        raise UserError(f"{spec} holds {held}, fewer than num_samples {num_samples}: add some, or lower num_samples")
    return items


def read_item(item: Item, size: int) -> np.ndarray:
    """The preprocessed frames of an item, float32 [T, size, size, 3]."""
    return np.stack([preprocess(image, size) for image in item.read()])


def check_disjoint(train: Sequence[Item], val: Sequence[Item], key: str = "data.train") -> None:
    """Raises UserError if training and validation data share a frame; key: the config key of the training data."""
    frames_of = lambda items: {
        name if name.startswith("scenes:") else str(Path(name).resolve()) for item in items for name in item.frames
    }
    shared = frames_of(train) & frames_of(val)
    if shared:
        raise UserError(
            f"{key} and data.val share {len(shared)} frames, such as {min(shared)}: "
            "validation needs frames that are not trained on; give two splits"
        )


def order(number: int, batch: int, seed: int, first: int) -> Iterator[np.ndarray]:
    """Yields the item indices [batch] of steps first, first + 1, ...; each epoch shuffles all `number` items.

    Items that do not fill the last batch are skipped in that epoch. Raises UserError if there is no full batch.
    """
    steps = number // batch
    if steps == 0:
        raise UserError(f"{number} items do not fill a batch of {batch}: lower train.batch_size or give more data")
    for step in count(first):
        epoch, index = divmod(step, steps)
        shuffled = np.random.default_rng((seed, epoch)).permutation(number)
        yield shuffled[index * batch : (index + 1) * batch]


def prefetched(make: Callable, inputs: Iterator, workers: int = 2, depth: int = 4) -> Iterator:
    """Yields make(x) of each of `inputs` in order, computed by threads up to `depth` inputs ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for x in inputs:
            pending.append(pool.submit(partial(make, x)))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

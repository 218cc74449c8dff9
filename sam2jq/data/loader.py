"""Frames and short clips to learn from: which there are, in what order, read ahead of time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.images import SAV_FRAMES, find_images, frame_folders, preprocess, read_image, scene_names
from sam2jq.data.synthetic.scenes import draw_clip, scene_seed
from sam2jq.data.video import find_frames
from sam2jq.errors import UserError


class Item(NamedTuple):
    """A clip that is read when it is its turn: read() -> uint8 [H, W, 3] of each of `frames`, which are files or drawn
    scenes."""

    name: str
    frames: tuple[str, ...]
    read: Callable[[], list[np.ndarray]]


def stills(frames: tuple[str, ...]) -> list[np.ndarray]:
    return [read_image(frame) for frame in frames]


def drawn(name: str, stride: int, frames: int) -> list[np.ndarray]:
    return list(draw_clip(scene_seed(name), (frames - 1) * stride + 1).frames[::stride])


def split_of(root: str, split: str) -> str:
    """The folder of a split in an SA-V root that has it; `root` itself where it is anything else."""
    inside = Path(root) / split
    return str(inside) if (inside / SAV_FRAMES).is_dir() else root


def find_items(spec: str, num_samples: int | None, seed: int, frames: int = 1, stride: int = 1) -> list[Item]:
    """`num_samples` items of `frames` frames, `stride` apart, under a folder or scenes:<seed>; all when None.

    More than one frame takes the videos of an SA-V folder, or a folder of folders of frames.
    ValueError: fewer are there than asked for.
    """
    if frames == 1:
        names = find_images(spec, num_samples, seed)
        items = [Item(name, (name,), partial(stills, (name,))) for name in names]
    elif spec.startswith("scenes:"):
        names = scene_names(spec, num_samples)
        items = [Item(name, (name,), partial(drawn, name, stride, frames)) for name in names]
    else:
        items = windows(spec, frames, stride)
        if num_samples is not None and num_samples < len(items):
            chosen = np.random.default_rng(seed).choice(len(items), num_samples, replace=False)
            items = [items[i] for i in sorted(chosen)]
    if not items or (num_samples is not None and len(items) < num_samples):
        held = f"{len(items)} images" if frames == 1 else f"{len(items)} clips of {frames} frames"
        raise UserError(f"{spec} holds {held}, fewer than num_samples {num_samples}: add some, or ask for fewer")
    return items


def windows(spec: str, frames: int, stride: int) -> list[Item]:
    """Every run of `frames` frames, `stride` apart, of the videos in a folder, none overlapping another."""
    folders = [video for root in frame_folders(Path(spec)) or [Path(spec)] for video in sorted(root.iterdir())]
    found = []
    for video in filter(Path.is_dir, folders):
        files = find_frames(str(video))
        length = (frames - 1) * stride + 1
        for first in range(0, len(files) - length + 1, length):
            taken = tuple(files[first : first + length : stride])
            found.append(Item(f"{video.name}/{first}", taken, partial(stills, taken)))
    return found


def read_item(item: Item, size: int) -> np.ndarray:
    """float32 [T, size, size, 3], preprocessed."""
    return np.stack([preprocess(image, size) for image in item.read()])


def check_disjoint(train: Sequence[Item], val: Sequence[Item], key: str = "data.train") -> None:
    """ValueError if a frame of what `key` names is held out too."""
    real = lambda items: {
        name if name.startswith("scenes:") else str(Path(name).resolve()) for item in items for name in item.frames
    }
    both = real(train) & real(val)
    if both:
        raise UserError(
            f"{key} and data.val share {len(both)} frames, such as {min(both)}: what is trained on says nothing "
            "as validation; give two splits"
        )


def order(number: int, batch: int, seed: int, first: int) -> Iterator[np.ndarray]:
    """Yields the indices [batch] of steps first, first + 1, ...: each epoch all `number` items, shuffled anew; what
    does not fill a batch is left out."""
    steps = number // batch
    if steps == 0:
        raise UserError(f"{number} items do not fill a batch of {batch}: lower train.batch_size or give more data")
    for step in count(first):
        epoch, place = divmod(step, steps)
        mixed = np.random.default_rng((seed, epoch)).permutation(number)
        yield mixed[place * batch : (place + 1) * batch]


def prefetched(make: Callable, things: Iterator, workers: int = 2, depth: int = 4) -> Iterator:
    """Yields make(thing) in order, made by threads `depth` things ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for thing in things:
            pending.append(pool.submit(partial(make, thing)))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

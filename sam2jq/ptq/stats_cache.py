"""Files that keep calibration statistics: for the next run with the same model and images, and for killed runs."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from sam2jq.files import atomic_write

Array = jax.Array
SAVE_EVERY = 16  # clips between two writes of the sums
CODE = ("models/*.py", "quant/*.py", "ptq/calibration.py", "ptq/stats_cache.py", "data/**/*.py")  # makes statistics


def accumulate(fold: Callable, sums, clips: Callable[[int], Iterable[np.ndarray]], path: Path | None):
    """`sums` after sums = fold(sums, clip) for every clip.

    clips(n): an iterator over the clips after the first n. path: a file that holds the sums of the first clips, from
    which this call goes on, and to which it writes; None: no file.
    """
    done, (leaves, treedef) = 0, jax.tree.flatten(sums)
    if path is not None and path.is_file():
        with np.load(path) as file:
            done, leaves = int(file["done"]), [file[str(i)] for i in range(len(leaves))]
        sums = treedef.unflatten(leaves)
    start = done
    for done, clip in enumerate(clips(start), start + 1):
        jax.block_until_ready(sums)  # while `clip` was read; otherwise JAX queues up to 32 clips
        sums = fold(sums, clip)
        if path is not None and done % SAVE_EVERY == 0:
            save_sums(path, done, jax.tree.leaves(sums))
    if path is not None and done > start and done % SAVE_EVERY:
        save_sums(path, done, jax.tree.leaves(sums))
    return sums


def save_sums(path: Path, done: int, sums: list[Array]) -> None:
    """Writes the sums over the first `done` clips, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, done=done, **{str(i): x for i, x in enumerate(sums)})

"""Files that keep calibration statistics: for the next run with the same model and images, and for killed runs."""

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam2jq.files import atomic_write

Array = jax.Array
SAVE_EVERY = 16  # clips between two writes of the sums
CODE = ("models/*.py", "quant/*.py", "ptq/calibration.py", "ptq/stats_cache.py", "data/**/*.py")  # makes statistics


def accumulate(fold: Callable, sums, batches: Callable[[int], Iterable], path: Path | None, size: int = 1):
    """`sums` after sums = fold(sums, batch) for every batch of `size` clips, or one clip each; the last may have fewer.

    batches(n): an iterator over the batches after the first n clips. path: a file that holds the sums of the first
    clips, from which this call goes on, and to which it writes; None: no file. With several processes only process 0
    reads and writes it.
    """
    start, sums = (0, sums) if path is None else load_sums(path, sums)
    saved = done = start
    for done, batch in zip(count(start + size, size), batches(start)):
        jax.block_until_ready(sums)  # while `batch` was read; otherwise JAX queues up to 32 batches
        sums = fold(sums, batch)
        if path is not None and done >= saved + SAVE_EVERY:
            save_sums(path, done, jax.tree.leaves(sums))
            saved = done
    if path is not None and done > saved:
        save_sums(path, done, jax.tree.leaves(sums))
    return sums


def load_sums(path: Path, sums) -> tuple[int, object]:
    """(number of clips, the sums over them) that `path` holds for process 0; (0, `sums`) if there is no such file."""
    done, (leaves, treedef) = 0, jax.tree.flatten(sums)
    if jax.process_index() == 0 and path.is_file():
        with np.load(path) as file:
            done, leaves = int(file["done"]), [file[str(i)] for i in range(len(leaves))]
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
        leaves = multihost_utils.broadcast_one_to_all(leaves) if done else leaves
    return done, treedef.unflatten(leaves)


def save_sums(path: Path, done: int, sums: list[Array]) -> None:
    """Writes the sums over the first `done` clips, atomically, in process 0."""
    if jax.process_index() == 0:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, done=done, **{str(i): x for i, x in enumerate(sums)})

"""Checkpoints of a training run, from which a killed run is resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sam2jq.errors import UserError, few


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """A manager of the checkpoints in `folder`, which keeps only the latest one.

    It writes in threads. The end of the block waits for them, and raises the error of one that failed.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
    handler = ocp.StandardCheckpointHandler()  # named here, it reads a checkpoint's shapes without restoring it
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
        yield manager


def restore(checkpoints: ocp.CheckpointManager, state: Any) -> tuple[int, Any]:
    """The step and the state of the latest checkpoint; 0 and `state` itself where there is none.

    state: a tree of the same structure, shapes and dtypes as what was saved. Raises UserError if it is not, as after
    an update of sam2jq that changed the state: orbax would restore arrays of other shapes.
    """
    step = checkpoints.latest_step()
    if step is None:
        return 0, state
    saved, host = checkpoints.item_metadata(step), jax.device_get(state)
    if other := sorted(name for name, _ in leaf_types(saved.tree).items() ^ leaf_types(host).items()):
        raise UserError(
            f"checkpoint {checkpoints.directory / str(step)} has another state of training than this version of sam2jq "
            f"({few(dict.fromkeys(other), 3)}): finish the run with the version that wrote it, or remove "
            f"{checkpoints.directory.parent} to start over"
        )
    return step, checkpoints.restore(step, args=ocp.args.StandardRestore(host))


def leaf_types(tree: Any) -> dict[str, tuple]:
    """{name: (shape, dtype)} of each leaf of a tree, or of a checkpoint's metadata, which has no types of nodes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shaped = lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            tuple(shaped(leaf).shape),
            np.dtype(shaped(leaf).dtype),
        )
        for path, leaf in leaves
    }


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts to write `state` as the checkpoint of `step`, after which the one before it is deleted.

    Waits for the checkpoint before, and raises its error if it failed.
    """
    # a copy: on a CPU `device_get` gives the state's own memory, which the next steps may write to
    checkpoints.save(step, args=ocp.args.StandardSave(jax.tree.map(np.array, jax.device_get(state))))

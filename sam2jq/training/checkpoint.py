"""Checkpoints of a training run, from which a killed run is resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """A manager of the checkpoints in `folder`, which keeps only the latest one."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def restore(checkpoints: ocp.CheckpointManager, state: Any) -> tuple[int, Any]:
    """The step and the state of the latest checkpoint; 0 and `state` itself where there is none.

    state: a tree of the same structure, shapes and dtypes as what was saved.
    """
    step = checkpoints.latest_step()
    if step is None:
        return 0, state
    return step, checkpoints.restore(step, args=ocp.args.StandardRestore(jax.device_get(state)))


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Writes `state` as the checkpoint of `step` and deletes the one before it."""
    checkpoints.save(step, args=ocp.args.StandardSave(jax.device_get(state)))

"""The training loop: resume, step, checkpoint."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sam2jq.training.checkpoint import open_checkpoints, restore, save

State = TypeVar("State")


class Hooks(NamedTuple):
    """What a run does around its steps; `step` is the number of finished steps.

    on_start(step, state) -> state: called once, after a checkpoint was restored; step is 0 in a new run.
    after_step(step, state, metrics) -> state: may log and may change the state, before a checkpoint is saved.
    is_save_step(step): whether a checkpoint is saved after this step.
    should_stop(state): whether the run ends before its last step.
    """

    after_step: Callable[[int, State, Any], State] = lambda step, state, metrics: state
    on_start: Callable[[int, State], State] = lambda step, state: state
    is_save_step: Callable[[int], bool] = lambda step: False
    should_stop: Callable[[State], bool] = lambda state: False


NO_HOOKS = Hooks()


def fit(
    train_step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    batches: Callable[[int], Iterable],
    last_step: int,
    folder: Path,
    hooks: Hooks = NO_HOOKS,
) -> State:
    """The state after `last_step` steps, or after the step at which `hooks.should_stop` holds.

    A run that was killed is resumed from the latest checkpoint in `folder` and ends at the same bits as one that was
    not. A finished run takes no further step.

    train_step(state, batch) -> (state, metrics); batches(n): an iterable over the batches of steps n + 1, n + 2, ...
    """
    with open_checkpoints(folder) as checkpoints:
        first, state = restore(checkpoints, state)
        state = hooks.on_start(first, state)
        if first >= last_step or hooks.should_stop(state):
            return state
        for step, batch in zip(range(first + 1, last_step + 1), batches(first)):
            state, metrics = train_step(state, batch)
            state = hooks.after_step(step, state, metrics)
            if hooks.is_save_step(step):
                save(checkpoints, step, state)
            if hooks.should_stop(state):
                break
    return state


def log_mean_metrics(
    every: int, last_step: int, log_fn: Callable[[int, dict[str, float]], None]
) -> Callable[[int, State, dict], State]:
    """An `after_step` hook that calls log_fn(step, means of the metrics since the last call).

    It is called after each `every` steps and after the last one. Metrics stay on the device until then, so that no step
    waits for the one before.
    """
    rows = []

    def after_step(step: int, state: State, metrics: dict) -> State:
        rows.append(metrics)
        if step % every == 0 or step == last_step:
            host_rows = jax.device_get(rows)
            rows.clear()
            log_fn(step, {name: float(np.mean([row[name] for row in host_rows])) for name in metrics})
        return state

    return after_step

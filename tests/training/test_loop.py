import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sam2jq.errors import UserError
from sam2jq.training.checkpoint import open_checkpoints, restore, save
from sam2jq.training.loop import Hooks, fit, log_mean_metrics
from sam2jq.training.state import init_state
from sam2jq.training.step import make_train_step
from tests.conftest import file_limit

PARAMS = {"w": np.ones((4, 2), np.float32)}


def loss(params, batch, key):
    x, y = batch
    noise = 0.01 * jax.random.normal(key, y.shape)
    value = jnp.square(x @ params["w"] + noise - y).mean()
    return value, {"noise": noise.mean()}


def batches(first):
    for i in range(first, 10**6):
        x = np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32)
        yield x, x[:, :2]


def run(folder, steps, every=5):
    """The final state and the logged means [(step, means)] of a run that saves a checkpoint every `every` steps."""
    optimizer, logged = optax.adam(0.1), []
    state = init_state(jax.tree.map(jnp.array, PARAMS), optimizer, seed=3)
    after_step = log_mean_metrics(every, steps, lambda *row: logged.append(row))
    hooks = Hooks(after_step, is_save_step=lambda step: step % every == 0 or step == steps)
    return fit(make_train_step(loss, optimizer), state, batches, steps, folder, hooks), logged


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    """Batches, keys and the optimizer continue where they were."""
    run(tmp_path / "resumed", 5)
    resumed, logged = run(tmp_path / "resumed", 20)
    uninterrupted, _ = run(tmp_path / "uninterrupted", 20)
    assert int(resumed.step) == int(uninterrupted.step) == 20
    np.testing.assert_array_equal(resumed.params["w"], uninterrupted.params["w"])
    assert [step for step, _ in logged] == [10, 15, 20]


def test_a_finished_run_takes_no_further_step(tmp_path):
    state, _ = run(tmp_path, 10)
    again, logged = run(tmp_path, 10)
    assert logged == []
    np.testing.assert_array_equal(again.params["w"], state.params["w"])


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    """What is written is the state as it was, though its memory is written to meanwhile."""
    goes_on, finalize, waited = threading.Event(), ocp.StandardCheckpointHandler.finalize, []

    def finalize_late(*args):
        waited.append(goes_on.wait(10))
        return finalize(*args)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize_late)
    state = {"w": np.zeros(1000, np.float32)}
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        state["w"] += 1
        goes_on.set()
    assert waited == [True]
    with open_checkpoints(tmp_path) as checkpoints:
        assert restore(checkpoints, state)[1]["w"].tolist() == [0] * 1000


KILLED = """
import os, sys
from pathlib import Path
from tests.training import test_loop as loop
finalize, calls = loop.ocp.StandardCheckpointHandler.finalize, []
def kill(*args):
    calls.append(0)
    return finalize(*args) if len(calls) < 2 else os._exit(9)
loop.ocp.StandardCheckpointHandler.finalize = kill
loop.run(Path(sys.argv[1]), 20)
"""


@pytest.mark.slow  # starts a process
def test_a_run_that_was_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], check=False)
    assert done.returncode == 9
    with open_checkpoints(tmp_path / "killed") as checkpoints:
        assert checkpoints.latest_step() == 5
    resumed, uninterrupted = run(tmp_path / "killed", 20)[0], run(tmp_path / "whole", 20)[0]
    np.testing.assert_array_equal(resumed.params["w"], uninterrupted.params["w"])


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    """At the next checkpoint, or at the end; the one before it is kept."""
    step, hooks = lambda state, batch: (state, {}), Hooks(is_save_step=lambda step: True)
    state = {"w": np.random.default_rng(0).normal(size=100_000)}
    fit(step, state, lambda first: [0], 1, tmp_path, hooks)
    with pytest.raises((OSError, ValueError), match="File too large"), file_limit(50_000):
        fit(step, state, lambda first: [0], 2, tmp_path, hooks)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_metrics_are_means_over_the_steps_between(tmp_path):
    _, logged = run(tmp_path, 18)
    assert [step for step, _ in logged] == [5, 10, 15, 18]
    assert set(logged[0][1]) == {"loss", "gradient", "noise"}
    assert logged[-1][1]["loss"] < logged[0][1]["loss"] / 2


def test_hooks_run_around_each_step_and_can_change_the_state_and_stop_the_run(tmp_path):
    calls = []

    def on_start(step, state):
        calls.append(("start", step))
        return state

    def after_step(step, state, metrics):
        calls.append((step, metrics))
        return state + 100

    hooks = Hooks(after_step, on_start, lambda step: step == 2, lambda state: state >= 300)
    step = lambda state, batch: (state + batch, {"batch": batch})
    numbers = lambda first: iter(range(first + 1, 99))
    state = fit(step, np.int64(0), numbers, 10, tmp_path, hooks)
    assert state == 1 + 2 + 3 + 300
    assert calls == [("start", 0), (1, {"batch": 1}), (2, {"batch": 2}), (3, {"batch": 3})]
    calls.clear()
    assert fit(step, np.int64(0), numbers, 10, tmp_path, hooks) == state  # from the checkpoint of step 2
    assert calls == [("start", 2), (3, {"batch": 3})]


SAVED = {"params": np.ones((4, 2), np.float32), "moments": (np.zeros(8, np.float32), np.int32(0))}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"moments": ({"w": np.zeros((4, 2), np.float32)}, np.int32(0))}, "moments.0, moments.0.w"),
        ({"moments": (np.zeros(9, np.float32), np.int32(0))}, "moments.0"),
        ({"moments": (np.zeros(8, np.float32), np.float32(0))}, "moments.1"),
        ({"more": np.zeros(3, np.float32)}, "more"),
    ],
)
def test_a_checkpoint_with_the_state_of_another_version_is_named(tmp_path, changed, names):
    """Such as of 0.1.0, whose optimizer had the moments of each array in an array of its own."""
    step, save = lambda state, batch: (state, {}), Hooks(is_save_step=lambda step: True)
    fit(step, SAVED, lambda first: [0], 1, tmp_path / "run" / "checkpoints", save)
    with pytest.raises(UserError, match="has another state of training than this version") as error:
        fit(step, SAVED | changed, lambda first: [0], 1, tmp_path / "run" / "checkpoints", save)
    assert str(error.value).startswith(f"checkpoint {tmp_path}/run/checkpoints/1 has")
    assert f"({names})" in str(error.value)
    assert str(error.value).endswith(f"or remove {tmp_path}/run to start over")
    assert "\n" not in str(error.value)

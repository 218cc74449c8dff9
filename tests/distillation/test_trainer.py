"""The loop of CDPQ on two layers that learn a product; that of SAM 2 is in test_distill.py."""

import json
import re
import subprocess
import sys
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.run import DistributedConfig
from sam2jq.distillation import trainer as cdpq
from sam2jq.distillation.bit_trials import evaluate_bits, make_bits_evaluator
from sam2jq.distillation.history import history
from sam2jq.distillation.losses import PARTS
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.fake_quant import bits_of, init_fake_quant, to_quantized_params
from sam2jq.quant.leaves import base_weight
from sam2jq.quant.spec import QuantSpec
from sam2jq.report.curves import plot_history
from sam2jq.training.distributed import initialize_distributed
from sam2jq.training.step import make_train_step
from tests.flags import override
from tests.processes import free_port, with_devices

LAYERS = ("a", "b")


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PLAIN = {name: {"kernel": array(8, 8, seed=i), "bias": np.zeros(8, np.float32)} for i, name in enumerate(LAYERS)}


def run(params, x):
    outputs = {}
    for name in LAYERS:
        x = outputs[name] = x @ params[name]["kernel"] + params[name]["bias"]
    return outputs


def loss(params, batch):
    got, expected = run(materialize_weights(params), batch), run(PLAIN, batch)
    energy = lambda x: jnp.square(x).sum(-1)
    layers = jnp.stack([(energy(got[name] - expected[name]) / energy(expected[name])).mean() for name in LAYERS])
    parts = dict.fromkeys(PARTS, jnp.float32(0)) | {"layers": layers.sum()}
    return parts["layers"], {"parts": parts, "layers": layers}


def task():
    batches = lambda first: (array(4, 8, seed=100 + i) for i in count(first))
    return cdpq.DistillTask(loss, batches, [array(4, 8, seed=7), array(4, 8, seed=8)], steps_per_epoch=5)


def config(*flags):
    usual = [
        *("--teacher.name", "nano", "--student.name", "nano", "--data.train", "scenes:1", "--data.val", "scenes:2"),
        *("--quant.initial_bits", "6", "--quant.min_bits", "2", "--distill.window", "2", "--distill.impact_floor", "1"),
        *("--train.epochs", "4", "--train.learning_rate", "0.01", "--train.checkpoint_every", "2"),
    ]
    return loader.load(None, override(usual, *flags), DistillConfig)


def make_student():
    return init_fake_quant(jax.tree.map(jnp.asarray, PLAIN), dict.fromkeys(LAYERS, QuantSpec(6)))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_layers_lose_a_bit_an_epoch_until_the_last_ones(tmp_path):
    best = cdpq.distill(make_student(), task(), config(), tmp_path)
    rounds = [row for row in rows_of(tmp_path) if "val/loss" in row]
    assert [row["bits"] for row in rounds] == [dict.fromkeys(LAYERS, bits) for bits in (6, 5, 4, 3, 3)]
    np.testing.assert_array_equal(bits_of(best), [3, 3])
    assert [row["quant/updated_layers"] for row in rounds if "decisions" in row] == [2, 2, 2]


def test_a_step_waits_for_no_transfer_between_host_and_device():
    """Arrays are placed as asked for, such as a batch; anything else would be an error here."""
    student, settings = make_student(), config()
    loss_of, optimizer = cdpq.make_student_loss(student, loss, settings, 20)
    step, state = make_train_step(loss_of, optimizer), cdpq.init_distill_state(student, optimizer, settings)
    take = lambda state: cdpq.step_and_observe(step, state, array(4, 8, seed=100))[0]
    state = take(state)
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            state.train.step + np.ones(1)
        state = take(take(state))
    assert int(state.train.step) == 3


def test_what_is_done_between_two_steps_waits_for_no_step(tmp_path):
    """Neither the hooks nor the question whether patience has run out read or compute anything on the device."""
    student, settings = make_student(), config("--train.patience", "2", "--train.checkpoint_every", "9")
    run = cdpq.Run(task()._replace(steps_per_epoch=9), settings, None, LAYERS, None)
    hooks = cdpq.make_hooks(run, tmp_path, lambda row: None)
    state = cdpq.init_distill_state(student, cdpq.make_student_loss(student, loss, settings, 20)[1], settings)
    with jax.transfer_guard("disallow"):
        for step in (1, 2):
            state = hooks.after_step(step, state, {"loss": state.train.step})
            assert not hooks.is_save_step(step)
            assert not hooks.should_stop(state)
    stopped = state._replace(stale=state.stale + 2)
    assert hooks.should_stop(stopped)
    assert isinstance(state.stale, np.ndarray)


def test_each_batch_is_sent_to_the_devices_once_for_all_trials(monkeypatch):
    """And a trial's loss is that of the assignment alone, to the bit."""
    student, batches = make_student(), task().val_batches
    evaluator = make_bits_evaluator(loss)
    bits = np.array([[6, 5], [5, 6], [4, 4]], np.float32)
    alone = [evaluate_bits(evaluator, student, one[None], batches)[0][0] for one in bits]
    sent, send = [], jax.make_array_from_process_local_data
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda to, x: (sent.append(x.shape), send(to, x))[1])
    with jax.transfer_guard_host_to_device("disallow"):
        losses, _ = evaluate_bits(evaluator, student, bits, batches)
    np.testing.assert_array_equal(losses, alone)
    assert sent == [batch.shape for batch in batches]


def test_a_run_s_history_is_what_its_curves_and_its_page_are_drawn_from(tmp_path):
    cdpq.distill(make_student(), task(), config(), tmp_path)
    metrics = history(rows_of(tmp_path))
    assert [step for step, _ in metrics["val_loss"]] == metrics["bits"]["steps"] == [0, 5, 10, 15, 20]
    assert metrics["bits"]["layers"] == {name: [6, 5, 4, 3, 3] for name in LAYERS}
    assert set(metrics["decisions"][0]) == {"epoch", "layer", "from", "to", "impact", "accepted", "reason"}
    assert [(one["from"], one["to"]) for one in metrics["decisions"]] == [
        (6, 5),
        (6, 5),
        (5, 4),
        (5, 4),
        (4, 3),
        (4, 3),
    ]
    plot_history(metrics).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_no_layer_falls_below_the_least(tmp_path):
    best = cdpq.distill(make_student(), task(), config("--quant.min_bits", "5"), tmp_path)
    np.testing.assert_array_equal(bits_of(best), [5, 5])


def test_only_the_named_roots_are_lowered(tmp_path):
    best = cdpq.distill(make_student(), task(), config("--quant.target_roots", "[b]"), tmp_path)
    np.testing.assert_array_equal(bits_of(best), [6, 3])


def test_what_is_learned_beats_what_was_rounded(tmp_path):
    fixed = config("--distill.confidence_method", "fixed", "--train.epochs", "12")
    start = init_fake_quant(jax.tree.map(jnp.asarray, PLAIN), dict.fromkeys(LAYERS, QuantSpec(2)))
    best = cdpq.distill(start, task(), fixed, tmp_path)
    before, after = (float(loss(params, task().val_batches[0])[0]) for params in (start, best))
    assert after < 0.8 * before
    assert all(not np.array_equal(base_weight(best[n]["kernel"]).kernel, PLAIN[n]["kernel"]) for n in LAYERS)


class Killed(Exception):
    pass


AVERAGED = ["--train.accumulate", "2", "--train.ema", "0.9"]


@pytest.mark.parametrize(
    ("step", "flags"),
    [*[pytest.param(step, [], marks=pytest.mark.slow) for step in (1, 3)], (20, []), (7, AVERAGED)],
    ids=str,
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, step, flags):
    """To the bit, and with the same log."""

    def dies(row):
        if row["step"] >= step:
            raise Killed

    replicated = cdpq.distill(make_student(), task(), config(*flags), tmp_path / "whole")
    with pytest.raises(Killed):
        cdpq.distill(make_student(), task(), config(*flags), tmp_path / "cut", dies)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "tr')  # killed while it wrote
    cut = cdpq.distill(make_student(), task(), config(*flags), tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, to_quantized_params(cut), to_quantized_params(replicated))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_layer(tmp_path):
    good = task()

    def batches(first):
        for i, batch in enumerate(good.batches(first), first + 1):
            yield batch * np.nan if i == 8 else batch

    with pytest.raises(
        ValueError, match="the loss is nan at step 8, first in layer a: lower train.learning_rate; .*checkpoint is kept"
    ):
        cdpq.distill(make_student(), good._replace(batches=batches), config(), tmp_path)
    assert (tmp_path / "checkpoints" / "6").is_dir()  # the last good one


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    task_with_nan = task()._replace(batches=lambda first: (batch * np.nan for batch in task().batches(first)))
    often = config("--train.log_interval", "1")
    with pytest.raises(ValueError, match="at step 1, .*there is no checkpoint yet, so the same command starts over"):
        cdpq.distill(make_student(), task_with_nan, often, tmp_path)


def test_a_run_that_was_out_of_patience_takes_no_step_when_it_is_resumed(tmp_path):
    fixed = config("--distill.confidence_method", "fixed", "--train.learning_rate", "0", "--train.patience", "2")
    cdpq.distill(make_student(), task(), fixed, tmp_path)
    rows = rows_of(tmp_path)
    cdpq.distill(make_student(), task(), fixed, tmp_path)
    assert rows_of(tmp_path) == rows


def test_one_program_serves_every_step_and_one_every_trial(tmp_path):
    traces = []

    def counted(*args):
        traces.append(0)
        return loss(*args)

    cdpq.distill(make_student(), task()._replace(loss=counted), config(), tmp_path)
    assert len(traces) == 2


def test_a_run_without_progress_ends_early(tmp_path):
    fixed = config("--distill.confidence_method", "fixed", "--train.learning_rate", "0", "--train.patience", "2")
    cdpq.distill(make_student(), task(), fixed, tmp_path)
    assert max(row["epoch"] for row in rows_of(tmp_path)) == 2


def test_a_run_that_only_does_harm_ends_as_it_began(tmp_path):
    fixed = config("--distill.confidence_method", "fixed", "--train.learning_rate", "3", "--train.warmup_steps", "0")
    best = cdpq.distill(make_student(), task(), fixed, tmp_path)
    first, *rest = [row["val/loss"] for row in rows_of(tmp_path) if "val/loss" in row]
    assert min(rest) > first
    jax.tree.map(np.testing.assert_array_equal, to_quantized_params(best), to_quantized_params(make_student()))


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from sam2jq.training.distributed import initialize_distributed
from sam2jq.training.step import make_train_step
from tests.distillation import test_trainer as toy
folder, *flags = sys.argv[1:]
config = toy.config(*flags)
initialize_distributed(config.distributed)
import jax
index, share = jax.process_index(), jax.process_count()
task = toy.task()
mine = lambda first: (np.split(batch, share)[index] for batch in task.batches(first))
best = toy.cdpq.distill(toy.make_student(), task._replace(batches=mine), config, Path(folder))
kernels = [toy.base_weight(best[name]["kernel"]).kernel for name in toy.LAYERS]
print("ended", jax.device_count(), *(kernel.ravel().tolist() for kernel in kernels))
"""


def start_process(folder, *flags, devices=1, variables=()):
    environment = with_devices(devices) | dict(variables)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *flags], env=environment, **pipes)


def weights_of(process) -> tuple[int, np.ndarray]:
    """The devices a finished process saw, and the weights it ended with."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    count, rest = out.rpartition("ended ")[2].split(maxsplit=1)
    return int(count), np.array(re.findall(r"[-\d.e]+", rest), float)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    best = cdpq.distill(make_student(), task(), config(), tmp_path_factory.mktemp("alone"))
    return np.concatenate([base_weight(best[name]["kernel"]).kernel.ravel() for name in LAYERS])


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.end_to_end)])
def test_four_devices_learn_what_one_does(alone, tmp_path, parallel):
    """Up to the order in which gradients are added."""
    count, found = weights_of(start_process(tmp_path, "--train.parallel", parallel, devices=4))
    assert count == 4
    np.testing.assert_allclose(found, alone, atol=1e-5)


def named(port: int, index: int) -> tuple[list[str], dict[str, str]]:
    return [f"127.0.0.1:{port}", "--distributed.processes", "2", "--distributed.index", str(index)], {}


def under_slurm(port: int, index: int) -> tuple[list[str], dict[str, str]]:
    """The port follows from the job's number."""
    places = {"JOB_ID": port - 61440, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": index, "LOCALID": index}
    return ["auto"], {f"SLURM_{name}": str(value) for name, value in places.items()}


@pytest.mark.end_to_end
@pytest.mark.parametrize("places", [named, pytest.param(under_slurm, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does_and_the_first_writes(alone, tmp_path, places):
    """Each reads its own half of every batch; they add gradients over the loopback."""
    port, both = free_port(), []
    for flags, variables in (places(port, index) for index in (0, 1)):
        flags = ["--distributed.timeout", "60", "--distributed.coordinator", *flags]
        both.append(start_process(tmp_path, *flags, variables=variables))
    for process in both:
        count, found = weights_of(process)
        assert count == 2
        np.testing.assert_allclose(found, alone, atol=1e-5)
    assert len(rows_of(tmp_path)) == len({json.dumps(row) for row in rows_of(tmp_path)})


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "process 0 of 3 waited 1 s for process 1, 2: start it"), (1, "process 1 of 3 waited 1 s for process 0 at")],
)
def test_a_process_that_never_comes_is_named(index, message):
    config = DistributedConfig(f"127.0.0.1:{free_port()}", 3, index, timeout=1)
    with pytest.raises(ValueError, match=message):
        initialize_distributed(config)


def test_a_place_that_nobody_tells_is_an_error(tmp_path):
    process = start_process(tmp_path, "--distributed.coordinator", "auto")
    assert "no Slurm job and no TPU pod; give HOST:PORT" in process.communicate(timeout=120)[1]
    assert process.returncode

"""Calibration and evaluation on several devices and in several processes, with two layers in place of SAM 2."""

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.config.run import DistributedConfig
from sam2jq.models.layers import Dense
from sam2jq.ptq import calibration, sensitivity
from sam2jq.quant.stats import TOKENS, Stats
from sam2jq.training.distributed import fails_together, initialize_distributed
from sam2jq.training.parallel_map import parallel_map, replicate
from tests.processes import free_port, with_devices

CLIPS, MANY = 7, 41  # neither fills the last batch of 4 devices or 2 processes
KILLED_AT = 36  # the first clip of a batch, so that all processes end at the same one
PROGRAM = """
import sys
from tests.ptq import test_many_devices
test_many_devices.run_in_process(*sys.argv[1:])
"""


class Toy(nn.Module):
    @nn.compact
    def __call__(self, clip: jax.Array) -> jax.Array:
        return Dense(3, name="second")(jnp.tanh(Dense(5, name="first")(clip)))


class Found(NamedTuple):
    """What a process finds. rows: (item, id of the device it ran on); made: the items that this process was given."""

    devices: int
    stats: dict[str, Stats]
    read: list[int]
    changes: dict[str, float]
    rows: list[tuple[int, int]]
    made: list[int]
    resumed: bool


def clip(i: int) -> np.ndarray:
    """64 tokens, whose first channel is the number of the clip."""
    rng = np.random.default_rng(i)
    return np.concatenate([np.full((1, 8, 8, 1), i), rng.standard_normal((1, 8, 8, 2))], -1).astype(np.float32)


def clips_of(number: int, read: list[int]):
    def clips(n: int, step: int = 1):
        for i in range(n, number, step):
            read.append(i)
            yield clip(i)

    return clips


def params() -> dict:
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    layer = lambda inputs, outputs: {"kernel": array(inputs, outputs), "bias": array(outputs)}
    return {"first": layer(3, 5), "second": layer(5, 3)}


def find(folder: Path) -> Found:
    """Calibrates, measures changes of the output, and maps a function over items."""
    read, made = [], []
    calibration.calibration_forward = lambda toy, clip: toy(clip)
    sensitivity.mask_vector = lambda toy, params, clip: toy.apply({"params": params}, clip).ravel()
    needs = {"gram", "tokens"}
    stats = calibration.collect(Toy(), params(), clips_of(CLIPS, read), needs)
    changes = {name: 0.01 * layer["kernel"] for name, layer in params().items()}

    def name_device(array: jax.Array, item: int) -> tuple[int, int]:
        made.append(item)
        time.sleep(0.05)
        (device,) = (array + jnp.ones(3)).devices()
        return item, device.id

    return Found(
        jax.device_count(),
        stats,
        read,
        sensitivity.mask_changes(Toy(), params(), changes, clips_of(CLIPS, [])),
        parallel_map(name_device, replicate(lambda array: array, jnp.ones(3)), range(11)),
        made,
        goes_on_to_the_same_bits(folder, needs),
    )


def goes_on_to_the_same_bits(folder: Path, needs: set[str]) -> bool:
    """Whether a calibration that is killed and called again ends as one that was not killed."""
    collect = lambda clips, file: calibration.collect(Toy(), params(), clips, needs, folder / file)
    whole = collect(clips_of(MANY, []), "whole.npz")

    def killed(n: int, step: int = 1):
        for i, one in zip(range(n, MANY, step), clips_of(MANY, [])(n, step)):
            if i >= KILLED_AT:
                raise KeyboardInterrupt
            yield one

    with pytest.raises(KeyboardInterrupt):
        collect(killed, "cut.npz")
    read = []
    resumed = collect(clips_of(MANY, read), "cut.npz")
    return min(set(read) - {0}) >= 32 and jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))


def run_in_process(folder: str, port: str, processes: str, index: str) -> None:
    config = DistributedConfig(f"127.0.0.1:{port}", int(processes), int(index), timeout=60)
    initialize_distributed(config if config.processes > 1 else DistributedConfig())
    with fails_together():
        found = find(Path(folder))
    Path(folder, f"{index}.pickle").write_bytes(pickle.dumps(found))


def run_many(folder: Path, processes: int, devices: int) -> list[Found]:
    """What each of some processes finds, with so many virtual devices each."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(free_port()), str(processes)]
    pipes = {"stderr": subprocess.PIPE, "text": True, "env": with_devices(devices)}
    started = [subprocess.Popen([*command, str(index)], **pipes) for index in range(processes)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert not any(process.returncode for process in started), errors
    return [pickle.loads((folder / f"{index}.pickle").read_bytes()) for index in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Found:
    with pytest.MonkeyPatch.context() as patch:  # which puts back what `find` sets
        patch.setattr(calibration, "calibration_forward", calibration.calibration_forward)
        patch.setattr(sensitivity, "mask_vector", sensitivity.mask_vector)
        yield find(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=[(1, 4), (2, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
def many(request, tmp_path_factory) -> list[Found]:
    """Of one process with 4 devices, and of two processes."""
    return run_many(tmp_path_factory.mktemp("many"), *request.param)


def test_statistics_are_those_of_one_device(one, many):
    """Ranges and counts to the bit; sums are added in another order."""
    for found in many:
        for layer, stats in found.stats.items():
            np.testing.assert_array_equal(stats.count, CLIPS * 64)
            np.testing.assert_allclose(stats.low, one.stats[layer].low, rtol=1e-6)
            np.testing.assert_allclose(stats.high, one.stats[layer].high, rtol=1e-6)
            np.testing.assert_allclose(stats.mean, one.stats[layer].mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.gram, one.stats[layer].gram, rtol=1e-5, atol=1e-6)
    assert all(jax.tree.all(jax.tree.map(np.array_equal, found.stats, many[0].stats)) for found in many)


def test_every_clip_is_as_likely_to_be_in_the_sample(many):
    """Each of the clips gets its share of the slots, give or take 4 deviations, with tokens that it has."""
    tokens = many[0].stats["first"].tokens
    slots = np.bincount(tokens[:, 0].astype(int), minlength=CLIPS)
    assert np.abs(slots - TOKENS / CLIPS).max() < 4 * (TOKENS * (CLIPS - 1) / CLIPS**2) ** 0.5
    known = {token.tobytes() for i in range(CLIPS) for token in clip(i).reshape(-1, 3)}
    assert all(token.tobytes() in known for token in tokens)
    assert len({token.tobytes() for token in tokens}) > 0.6 * CLIPS * 64


def test_no_clip_is_read_twice(many):
    """But for the first, whose shape every process needs."""
    read = [i for found in many for i in found.read[1:]]
    assert sorted(read) == list(range(CLIPS))


def test_a_killed_calibration_goes_on_where_it_was_to_the_same_bits(one, many):
    assert all(found.resumed for found in (one, *many))


def test_changes_of_the_masks_are_those_of_one_device(one, many):
    for found in many:
        assert found.changes == pytest.approx(one.changes, rel=1e-4)


def test_items_are_split_over_all_devices_and_none_is_done_twice(many):
    """All processes get all results in order, and every device works."""
    assert sorted(item for found in many for item in found.made) == list(range(11))
    for found in many:
        assert [item for item, _ in found.rows] == list(range(11))
        assert len({device for _, device in found.rows}) == found.devices


def test_one_device_runs_the_items_in_order(one):
    assert one.made == list(range(11))
    assert one.read == [0, *range(CLIPS)]

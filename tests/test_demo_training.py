"""The training of the demo model, experiments/demo_model."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest

from sam2jq import abstract_params, build

FOLDER = "experiments/demo_model"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as for the script
    return importlib.import_module("train")


WHOLE = [pytest.param(name, marks=pytest.mark.end_to_end) for name in ("full", "clips")]


@pytest.mark.parametrize("name", ["trunk", "decoder", *WHOLE])
def test_the_loss_of_every_kind_of_phase_can_be_traced(train, name):
    phase = train.PHASES[name]._replace(size=64, clips=1)
    model, shape = build("nano", image_size=64), (1, phase.frames, 64, 64)
    batch = train.Batch(jax.ShapeDtypeStruct((*shape, 3), np.uint8), jax.ShapeDtypeStruct(shape, np.uint8))
    run = functools.partial(train.loss, model, phase)
    value, metrics = jax.eval_shape(run, abstract_params(model), batch, jax.random.key(0))
    assert value.shape == ()
    assert metrics


def test_a_phase_is_trained_by_the_loop_of_the_library_and_resumed(train, tmp_path, monkeypatch):
    phase = train.PHASES["trunk"]._replace(steps=52)
    monkeypatch.setattr(train, "SAVE_EVERY", 26)
    monkeypatch.setattr(train, "loss", lambda model, phase, params, batch, key: ((params["w"] ** 2).sum(), {}))
    monkeypatch.setattr(train, "generate_batches", lambda *args: iter([train.Batch(np.zeros(1), np.zeros(1))] * 52))
    params = {"w": np.ones((2, 2), np.float32)}
    trained = train.train_phase("trunk", phase, params, tmp_path, 0)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [("trunk", 26), ("trunk", 52)]
    again = train.train_phase("trunk", phase, params, tmp_path, 0)
    np.testing.assert_array_equal(again["w"], trained["w"])

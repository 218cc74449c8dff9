import sys
from types import SimpleNamespace

import pytest

from sam2jq.config.distill import DistillConfig
from sam2jq.config.loader import load
from sam2jq.training.metric_logging import metric_logger
from tests.flags import override

NANO = ["--teacher.name", "nano", "--student.name", "nano", "--data.train", "scenes:1", "--data.val", "scenes:2"]
ROW = {"step": 3, "epoch": 1, "train/loss": 0.5, "decisions": [{"layer": "a"}], "bits": {"a": 4}}


def config(*flags):
    return load(None, override(NANO, *flags), DistillConfig)


def test_weights_and_biases_gets_the_numbers_of_a_row_under_its_keys(monkeypatch, tmp_path):
    logged, finished = [], []
    run = SimpleNamespace(log=lambda row, step: logged.append((row, step)), finish=lambda: finished.append(True))
    settings = {}
    wandb = SimpleNamespace(init=lambda **given: settings.update(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = ["--track.project", "sam2", "--track.mode", "offline", "--track.tags", "[a, b]"]
    with metric_logger(config(*flags), tmp_path) as send:
        send(ROW)
    assert logged == [({"step": 3, "epoch": 1, "train/loss": 0.5}, 3)]
    assert finished == [True]
    assert (settings["project"], settings["mode"], settings["tags"], settings["config"]["seed"]) == (
        "sam2",
        "offline",
        ["a", "b"],
        42,
    )


@pytest.mark.parametrize(
    ("flags", "package"),
    [(["--track.project", "sam2"], "wandb"), (["--track.tensorboard", "true"], "tensorboardX")],
    ids=["wandb", "tensorboard"],
)
def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path, flags, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install"), metric_logger(config(*flags), tmp_path):
        pass


def test_nothing_is_sent_where_nothing_is_asked(tmp_path):
    with metric_logger(config(), tmp_path) as send:
        send(ROW)
    assert list(tmp_path.iterdir()) == []

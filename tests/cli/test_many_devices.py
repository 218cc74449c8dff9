"""Commands on several virtual devices and in several processes."""

import json
import re
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import pytest

from sam2jq.cli.main import main
from tests.cli.conftest import failure
from tests.processes import free_port, with_devices

NANO = ["--model.name", "nano"]
COORDINATOR = ["--distributed.coordinator", "127.0.0.1:1", "--distributed.processes", "2", "--distributed.index", "0"]
LAYOUTS = pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 1)], ids=["4 devices", "2 processes"])
IMAGES = ["evaluate", *NANO, "--data", "scenes:2002", "--num_samples", "5"]
VIDEOS = ["evaluate", *NANO, "--data", "scenes:3", "--num_samples", "3", "--task", "vos", "--masks", "false"]
QUANTIZE = ["quantize", *NANO, "--quant.calib", "{path: 'scenes:5', num_samples: 3}", "--quant.wgts.dtype", "uint4"]
QUANTIZE += ["--quant.wgts.kernel_gptq", "{}", "--quant.wgts.target_bits", "4.5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("many")


def where(root: Path, job: str) -> list[str]:
    return ["--output.root", str(root), "--output.job", job, "--cache.root", str(root / f"cache_{job}")]


def metrics(root: Path, job: str) -> dict:
    return json.loads((root / job / "metrics.json").read_text())


def start_many(arguments: list[str], processes: int, devices: int, *own: list[str]) -> list[subprocess.Popen]:
    """The started processes, each with so many virtual devices. own: further arguments of each."""
    place = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", str(processes)]
    indices = [[*place, "--distributed.index", str(index)] if processes > 1 else [] for index in range(processes)]
    command = [sys.executable, "-m", "sam2jq", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": with_devices(devices)}
    return [
        subprocess.Popen([*command, *index, *more], **pipes) for index, more in zip_longest(indices, own, fillvalue=[])
    ]


def run_many(arguments: list[str], processes: int, devices: int) -> list[str]:
    """What the processes print, each with so many virtual devices, without the lines of what connects them."""
    started = start_many(arguments, processes, devices)
    printed = [process.communicate(timeout=600) for process in started]
    assert not any(process.returncode for process in started), printed
    return [re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE) for out, _ in printed]


@pytest.mark.end_to_end
@LAYOUTS
@pytest.mark.parametrize(("task", "command"), [("image", IMAGES), ("vos", VIDEOS)], ids=["image", "vos"])
def test_scores_are_those_of_one_device_and_one_process_writes(task, command, processes, devices, root):
    """To a hundredth of a point: another device may round a pixel at a mask's edge to the other side."""
    if not (root / task).exists():
        assert main([*command, *where(root, task)]) == 0
    job = f"{task}_{processes}_{devices}"
    first, *others = run_many([*command, *where(root, job)], processes, devices)
    assert "written" in first
    assert others == [""] * (processes - 1)
    one, many = metrics(root, task), metrics(root, job)
    if task == "image":
        assert (many["images"], many["instances"]) == (5, one["instances"])
        assert many["miou"] == pytest.approx(one["miou"], abs=1e-4)
    else:
        assert (many["clips"], list(many["scores"])) == (3, list(one["scores"]))
        assert many["j&f"] == pytest.approx(one["j&f"], abs=0.01)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("processes", "devices"),
    [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)],  # each compiles the programs once more
    ids=["2 processes", "4 devices"],
)
def test_a_model_is_quantized_as_on_one_device(processes, devices, root):
    """Errors of the layers' outputs to a hundredth, and masks to half a point: GPTQ rounds a few weights to the other
    side where sums are added in another order."""
    if not (root / "quantize").exists():
        assert main([*QUANTIZE, *where(root, "quantize")]) == 0
    job = f"quantize_{processes}_{devices}"
    first, *others = run_many([*QUANTIZE, *where(root, job)], processes, devices)
    assert "written" in first
    assert others == [""] * (processes - 1)
    one, many = metrics(root, "quantize"), metrics(root, job)
    rows = lambda metrics, key: {row["name"]: row[key] for row in metrics["layers"]}
    assert rows(many, "bits") == rows(one, "bits")
    assert rows(many, "output_error") == pytest.approx(rows(one, "output_error"), rel=1e-2)
    for name in ("mask_iou", "images", "miou_objects"):
        assert many["results"][name] == pytest.approx(one["results"][name], abs=0.005)
    assert many["results"]["miou"]["weights"] == pytest.approx(one["results"]["miou"]["weights"], abs=0.005)
    assert {path.name for path in (root / job).iterdir()} == {path.name for path in (root / "quantize").iterdir()}


@pytest.mark.end_to_end
def test_a_process_that_fails_ends_the_others_in_one_line_that_names_it(root):
    """The second one has no data."""
    begin = time.monotonic()
    started = start_many([*IMAGES[:3], *where(root, "failed")], 2, 1, IMAGES[3:], ["--data", "nowhere"])
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "sam2jq: error: distributed: process 1 failed: nowhere/annotations: no such folder" in errors[0]
    assert errors[1].startswith("sam2jq: error: nowhere/annotations: no such folder")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--task", "vos", "--data", "scenes:3", "--num_samples", "2"], "masks: only one process writes"),
        (["quantize", "--quant.calib.path", "scenes:3", "--convert_onnx", "true"], "convert_onnx: this runs in one"),
        (["quantize", "--quant.calib.path", "scenes:3", "--quant.reconstruct", "{}"], "quant.reconstruct: this runs"),
        (["sweep", "--quant.calib.path", "scenes:3", "--over", "seed=1,2"], "a sweep runs in one process"),
    ],
    ids=["masks", "onnx", "reconstruct", "sweep"],
)
def test_what_runs_in_one_process_is_refused_in_several(arguments, message, capsys, tmp_path):
    assert message in failure(capsys, *arguments, *NANO, *COORDINATOR, "--output.root", str(tmp_path / "out"))


def test_a_process_that_never_comes_is_named(capsys, tmp_path):
    place = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", "2"]
    place += ["--distributed.index", "1", "--distributed.timeout", "1", "--output.root", str(tmp_path / "out")]
    assert "process 1 of 2 waited 1 s for process 0 at" in failure(capsys, *IMAGES, *place)
    assert not (tmp_path / "out").exists()

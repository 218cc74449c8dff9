"""`sam2jq quantize` from end to end, on the demo model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from converters.checkpoint import load_checkpoint
from converters.exports.package import load_package
from converters.exports.vanilla import build_original
from sam2jq import build
from sam2jq.cli.main import main
from sam2jq.config import loader
from tests.flags import override

from .conftest import failure

FILES = {"cache", "config.yaml", "gallery", "metrics.json", "package.pt", "report.html", "run.log", "vanilla.pt"}


@pytest.fixture(scope="module")
def job(flags):
    """The folder of one finished run on image files."""
    assert main(["quantize", *flags, "--output.job", "w4"]) == 0
    return Path(flags[flags.index("--output.root") + 1]) / "w4"


def test_a_run_leaves_a_complete_folder(job):
    assert {path.name for path in job.iterdir()} == FILES
    assert [path.name for path in job.parent.iterdir()] == ["w4"]
    metrics = json.loads((job / "metrics.json").read_text())
    summary = json.loads(json.dumps(load_package(job / "package.pt").summary()))
    assert summary.keys() < metrics.keys()
    assert all(metrics[key] == value for key, value in summary.items() if key != "layers")
    rows = {row["name"]: row for row in metrics["layers"]}
    assert all(row.items() < rows[row["name"]].items() for row in summary["layers"])
    assert len(rows) == 131
    assert metrics["layers"][0]["name"] == "image_encoder.trunk.patch_embed.proj"  # where data enters
    assert all(0 < row["relative_error"] < 0.5 for row in metrics["layers"])
    assert (metrics["results"]["images"], metrics["results"]["prompts_per_image"]) == (2, 16)
    assert 0 < metrics["results"]["mask_iou"] < 1
    assert not metrics["random_weights"]
    assert loader.load(str(job / "config.yaml"), []).quant.wgts.dtype == "sint4"
    assert "mask IoU" in (job / "run.log").read_text()


def test_a_run_ends_with_a_page_and_the_command_that_repeats_it(job, flags):
    metrics = json.loads((job / "metrics.json").read_text())
    assert metrics["command"] == shlex.join(["sam2jq", "quantize", *flags, "--output.job", "w4"])
    assert [shown["why"] for shown in metrics["gallery"]] == ["worst"] * 2 + ["random"] * 2  # there are two images
    ious = [shown["iou"] for shown in metrics["gallery"]]
    assert ious[0] <= ious[1] <= 1
    page = (job / "report.html").read_text()
    assert "nano 2.1, W4A16 per channel" in page
    assert page.count("data:image/") == 4 * 4  # a photograph, both masks and their difference


def test_the_vanilla_file_and_the_package_load_in_the_original_code(job, tmp_path):
    torch.save({"model": load_package(job / "package.pt").state_dict()}, tmp_path / "p.pt")
    one, other = (
        build_original("nano", checkpoint=path).state_dict() for path in (job / "vanilla.pt", tmp_path / "p.pt")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_job_is_never_overwritten(job, flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in job.iterdir()}
    message = failure(capsys, "quantize", *flags, "--output.job", "w4")
    assert "already holds a finished job: remove it, or give --output.job another name" in message
    assert {path: path.stat().st_mtime_ns for path in job.iterdir()} == before


def test_a_run_repeats_to_the_bit(job, flags, capsys):
    leftover = job.with_name(".again.partial")
    leftover.mkdir()
    (leftover / "junk").touch()  # as a killed run leaves it
    assert main(["quantize", *flags, "--output.job", "again"]) == 0
    assert "holds nothing to resume from: starting over" in capsys.readouterr().out
    again = job.with_name("again")
    assert {path.name for path in again.iterdir()} == FILES
    assert not leftover.exists()
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (job, again))
    assert (one["results"], one["layers"]) == (other["results"], other["layers"])
    shutil.rmtree(again)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model.checkpoint", "nothing.pt"], "no checkpoint at nothing.pt"),
        (["--model.name", "tinny"], "model.name 'tinny': allowed are .* did you mean 'tiny'"),
        (["--model.name", "tiny"], r"does not fit the model; it is nano 2\.1: give --model.name nano"),
        (["--model.version", "2.0"], r"it is nano 2\.1: give --model.name nano --model.version 2\.1"),
        (["--quant.calib.num-samples", "3"], "holds 2 images, fewer than num_samples 3"),
        (
            ["--convert-nunchaku", "--quant.rotation.transforms", "[hadamard]"],
            "nunchaku's kernels cannot rotate inputs",
        ),
        (["--convert-onnx", "--quant.ipts.dtype", "uint8"], "convert_onnx: engines have kernels for integer inputs on"),
        (["--quant.wgts.target_bits", "1.5"], "layers have 2 to 8 bits, so 1.5 is out of reach"),
        (["--quant.ipts.dtype", "uint8", "--quant.ipts.static", "true"], r"set group_shapes to \[\[-1, -1\]\]"),
        (["--quant.wgts.group_shapes", "[[1, 0]]"], r"group_shapes \[\[1, 0\]\]: allowed are"),
        (["--quant.wgts.low_rank", "{rank: 999}"], "rank 999"),
        (["--quant.calib.path", "nowhere"], "nowhere: no such file or folder"),
        (["--quant.wgts.dtype", "sint1"], "sint1.*2..8"),
        (["--quant.wgts.skips", "[image_encoder.trunk.blok]"], "no layer under image_encoder.trunk.blok; did you mean"),
        (["--quant.wgts.bts", "{}"], "unknown key quant.wgts.bts; did you mean 'bits'"),
        (["--quant.calib.image_size", "100"], "multiple of 32 pixels, got 100"),
        (["--model.device", "tpu"], "model.device tpu: no such device here"),
        (["--config", "nothing.yaml"], "no config at nothing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_leaves_at_most_the_log_of_a_failed_run(flags, capsys, wrong, message):
    error = failure(capsys, "quantize", *override(flags, *wrong), "--output.job", "bad")
    assert re.search(message, error)
    root = Path(flags[flags.index("--output.root") + 1])
    left = list(root.glob("*bad*"))
    assert left in ([], [root / "bad.failed"])
    for folder in left:
        assert {path.name for path in folder.iterdir()} == {"config.yaml", "run.log"}
        assert re.search(message, (folder / "run.log").read_text())
        shutil.rmtree(folder)


def test_a_program_fault_keeps_its_traceback_in_the_failed_run(flags, capsys, monkeypatch):
    """And names no user's mistake."""
    monkeypatch.setattr("sam2jq.cli.quantize.measure", lambda *_: {}["lost"])
    assert main(["quantize", *flags, "--output.job", "faulty"]) == 1
    assert "program fault: KeyError: 'lost'" in capsys.readouterr().err
    failed = Path(flags[flags.index("--output.root") + 1]) / "faulty.failed"
    assert "KeyError: 'lost'" in (failed / "run.log").read_text()
    assert loader.load(str(failed / "config.yaml"), []).output.job == "faulty"
    shutil.rmtree(failed)


def test_images_that_cannot_be_used_are_named(flags, capsys, tmp_path):
    replace = lambda path: override(flags, "--quant.calib.path", str(path), "--quant.calib.num-samples", "1")
    assert "holds no image" in failure(capsys, "quantize", *replace(tmp_path))
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert "broken.jpg: not a readable image" in failure(capsys, "quantize", *replace(tmp_path))


def test_random_weights_are_named_in_every_output(flags, tmp_path, capsys):
    random = ["--model.name", "nano", "--model.checkpoint", "random:0"]
    places = ["--output.root", str(tmp_path), "--output.job", "r", "--quant.calib.num_samples", "1"]
    assert main(["quantize", *override(flags, *random, *places)]) == 0
    assert "RANDOM" in capsys.readouterr().out
    assert "RANDOM" in (tmp_path / "r" / "run.log").read_text()
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["random_weights"]
    vanilla = load_checkpoint(str(tmp_path / "r" / "vanilla.pt"), build("nano"))
    assert vanilla.random
    assert main(["inspect", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    assert "RANDOM" in printed
    assert "hydra_overrides_extra=['++model.image_encoder.trunk.embed_dim=32'" in printed
    assert main(["segment", "scenes:0/0000", *random, "--points", "1,2", "--out", str(tmp_path / "m.png")]) == 0
    assert "RANDOM" in capsys.readouterr().out

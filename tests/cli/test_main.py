"""The command line from end to end, on the demo model."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from converters.checkpoint import load_checkpoint
from converters.exports.package import load_package
from converters.exports.vanilla import build_original
from sam2jq import build
from sam2jq.cli.main import main
from sam2jq.cli.run_folder import job_folder
from sam2jq.config import loader
from sam2jq.data import draw_clip

FILES = {"cache", "config.yaml", "gallery", "metrics.json", "package.pt", "report.html", "run.log", "vanilla.pt"}


@pytest.fixture(scope="module")
def job(flags):
    """The folder of one finished run."""
    assert main(["quantize", *flags, "--output.job", "w4"]) == 0
    return Path(flags[flags.index("--output.root") + 1]) / "w4"


def failure(capsys, *arguments: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("sam2jq: error: ")
    assert error.count("\n") == 1
    return error


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


def test_inspect_prints_every_layer_and_the_totals(job, capsys):
    assert main(["inspect", str(job)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sam_mask_decoder.output_upscaling.3", "obj_ptr_proj.layers.2"))
    assert "mask IoU" in printed
    assert main(["inspect", str(job / "package.pt")]) == 0


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


def test_only_a_job_with_checkpoints_outlasts_its_error(tmp_path):
    """And only then are other settings refused."""

    def fails(settings: str, *made: str):
        with job_folder(tmp_path / "job", settings) as folder:
            for name in made:
                (folder / name).mkdir(parents=True)
            raise ValueError("on the way")

    for settings in ("one", "other"):
        with pytest.raises(ValueError, match="on the way"):
            fails(settings)
        assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="on the way"):
        fails("one", "checkpoints/3")
    with pytest.raises(FileExistsError, match="holds an unfinished job with other settings"):
        fails("other")
    with pytest.raises(ValueError, match="on the way"):
        fails("one")
    assert (tmp_path / ".job.partial/checkpoints/3").is_dir()


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("vanilla", {"vanilla.pt"}),
        ("safetensors", {"model.safetensors"}),
        ("deepcompressor", {"model.pt", "scale.pt", "smooth.pt", "branch.pt"}),
        ("nunchaku", {"hiera_blocks.safetensors", "unquantized_layers.safetensors"}),
    ],
)
def test_a_package_is_exported_to_other_formats(job, tmp_path, capsys, to, files):
    assert main(["export", "--package", str(job), "--to", to, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == files
    if to in ("vanilla", "safetensors"):
        made, own = (
            load_checkpoint(str(path), build("nano")).params for path in (tmp_path / files.pop(), job / "vanilla.pt")
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, made, own))
    if to == "nunchaku":
        assert "28 linears stood on another grid and were rounded a second time" in capsys.readouterr().out


def test_a_sweep_runs_every_combination_once_and_compares_them(flags, tmp_path, capsys):
    command = ["sweep", *flags, "--output.root", str(tmp_path), "--output.job", "s", "--save_model", "false"]
    command += ["--over", "quant.wgts.dtype=sint8,sint4"]
    assert main(command) == 0
    runs = [tmp_path / "s" / f"quant.wgts.dtype=sint{bits}" for bits in (8, 4)]
    assert set((tmp_path / "s").iterdir()) == {*runs, tmp_path / "s" / "runs.csv", tmp_path / "s" / "report.html"}
    assert not (runs[0] / "vanilla.pt").exists()
    eight, four = (json.loads((folder / "metrics.json").read_text())["results"] for folder in runs)
    assert eight["mask_iou"] > four["mask_iou"]
    assert all(eight["feature_error"][level] < four["feature_error"][level] / 4 for level in four["feature_error"])
    rows = list(csv.DictReader((tmp_path / "s" / "runs.csv").open()))
    assert [row["quant.wgts.dtype"] for row in rows] == ["sint8", "sint4"]
    assert float(rows[0]["MB"]) > float(rows[1]["MB"])

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/metrics.json")}
    assert main(command) == 0  # again: all of it is there
    assert capsys.readouterr().out.count("is finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "was made with another seed: remove it, or give" in failure(capsys, *command, "--seed", "1")
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert out.read_text() == (tmp_path / "s" / "report.html").read_text()


def test_report_of_one_run_is_its_own_page(job, tmp_path, capsys):
    assert main(["report", str(job), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (job / "report.html").read_text()
    assert "no metrics.json: give the folder" in failure(capsys, "report", str(tmp_path), "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("quant.wgts.dtype", "write key=value,value"),
        ("quant.wgts.dtype=sint8,sint1", "sint1.*2..8"),
        ("quant.wgts.dtpe=sint8", "unknown key quant.wgts.dtpe; did you mean 'dtype'"),
        ("quant.wgts.skips=[a", "the values are not YAML"),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(flags, tmp_path, capsys, over, message):
    assert re.search(message, failure(capsys, "sweep", *flags, "--output.root", str(tmp_path), "--over", over))
    assert not list(tmp_path.iterdir())


def test_an_export_of_nothing_is_an_error(tmp_path, capsys):
    error = failure(capsys, "export", "--package", str(tmp_path), "--to", "vanilla", "--out", str(tmp_path / "out"))
    assert "no package at" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model.checkpoint", "nothing.pt"], "no checkpoint at nothing.pt"),
        (["--model.name", "tinny"], "unknown model 'tinny'.*did you mean 'tiny'"),
        (["--model.name", "tiny"], r"does not fit the model; it is nano 2\.1: give --model.name nano"),
        (["--model.version", "2.0"], r"it is nano 2\.1: give --model.name nano --model.version 2\.1"),
        (["--quant.calib.num-samples", "3"], "holds 2 images, fewer than num_samples 3"),
        (["--convert-nunchaku", "--quant.rotation.transforms", "[hadamard]"], "kernels do not rotate"),
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
def test_bad_input_is_one_line_and_leaves_nothing(flags, capsys, wrong, message):
    error = failure(capsys, "quantize", *flags, *wrong, "--output.job", "bad")
    assert re.search(message, error)
    root = Path(flags[flags.index("--output.root") + 1])
    assert not [path for path in root.glob("*bad*")]


def test_images_that_cannot_be_used_are_named(flags, capsys, tmp_path):
    replace = lambda path: [*flags, "--quant.calib.path", str(path), "--quant.calib.num-samples", "1"]
    assert "holds no image" in failure(capsys, "quantize", *replace(tmp_path))
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert "broken.jpg: not a readable image" in failure(capsys, "quantize", *replace(tmp_path))


def test_segment_writes_an_overlay(flags, tmp_path, capsys):
    model, out = flags[:4], tmp_path / "mask.png"
    prompt = ["--points", "100,100", "20,30", "--labels", "1", "0", "--box", "10,10,150,150", "--multimask"]
    assert main(["segment", "scenes:0/0000", *model, *prompt, "--out", str(out)]) == 0
    assert np.asarray(Image.open(out)).shape == (256, 256, 3)
    assert capsys.readouterr().out.count("estimated IoU") == 3
    assert list(tmp_path.iterdir()) == [out]


def test_segment_takes_a_package_and_says_what_it_lacks(job, tmp_path, capsys):
    model = ["--model.name", "nano", "--model.checkpoint", str(job / "package.pt"), "--out", str(tmp_path / "m.png")]
    assert main(["segment", "scenes:0/0000", *model, "--box", "10,10,150,150", "--model.dtype", "bfloat16"]) == 0
    assert "no prompt" in failure(capsys, "segment", "scenes:0/0000", *model)
    assert "1 points but 2 labels" in failure(
        capsys, "segment", "scenes:0/0000", *model, "--points", "1,2", "--labels", "1", "0"
    )
    assert "nothing.jpg" in failure(capsys, "segment", "nothing.jpg", *model, "--points", "1,2")


@pytest.mark.parametrize("name", ["tracked.gif", "strip.png"])
def test_track_writes_every_frame_or_a_strip(flags, tmp_path, name):
    clip = tmp_path / "clip"
    clip.mkdir()
    for i, frame in enumerate(draw_clip(0, 3, 64).frames):
        Image.fromarray(frame).save(clip / f"{i}.png")
    assert main(["track", str(clip), *flags[:4], "--points", "30,30", "--out", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / name) as picture:
        if name.endswith(".gif"):
            assert (picture.n_frames, picture.size) == (3, (64, 64))
        else:
            assert picture.width == 3 * picture.height - 3 * 16  # three squares, and a line of titles above them


def test_track_says_what_it_lacks(flags, tmp_path, capsys):
    model, prompt = flags[:4], ["--points", "30,30"]
    assert "no prompt" in failure(capsys, "track", "scenes:0/0000", *model)
    assert "ends in .gif or" in failure(capsys, "track", "scenes:0/0000", *model, *prompt, "--out", "a.mp4")
    assert "holds no frame" in failure(capsys, "track", str(tmp_path), *model, *prompt)
    assert "the clip has frames 0 to 23" in failure(capsys, "track", "scenes:0/0000", *model, *prompt, "--frame", "99")


def test_a_file_that_is_no_package_is_named(tmp_path, capsys):
    assert "no package at" in failure(capsys, "inspect", str(tmp_path))


def test_random_weights_are_named_in_every_output(flags, tmp_path, capsys):
    random = ["--model.name", "nano", "--model.checkpoint", "random:0"]
    places = ["--output.root", str(tmp_path), "--output.job", "r", "--quant.calib.num_samples", "1"]
    assert main(["quantize", *flags, *random, *places]) == 0
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

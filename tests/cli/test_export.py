"""`sam2jq export`."""

import jax
import numpy as np
import pytest

import sam2jq
from converters.checkpoint import load_checkpoint
from converters.exports import EXPORTS, Export
from sam2jq import build
from sam2jq.cli.main import main

from .conftest import failure


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("vanilla", {"vanilla.pt"}),
        ("safetensors", {"model.safetensors", "config.json", "processor_config.json"}),
        ("compressed-tensors", {"model.safetensors", "config.json", "processor_config.json"}),
        ("deepcompressor", {"model.pt", "scale.pt", "smooth.pt", "branch.pt"}),
        ("nunchaku", {"hiera_blocks.safetensors", "unquantized_layers.safetensors"}),
    ],
)
def test_a_package_is_exported_to_other_formats(job, tmp_path, capsys, to, files):
    assert main(["export", "--package", str(job), "--to", to, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == files
    if to in ("vanilla", "safetensors"):
        made, own = (
            load_checkpoint(str(path), build("nano")).params
            for path in (tmp_path / {"vanilla": "vanilla.pt"}.get(to, "model.safetensors"), job / "vanilla.pt")
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, made, own))
    if to == "nunchaku":
        assert "28 linear layers were on another grid and were rounded a second time" in capsys.readouterr().out


def test_an_export_of_nothing_is_an_error(tmp_path, capsys):
    error = failure(capsys, "export", "--package", str(tmp_path), "--to", "vanilla", "--out", str(tmp_path / "out"))
    assert "no package at" in error
    assert not (tmp_path / "out").exists()


def test_a_target_writes_into_a_folder_that_exists(job, tmp_path, monkeypatch):
    write = lambda out, model, params, metadata: (out / "file").write_text("written")
    monkeypatch.setitem(EXPORTS, "vanilla", Export("file", write))
    out = tmp_path / "new" / "folder"
    assert main(["export", "--package", str(job), "--to", "vanilla", "--out", str(out)]) == 0
    assert (out / "file").read_text() == "written"


def test_a_file_in_place_of_the_folder_is_an_error(job, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    error = failure(capsys, "export", "--package", str(job), "--to", "vanilla", "--out", str(tmp_path / "file"))
    assert "file is not a folder" in error
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("to", ["onnx", "compressed-tensors"])
def test_nearest_rounds_again_what_the_format_refuses_and_names_the_layers(tmp_path, capsys, to):
    model, params = sam2jq.load("random:0", name="nano", image_size=64)
    u8, w4 = sam2jq.QuantSpec(8, symmetric=False), sam2jq.QuantSpec(4, group_size=32)
    small = sam2jq.quantize_activations(u8).apply(sam2jq.rtn(w4).apply(params, {}), {})
    sam2jq.save(tmp_path / "p.safetensors", model, small)
    command = ["export", "--package", str(tmp_path / "p.safetensors"), "--to", to, "--out", str(tmp_path / "out")]
    assert "--nearest" in failure(capsys, *command)
    assert not (tmp_path / "out").exists()
    assert main([*command, "--nearest"]) == 0
    expected = "inputs and outputs not rounded: image_encoder.neck.convs.0.conv, " if to != "onnx" else "and 128 more"
    assert expected in capsys.readouterr().out


def test_nearest_is_an_error_where_nothing_is_refused(tmp_path, capsys):
    out = str(tmp_path / "out")
    error = failure(capsys, "export", "--package", str(tmp_path), "--to", "vanilla", "--out", out, "--nearest")
    assert "--nearest is for compressed-tensors, onnx: vanilla" in error

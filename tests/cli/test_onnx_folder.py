"""Commands with a folder of ONNX files in place of a checkpoint."""

import json
from pathlib import Path

import pytest

import sam2jq
from sam2jq.cli.cost import measure_costs, run_alone
from sam2jq.cli.main import main
from sam2jq.config.quant import CalibConfig, QuantConfig
from sam2jq.config.run import CacheConfig, Config, ModelConfig
from sam2jq.errors import UserError

from .conftest import failure

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ENGINE = ["--engine", "onnxruntime"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The flag for a folder of the demo model at 64 pixels."""
    path = tmp_path_factory.mktemp("onnx")
    sam2jq.save(path / "p.safetensors", *sam2jq.load("demo", image_size=64))
    assert main(["export", "--package", str(path / "p.safetensors"), "--to", "onnx", "--out", str(path / "out")]) == 0
    return ["--model.checkpoint", str(path / "out")]


def test_segment_runs_onnx_files(checkpoint, tmp_path, capsys):
    command = [
        "segment",
        "scenes:0/0000",
        *checkpoint,
        *ENGINE,
        "--points",
        "100,100",
        "--out",
        str(tmp_path / "m.png"),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "onnxruntime " in out
    assert "estimated IoU" in out


def test_what_openvino_compiled_is_cached(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    settings = ["--engine", "openvino", "--cache.root", str(tmp_path / "cache"), "--out", str(tmp_path / "m.png")]
    assert main(["segment", "scenes:0/0000", *checkpoint, "--points", "100,100", *settings]) == 0
    assert list((tmp_path / "cache" / "openvino").glob("*.blob"))


def test_evaluate_scores_onnx_files_on_images(checkpoint, tmp_path):
    settings = ["--data", "scenes:1001", "--num-samples", "1", "--output.root", str(tmp_path), "--output.job", "scores"]
    assert main(["evaluate", *checkpoint, *ENGINE, *settings]) == 0
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scores["images"] == 1
    assert 0 < scores["miou"]["box"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.name", "tiny"], "model.name tiny: .* holds a model with nano: leave it out"),
        (["--model.image_size", "256"], "model.image_size 256: .* holds a model with 64: leave it out"),
        (["--model.device", "cuda"], "model.device cuda: ONNX files run on the CPU: use auto"),
        (["--model.dtype", "float16"], "dtype 'float16': allowed are auto, float32, bfloat16"),
        (["--engine", "tensorrt"], "engine 'tensorrt': allowed are auto, openvino, onnxruntime"),
    ],
)
def test_a_setting_that_the_files_contradict_is_an_error(checkpoint, capsys, flags, message):
    assert_match(message, failure(capsys, "segment", "scenes:0/0000", *checkpoint, "--points", "9,9", *flags))


def test_everything_needs_the_package(checkpoint, capsys):
    error = failure(capsys, "segment", "scenes:0/0000", *checkpoint, "--everything")
    assert_match("holds ONNX files, which only segment .with prompts.", error)


def test_other_commands_ask_for_the_package(checkpoint, capsys):
    error = failure(capsys, "quantize", *checkpoint, "--quant.calib.path", "scenes:0", "--quant.calib.num-samples", "1")
    assert_match("holds ONNX files, which only segment .*, track and evaluate run: give the package", error)


def assert_match(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_the_cost_of_files_is_that_of_a_process_without_jax(checkpoint):
    settings = {"checkpoint": checkpoint[1], "engine": "onnxruntime", "dtype": "auto"}
    cost = run_alone(settings)
    assert cost["seconds"] > 0
    assert 0.03 < cost["peak_gb"] < 0.3  # importing jax alone takes 0.2 GB more
    with pytest.raises(UserError, match="engine 'tensorrt'"):
        run_alone(settings | {"engine": "tensorrt"})


def test_the_cost_of_a_program_that_fails_is_left_out_and_files_of_the_current_folder_are_not_run(
    checkpoint, tmp_path, monkeypatch, caplog
):
    (tmp_path / "statistics.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    model = ModelConfig("nano", checkpoint="random:0", image_size=64)
    config = Config(model, cache=CacheConfig(root=str(tmp_path)), quant=QuantConfig(calib=CalibConfig("scenes:7")))
    with caplog.at_level("WARNING", "sam2jq"):
        costs = measure_costs(config, Path(checkpoint[1]), ["onnxruntime", "tensorrt"])
    assert set(costs) == {"full precision", "onnxruntime"}
    assert costs["onnxruntime"]["megabytes"] > 1
    assert "the cost in tensorrt is left out: " in caplog.text


@pytest.mark.slow
def test_quantize_measures_the_files_that_it_writes(tmp_path):
    images = ["--quant.calib.path", "scenes:7", "--quant.calib.num-samples", "2", "--quant.wgts.dtype", "sint8"]
    inputs = ["--quant.ipts.dtype", "uint8", "--quant.ipts.static", "true", "--quant.ipts.group_shapes", "[[-1,-1]]"]
    where = ["--output.root", str(tmp_path), "--output.job", "w8a8", "--cache.root", str(tmp_path / "cache")]
    assert main(["quantize", "--model.name", "nano", "--convert-onnx", *images, *inputs, *where]) == 0
    results = json.loads((tmp_path / "w8a8" / "metrics.json").read_text())["results"]
    miou = results["miou"]
    assert miou["onnxruntime"]["box"] == pytest.approx(miou["inputs"]["box"], abs=0.02)
    assert {"full precision", "onnxruntime"} <= set(results["cost"])
    assert results["cost"]["onnxruntime"]["peak_gb"] < results["cost"]["full precision"]["peak_gb"]
    assert (tmp_path / "w8a8" / "onnx" / "model.json").is_file()
    assert "onnxruntime" in (tmp_path / "w8a8" / "report.html").read_text()

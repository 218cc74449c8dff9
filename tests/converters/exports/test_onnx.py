"""The ONNX files of a whole model, and the predictors that run them: masks as ours, in each engine."""

import json
import subprocess
import sys

import numpy as np
import pytest

import sam2jq
from sam2jq.cli.main import main
from sam2jq.data import draw_scene
from sam2jq.deploy import OnnxImagePredictor
from sam2jq.deploy.engines import ENGINES, choose_engine
from sam2jq.errors import UserError
from sam2jq.models.sam2 import image_params
from sam2jq.quant.algorithms.activations import quantize_activations
from sam2jq.tree import flatten, unflatten
from tests.conftest import relative

pytest.importorskip("onnx")
W4 = sam2jq.QuantSpec(4, group_size=32)
SCENE = draw_scene(0, 90)
LOGITS = np.random.default_rng(0).normal(0, 9, (2, 1, 16, 16)).astype(np.float32)
PROMPTS = {  # few, as each compiles a program of ours
    "boxes": {"box": [[10, 10, 60, 60], [0, 5, 30, 20]], "multimask_output": False, "return_logits": True},
    "clicks and masks": {"point_coords": [[[20, 30]], [[9, 9]]], "point_labels": [[1], [0]], "mask_input": LOGITS},
    "a mask alone": {"mask_input": LOGITS[0]},
    "no box": {"box": np.zeros((0, 4))},
}


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def small():
    """The demo model at 64 pixels with some linear layers in 4 bits."""
    model, params = sam2jq.load("demo", image_size=64)
    chosen = [layer for layer in sam2jq.layers(params) if "blocks.0" in layer or "transformer.layers.1.mlp" in layer]
    return model, sam2jq.round_weights(params, dict.fromkeys(chosen, W4))


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx")
    sam2jq.save(path / "p.safetensors", *small)
    assert main(["export", "--package", str(path / "p.safetensors"), "--to", "onnx", "--out", str(path / "out")]) == 0
    return path / "out"


@pytest.fixture(scope="module")
def ours(small):
    predictor = sam2jq.ImagePredictor(*small)
    predictor.set_image(SCENE.image)
    return predictor


def test_each_prompt_gets_the_masks_of_our_predictor(folder, ours, engine):
    predictor = OnnxImagePredictor(folder, engine, dtype="float32")
    predictor.set_image(SCENE.image)
    assert relative(predictor.get_image_embedding(), ours.get_image_embedding()) < 1e-5
    for name, prompt in PROMPTS.items():
        for got, expected in zip(predictor.predict(**prompt), ours.predict(**prompt)):
            assert got.shape == expected.shape, name
            assert got.dtype == np.float32, name
            assert np.abs(got - expected).max(initial=0) < 1e-3, name


def test_the_description_names_the_model_the_files_and_what_was_quantized(folder):
    about = json.loads((folder / "model.json").read_text())
    assert about["model"] == {"name": "nano", "version": "2.1", "image_size": 64}
    assert {f"{name}.onnx" for name in ("image_encoder", "prompt_mask_decoder")} <= about["files"].keys()
    assert about["files"]["prompt_mask_decoder.onnx"]["inputs"]["point_coords"] == ["prompts", "points", 2]
    layer = about["layers"]["image_encoder.trunk.blocks.0.attn.qkv"]
    assert layer == {"dtype": "sint4", "group": "32", "inputs": None, "around": [], "rank": 0}
    assert about["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_an_image_only_model_is_exported_for_images(small, tmp_path):
    from converters.exports.onnx.write import save_onnx

    model, params = small
    kept = flatten(image_params(model))
    params = unflatten({path: leaf for path, leaf in flatten(params).items() if path in kept})
    about = {"model": sam2jq.api.describe_model(model), "random_weights": True}
    save_onnx(tmp_path, model, params, about)
    assert {path.name for path in tmp_path.iterdir()} == {
        "image_encoder.onnx",
        "prompt_mask_decoder.onnx",
        "model.json",
    }


def test_dynamic_activations_are_refused_and_nothing_is_left(small, tmp_path, capsys):
    model, params = small
    layers = ["image_encoder.trunk.blocks.0.attn.qkv"]
    rounded = quantize_activations(dict.fromkeys(layers, sam2jq.QuantSpec(8))).apply(params, {})
    sam2jq.save(tmp_path / "p.safetensors", model, rounded)
    out = tmp_path / "out"
    assert main(["export", "--package", str(tmp_path / "p.safetensors"), "--to", "onnx", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "blocks.0.attn.qkv: activations are rounded on a grid of each call's own" in error
    assert "quant.ipts.static true" in error
    assert not list(out.iterdir())


@pytest.fixture
def copied(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_damaged_folder_is_refused_by_name(copied):
    pytest.importorskip("onnxruntime")
    encoder, about = copied / "image_encoder.onnx", copied / "model.json"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="image_encoder.onnx is not the file that model.json describes"):
        OnnxImagePredictor(copied)
    encoder.unlink()
    with pytest.raises(UserError, match="image_encoder.onnx is missing: write the folder again"):
        OnnxImagePredictor(copied)
    about.write_text(about.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="has format sam2jq-onnx 9, this sam2jq reads sam2jq-onnx 1"):
        OnnxImagePredictor(copied)
    about.write_text('{"model_type": "sam2"}')
    with pytest.raises(UserError, match="model.json does not describe ONNX files of sam2jq"):
        OnnxImagePredictor(copied)
    about.unlink()
    with pytest.raises(UserError, match="has no model.json: give the folder that sam2jq export --to onnx wrote"):
        OnnxImagePredictor(copied)


def test_an_engine_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("sam2jq.deploy.engines.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need openvino, which is missing: pip install 'sam2jq\[openvino\]'"):
        choose_engine("openvino")
    with pytest.raises(UserError, match=r"an engine, which is missing: .*openvino.* or .*sam2jq\[onnxruntime\]"):
        choose_engine("auto")
    with pytest.raises(UserError, match="engine 'tensorrt': allowed are auto, openvino, onnxruntime"):
        choose_engine("tensorrt")


def test_bfloat16_is_refused_where_the_engine_has_none(folder):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="bfloat16: onnxruntime computes in float32"):
        OnnxImagePredictor(folder, "onnxruntime", dtype="bfloat16")
    with pytest.raises(UserError, match="dtype 'float16': allowed are auto, float32, bfloat16"):
        OnnxImagePredictor(folder, dtype="float16")


def test_the_predictor_imports_neither_jax_nor_torch_nor_scipy(folder, engine):
    program = """
import sys
for name in ("jax", "flax", "torch", "scipy", "matplotlib"):
    sys.modules[name] = None
import numpy as np
from sam2jq.deploy import OnnxImagePredictor
predictor = OnnxImagePredictor(sys.argv[1], sys.argv[2])
predictor.set_image(np.zeros((50, 40, 3), np.uint8))
assert predictor.predict(point_coords=[[20, 20]], point_labels=[1])[0].shape == (3, 50, 40)
"""
    command = [sys.executable, "-c", program, str(folder), engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

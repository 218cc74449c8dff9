"""The table of export targets, and exports of packages."""

import pytest

import sam2jq
from converters.exports import EXPORTS
from converters.exports.deepcompressor import load_deepcompressor
from converters.names import to_torch
from sam2jq.cli.main import main
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.qtensor import quantize
from sam2jq.tree import flatten, kernels, layer_name, unflatten

WRITTEN = {
    "vanilla": {"vanilla.pt"},
    "safetensors": {"model.safetensors", "config.json", "processor_config.json"},
    "compressed-tensors": {"model.safetensors", "config.json", "processor_config.json"},
    "deepcompressor": {"model.pt", "scale.pt", "smooth.pt", "branch.pt"},
    "nunchaku": {"hiera_blocks.safetensors", "unquantized_layers.safetensors"},
    "onnx": {
        *("image_encoder.onnx", "prompt_mask_decoder.onnx"),
        *("memory_attention.onnx", "memory_encoder.onnx", "mask_prompt.onnx", "model.json"),
    },
}
W4 = sam2jq.QuantSpec(4, group_size=64)


@pytest.fixture(scope="module")
def demo():
    model, params = sam2jq.load("demo")
    return model, sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), W4))


def test_every_target_has_its_line_of_help():
    assert EXPORTS.keys() == WRITTEN.keys()
    assert all(export.help for export in EXPORTS.values())


@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_package_saved_by_the_api_can_be_exported(tmp_path, demo, target, suffix):
    if target == "onnx":
        pytest.importorskip("onnx")
    sam2jq.save(tmp_path / f"small{suffix}", *demo)
    command = ["export", "--package", str(tmp_path / f"small{suffix}"), "--to", target, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN[target]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_package_saved_by_the_api_can_be_inspected(tmp_path, demo, capsys, suffix):
    sam2jq.save(tmp_path / f"small{suffix}", *demo)
    assert main(["inspect", str(tmp_path / f"small{suffix}")]) == 0
    assert "model       nano 2.1" in capsys.readouterr().out


def test_a_rotated_package_is_exported_to_deepcompressor(tmp_path, demo):
    model, params = demo
    flat = flatten(sam2jq.load("demo")[1])
    path = next(path for path in kernels(flat) if layer_name(path).endswith("blocks.0.attn.qkv"))
    leaf = Rotated(Smoothed(quantize(flat[path], W4), 2 * flat[path][:, 0] ** 2 + 1), None)
    rotated = unflatten(flatten(params) | {path: leaf})
    sam2jq.save(tmp_path / "small.safetensors", model, rotated)
    out = tmp_path / "out"
    command = ["export", "--package", str(tmp_path / "small.safetensors"), "--to", "deepcompressor", "--out", str(out)]
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN["deepcompressor"] | {"rotation.pt"}
    got, expected = load_deepcompressor(out), to_torch(materialize_params(rotated))
    assert all(abs(got[key] - expected[key]).max() <= 1e-5 for key in expected)

from itertools import cycle

import jax
import numpy as np
import pytest
import torch

from converters.exports.package import dequantize as dequantize_layer
from converters.exports.package import load_package, save_package
from converters.exports.vanilla import build_original, save_vanilla
from sam2jq import QuantSpec, build, dequantize, init_params, layers
from sam2jq.predictors.image import encode_images
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.package import complete_metadata
from sam2jq.tree import flatten
from tests.conftest import nchw, nhwc, relative, twin

METADATA = {"model": {"name": "nano", "version": "2.1", "image_size": 256}, "random_weights": True}
SPECS = [QuantSpec(4), QuantSpec(3, group_size=100), QuantSpec(8, symmetric=False), QuantSpec(2, per_tensor=True)]


@pytest.fixture
def nano():
    return init_params(build("nano"), 0)


def test_a_package_holds_every_tensor_of_the_quantized_model(tmp_path, nano):
    quantized = round_weights(nano, dict(zip(layers(nano), cycle(SPECS))))
    errors = dict.fromkeys(layers(nano), 0.25)
    save_package(tmp_path / "p.pt", quantized, errors, METADATA)
    save_vanilla(tmp_path / "v.pt", quantized)
    package = load_package(tmp_path / "p.pt")
    vanilla = torch.load(tmp_path / "v.pt", weights_only=True)["model"]
    state_dict = package.state_dict()
    assert state_dict.keys() == vanilla.keys()
    assert all(torch.equal(state_dict[key], vanilla[key]) for key in vanilla)

    name = "sam_mask_decoder.output_upscaling.0"
    assert torch.equal(dequantize_layer(package.layers[name]), vanilla[f"{name}.weight"])
    for path, leaf in flatten(quantized).items():
        if path.endswith("/kernel"):
            layer = package.layers[path.removesuffix("/kernel").replace("/", ".")]
            got, expected = jax.tree.leaves(layer.leaf()), jax.tree.leaves(leaf)
            assert all(map(np.array_equal, got, expected))
            assert got[0].dtype == expected[0].dtype
            assert layer.error == 0.25


def test_a_package_loads_strictly_in_build_sam2(tmp_path, nano):
    quantized = round_weights(nano, {"image_encoder.trunk.blocks.0.attn.qkv": QuantSpec(4)})
    save_package(tmp_path / "p.pt", quantized, {"image_encoder.trunk.blocks.0.attn.qkv": 0.1}, METADATA)
    package = load_package(tmp_path / "p.pt")
    torch.save({"model": package.state_dict()}, tmp_path / "v.pt")
    original = build_original("nano", checkpoint=tmp_path / "v.pt").state_dict()
    assert original.keys() == package.state_dict().keys()
    assert package.metadata == complete_metadata(METADATA, "")


@pytest.mark.slow  # test_vanilla.py compares masks of such a file
@torch.no_grad()
def test_the_vanilla_file_computes_what_the_quantized_model_computes(tmp_path):
    pair = twin("tiny", "2.1", 256)
    quantized = round_weights(pair.params, dict.fromkeys(layers(pair.params), QuantSpec(4)))
    save_vanilla(tmp_path / "v.pt", quantized)
    image = np.random.default_rng(0).standard_normal((1, 256, 256, 3)).astype(np.float32)
    expected = build_original("tiny", "2.1", 256, tmp_path / "v.pt").forward_image(nchw(image))["backbone_fpn"]
    got = pair._replace(params=quantized).apply("encode_image", image)
    before = pair.torch.forward_image(nchw(image))["backbone_fpn"]
    for x, y, z in zip(got, expected, before, strict=True):
        assert relative(x, nhwc(y)) <= 1e-4
        assert relative(nhwc(z), nhwc(y)) > 1e-2  # quantization to 4 bits changes the output


@pytest.mark.slow
def test_tiny_with_four_bits_takes_at_most_20_6_megabytes(tmp_path):
    params = init_params(build("tiny"), 0)
    quantized = round_weights(params, dict.fromkeys(layers(params), QuantSpec(4)))
    save_package(tmp_path / "p.pt", quantized, dict.fromkeys(layers(params), 0.1), METADATA)
    assert (tmp_path / "p.pt").stat().st_size <= 20.6e6
    summary = load_package(tmp_path / "p.pt").summary()
    assert summary["parameters"] == 38_962_754
    assert 4 < summary["effective_bits"] < 4.1


def test_quantized_leaves_compute_the_same_as_their_dequantized_weights(nano):
    model = build("nano")
    quantized = round_weights(nano, dict.fromkeys(layers(nano), QuantSpec(4)))
    image = np.random.default_rng(0).standard_normal((1, 256, 256, 3)).astype(np.float32)
    one, other = encode_images(model, quantized, image), encode_images(model, materialize_params(quantized), image)
    assert max(relative_error(x, y) for x, y in zip(one, other, strict=True)) <= 1e-6
    out_proj = lambda params: params["memory_encoder"]["out_proj"]["kernel"]
    np.testing.assert_array_equal(out_proj(materialize_params(quantized)), dequantize(out_proj(quantized)))


def test_an_invalid_package_is_an_error_that_names_the_problem(tmp_path, nano):
    path = tmp_path / "p.pt"
    with pytest.raises(FileNotFoundError, match="no package at"):
        load_package(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is not a sam2jq package"):
        load_package(path)
    name = "memory_encoder.out_proj"
    save_package(path, round_weights(nano, {name: QuantSpec(4)}), {name: 0.1}, METADATA)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format_version": 99}, path)
    with pytest.raises(ValueError, match="package version 99, this sam2jq reads 2"):
        load_package(path)
    content["layers"][name]["leaf"]["codes"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(content, path)
    with pytest.raises(ValueError, match="memory_encoder.out_proj has 3 bytes of codes, not 512: damaged"):
        load_package(path)

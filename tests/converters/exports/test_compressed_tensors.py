"""Folders for transformers with linear layers in codes: what the `compressed-tensors` package makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import sam2jq
from converters.exports import EXPORTS
from converters.exports.compressed_tensors import layer_tensors, nearest_leaf, scheme, why_refused
from converters.exports.vanilla import define_torchvision_operators
from sam2jq.api import describe_model
from sam2jq.data import draw_scene
from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import is_bare, materialize, matmul, unwrap
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, unflatten
from tests.conftest import relative

WIDTH, OUTPUTS = 72, 24  # WIDTH is no multiple of most group sizes
RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)
U8, U8_TENSOR = QuantSpec(8, False), QuantSpec(8, False, per_tensor=True)
GROUPS = ({}, {"group_size": 16}, {"group_size": 24}, {"group_size": 128}, {"per_tensor": True})


@pytest.fixture(scope="module")
def package():
    define_torchvision_operators()
    return pytest.importorskip("compressed_tensors")


def as_linear(leaf) -> torch.nn.Linear:
    """A linear layer that the package made of what we store of a leaf."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(WIDTH, OUTPUTS, bias=False)})
    group = scheme(leaf) | {"targets": ["layer"]}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group": group}, quantization_status="frozen"))
    for name, array in layer_tensors(leaf).items():
        tensor = torch.from_numpy(np.array(array, order="C"))
        model["layer"].register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    BaseCompressor.get_value_from_registry(group["format"]).decompress_module(model["layer"])
    return model["layer"]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_package_reads_each_weight_to_the_bit(package, bits, symmetric, groups):
    weight = quantize(KERNEL, QuantSpec(bits, symmetric, **groups))
    np.testing.assert_array_equal(as_linear(weight).weight.detach().numpy().T, dequantize(weight))


@pytest.mark.parametrize("spec", [U8, QuantSpec(8, False, 24), QuantSpec(5, False), U8_TENSOR], ids=str)
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_with_rounded_inputs_computes_what_ours_does(package, spec, static):
    """Inputs lie near codes, among them the first and the last, so that no rounding error moves one to another."""
    if static and not spec.per_tensor:
        pytest.skip("fixed grids are per tensor")
    scale, zero_point = np.float32(0.03), np.float32(100 if spec.bits == 8 else 12)
    codes = RNG.integers(0, spec.qmax + 1, (2, 3, 4, WIDTH)) + RNG.uniform(-0.3, 0.3, (2, 3, 4, WIDTH))
    codes[..., ::12], codes[..., 1::12] = 0, spec.qmax
    x = ((codes - zero_point) * scale).astype(np.float32)
    grid = (scale, zero_point) if static else (None, None)
    leaf = ActQuantized(quantize(KERNEL, QuantSpec(8)), *grid, spec)
    got = as_linear(leaf)(torch.from_numpy(x)).detach().numpy()
    assert relative(got, matmul(leaf, x)) < 1e-6
    assert relative(x @ np.asarray(dequantize(leaf.inner)), matmul(leaf, x)) > 1e-3  # rounding is seen


@pytest.fixture(scope="module")
def demo():
    return sam2jq.load("demo")


def masks(folder) -> np.ndarray:
    import transformers

    model = transformers.Sam2Model.from_pretrained(folder).eval()
    processor = transformers.Sam2Processor.from_pretrained(folder)
    click = {"input_points": [[[[75, 60]]]], "input_labels": [[[1]]]}
    with torch.no_grad():
        return model(**processor(images=draw_scene(3).image, return_tensors="pt", **click)).pred_masks.numpy()


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        (QuantSpec(4, False, 32), 0.29),
        pytest.param(QuantSpec(4, group_size=32), 0.26, marks=pytest.mark.slow),
        pytest.param(QuantSpec(8), 0.35, marks=pytest.mark.slow),
    ],
)
def test_transformers_computes_the_masks_of_the_equivalent_weights(package, demo, tmp_path, spec, share):
    model, params = demo
    small = sam2jq.rtn(spec).apply(params, {})
    about = {"model": describe_model(model), "random_weights": False}
    sizes = []
    for name in ("compressed-tensors", "safetensors"):
        (tmp_path / name).mkdir()
        EXPORTS[name].write(tmp_path / name, model, small, about)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    np.testing.assert_array_equal(masks(tmp_path / "compressed-tensors"), masks(tmp_path / "safetensors"))
    assert sizes[0] < share * sizes[1]


WEIGHT = quantize(KERNEL, QuantSpec(4))
CONV = quantize(RNG.standard_normal((3, 3, 4, 8)).astype(np.float32), QuantSpec(4))
REFUSED = {
    "a weight inside Smoothed": Smoothed(WEIGHT, np.ones(WIDTH, np.float32)),
    "without quant.smooth": ActQuantized(LowRank(WEIGHT, KERNEL[:, :4], KERNEL[:4]), None, None, U8),
    "quantize without quant.opts": OutQuantized(WEIGHT, U8),
    "its weight is fp4": quantize(KERNEL, QuantSpec(4, codes="float")),
    "inputs are sint8": ActQuantized(WEIGHT, None, None, QuantSpec(8)),
    "no multiple of groups of 10": ActQuantized(WEIGHT, None, None, QuantSpec(8, False, 10)),
    "no inputs of a convolution": ActQuantized(CONV, None, None, U8),
    "without a weight in codes": ActQuantized(KERNEL, None, None, U8),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_package_cannot_hold_is_refused_or_rounded_again(why):
    leaf = REFUSED[why]
    assert why in why_refused(leaf)
    again = nearest_leaf(leaf)
    assert why_refused(again) == ""
    weight, around = unwrap(again)
    assert relative(materialize(again), materialize(leaf)) < 0.2  # of one more rounding to 4 bits
    assert around.keys() == ({ActQuantized} if isinstance(leaf, ActQuantized) and "quant.smooth" in why else set())
    assert is_bare(weight)


def test_a_fixed_grid_of_smoothed_inputs_is_left_out():
    leaf = Smoothed(ActQuantized(WEIGHT, np.float32(0.1), np.float32(3), U8_TENSOR), np.full(WIDTH, 2, np.float32))
    assert is_bare(nearest_leaf(leaf))
    assert isinstance(nearest_leaf(replace(leaf, inner=replace(leaf.inner, scale=None, zero_point=None))), ActQuantized)


def test_our_own_loader_names_what_the_folder_holds(demo, tmp_path):
    model, params = demo
    about = {"model": describe_model(model), "random_weights": False}
    EXPORTS["compressed-tensors"].write(tmp_path, model, sam2jq.rtn(QuantSpec(4)).apply(params, {}), about)
    with pytest.raises(UserError, match="holds weights in codes of compressed-tensors .*: give the package"):
        sam2jq.load(tmp_path)


def test_the_error_names_the_layers_and_the_way_out(demo, tmp_path):
    model, params = demo
    flat = flatten(sam2jq.rtn(QuantSpec(4)).apply(params, {}))
    path = next(path for path, leaf in kernels(flat).items() if leaf.qvalue.ndim == 2)
    flat[path] = Smoothed(flat[path], np.ones(len(flat[path].qvalue), np.float32))
    with pytest.raises(UserError, match=r"attn\.proj: .* inside Smoothed: .*; or round them again with --nearest"):
        EXPORTS["compressed-tensors"].write(tmp_path, model, unflatten(flat), {"model": describe_model(model)})
    with pytest.raises(UserError, match="no linear layer has a weight in codes: export to safetensors"):
        EXPORTS["compressed-tensors"].write(tmp_path, model, params, {"model": describe_model(model)})
    assert not list(tmp_path.iterdir())

"""The files for deepcompressor hold the weights, scales, factors and signs of a quantized model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.checkpoint import load_checkpoint, save_checkpoint
from converters.exports.deepcompressor import load_deepcompressor, save_deepcompressor
from converters.names import to_torch
from sam2jq.errors import UserError
from sam2jq.models.sam2 import build, init_params
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, unflatten

W4 = QuantSpec(4, group_size=16)
BLOCK = "image_encoder.trunk/blocks.0"
MODULE = BLOCK.replace("/", ".")
STYLES = pytest.mark.parametrize("names", ["original", "huggingface"])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def branch(inner, shape: tuple[int, ...], rank: int = 4) -> LowRank:
    return LowRank(inner, 0.1 * normal(1, *shape[:-1], rank), normal(2, rank, shape[-1]))


@pytest.fixture(scope="module")
def nano():
    return init_params(build("nano"), 0)


@pytest.fixture(scope="module")
def quantized(nano):
    """nano with every class of leaf: rotated with and without signs, smoothed, with branches on convolutions too."""
    flat = flatten(nano)
    qkv, proj, fc1, fc2 = (
        f"{BLOCK}/{name}/kernel" for name in ("attn/qkv", "attn/proj", "mlp/layers.0", "mlp/layers.1")
    )
    conv, up = "image_encoder.neck/convs.0.conv/kernel", "sam_mask_decoder/output_upscaling.0/kernel"
    leaves = {path: quantize(flat[path], W4) for path in (qkv, proj, fc1, fc2, conv, up)}
    signs, scale = jnp.sign(normal(3, 32)), jnp.exp(normal(4, 32))
    act = ActQuantized(leaves[qkv], None, None, QuantSpec(8, False))
    leaves[qkv] = OutQuantized(Rotated(Smoothed(branch(act, flat[qkv].shape), scale), signs), QuantSpec(8))
    leaves[proj] = Rotated(branch(leaves[proj], flat[proj].shape), None)
    leaves[fc1] = Smoothed(leaves[fc1], scale)
    leaves[fc2] = Rotated(leaves[fc2], jnp.sign(normal(5, 128)))
    leaves |= {path: branch(leaves[path], flat[path].shape) for path in (conv, up)}
    return unflatten(flat | leaves)


@STYLES
def test_the_five_files_represent_the_materialized_weights(tmp_path, quantized, names):
    """To 1e-6: the products are float32 in both."""
    save_deepcompressor(tmp_path, quantized, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.pt" for name in ("model", "scale", "smooth", "branch", "rotation")
    )
    expected, got = to_torch(materialize_params(quantized)), load_deepcompressor(tmp_path)
    assert got.keys() == expected.keys()
    assert all(got[key].shape == expected[key].shape for key in got)
    assert max(relative_error(got[key].numpy(), expected[key].numpy()) for key in got if expected[key].any()) <= 1e-6


def test_the_model_file_holds_the_dequantized_weights_and_the_rotation_file_the_signs(tmp_path, quantized):
    save_deepcompressor(tmp_path, quantized, "original")
    model, smooth, branches, rotation = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("model", "smooth", "branch", "rotation")
    )
    leaf = flatten(quantized)[f"{BLOCK}/mlp/layers.1/kernel"]
    np.testing.assert_array_equal(model[f"{MODULE}.mlp.layers.1.weight"].numpy().T, dequantize(leaf.inner))
    np.testing.assert_array_equal(rotation[f"{MODULE}.mlp.layers.1"].numpy(), leaf.signs)
    assert rotation[f"{MODULE}.attn.proj"] is None
    assert rotation.keys() == {f"{MODULE}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.layers.1")}
    assert smooth.keys() == {f"{MODULE}.{name}" for name in ("attn.qkv", "mlp.layers.0")}
    assert branches[f"{MODULE}.attn.qkv"]["a.weight"].shape == (4, 32)


@STYLES
def test_without_a_rotation_there_are_four_files(tmp_path, nano, names):
    save_deepcompressor(tmp_path, nano, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["branch.pt", "model.pt", "scale.pt", "smooth.pt"]
    got = load_deepcompressor(tmp_path)
    assert all(torch.equal(got[key], x) for key, x in to_torch(nano).items())


def test_an_unsupported_order_of_leaves_is_an_error(tmp_path, nano):
    path = f"{BLOCK}/attn/qkv/kernel"
    flat = flatten(nano)
    leaf = Smoothed(Rotated(flat[path], None), jnp.ones(32))
    with pytest.raises(UserError, match=r"blocks.0.attn.qkv: .*Rotated > Smoothed > LowRank .* not Smoothed > Rotated"):
        save_deepcompressor(tmp_path, unflatten(flat | {path: leaf}), "original")
    assert not list(tmp_path.iterdir())


def test_model_pt_is_refused_as_a_checkpoint(nano, quantized, tmp_path):
    """Its weights lack smoothing, rotation and branches, and would load as those of a plain model."""
    save_deepcompressor(tmp_path / "cache", quantized, "original")
    with pytest.raises(UserError, match=r"cache/model.pt is one of .* wrong results: .*; give the package of its run$"):
        load_checkpoint(str(tmp_path / "cache" / "model.pt"), build("nano"))
    (tmp_path / "package.pt").touch()
    with pytest.raises(UserError, match=rf"beside it; give {tmp_path}/package.pt$"):
        load_checkpoint(str(tmp_path / "cache" / "model.pt"), build("nano"))
    save_checkpoint(tmp_path / "model.pt", nano)
    load_checkpoint(str(tmp_path / "model.pt"), build("nano"))

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from converters import hf
from converters.exports.nunchaku import pack_layer
from converters.exports.nunchaku_model import (
    BLOCKS,
    GRID,
    REST,
    is_on_grid,
    kernel_output,
    load_nunchaku,
    read_kernel,
    requantize_to_grid,
    round_factors,
    save_nunchaku,
    to_layer,
)
from converters.names import to_torch
from sam2jq import QuantSpec, build, init_params
from sam2jq.models.sam2 import TRUNK_LINEAR
from sam2jq.quant.algorithms.activations import fake_quantize
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import rotate_kernel
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize, unwrap
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.tree import flatten, kernels, layer_name, unflatten

ABOUT = {"name": "nano"}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@partial(jax.jit, static_argnames=("spec", "rank"))
def leaf(w: jax.Array, spec: QuantSpec = GRID, rank: int = 4):
    """`w` smoothed, with a low-rank branch and a quantized residual."""
    scale = jnp.array(np.random.default_rng(len(w)).uniform(0.5, 2, len(w)), jnp.float32)
    down, up = 0.1 * normal(1, len(w), rank), normal(2, rank, w.shape[1])
    ready = round_factors(Smoothed(LowRank(w * scale[:, None] - down @ up, down, up), scale))
    return Smoothed(LowRank(quantize(ready.inner.inner, spec), ready.inner.down, ready.inner.up), ready.scale)


@pytest.fixture(scope="module")
def nano():
    return init_params(build("nano"), 0)


@pytest.fixture(scope="module")
def quantized(nano):
    """nano with the linear layers of its trunk on GRID."""
    flat = flatten(nano)
    chosen = [path for path in kernels(flat) if TRUNK_LINEAR.fullmatch(layer_name(path))]
    return unflatten(flat | {path: leaf(flat[path]) for path in chosen})


@pytest.mark.parametrize("names", ["original", "huggingface"])
def test_the_two_files_hold_every_tensor_once(tmp_path, nano, quantized, names):
    save_nunchaku(tmp_path, quantized, ABOUT, names)
    blocks, rest = (set(safe_open(tmp_path / name, "pt").keys()) for name in (BLOCKS, REST))
    assert not blocks & rest
    linears, _, config = load_nunchaku(tmp_path)
    packed = {f"{name}.{part}" for name, parts in linears.items() for part in parts}
    replaced = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    expected = to_torch(nano)
    expected = set(hf.to_hf(expected) if names == "huggingface" else expected)
    assert replaced <= expected
    assert blocks | rest == expected - replaced | packed
    assert len(linears) == 4 * 7
    assert all(len(parts) == 7 for parts in linears.values())
    assert any(key.endswith("norm1.weight") for key in blocks)
    assert any("blocks.1.proj." in key for key in rest)  # the shortcut
    assert set(config["linears"]) == set(linears)


def test_the_header_describes_the_quantization_and_the_sizes_for_loaders(tmp_path, quantized):
    save_nunchaku(tmp_path, quantized, ABOUT, "original")
    with safe_open(tmp_path / BLOCKS, "pt") as file:
        header = file.metadata()
    grid = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    expected = {"method": "svdquant", "weight": grid, "activation": grid, "rank": 16}
    assert json.loads(header["quantization_config"]) == expected
    size = json.loads(header["config"])["linears"]["image_encoder.trunk.blocks.0.attn.qkv"]
    assert size == {"in_features": 32, "out_features": 96, "padded_in_features": 128, "padded_out_features": 128}


def test_the_file_holds_the_same_weights_as_the_params(tmp_path, quantized):
    """To 0.4 %: factors are rounded to bfloat16 once more where they are divided by smooth."""
    save_nunchaku(tmp_path, quantized, ABOUT, "original")
    linears, _, config = load_nunchaku(tmp_path)
    for path, w in kernels(flatten(quantized)).items():
        if packed := linears.get(layer_name(path)):
            sizes = config["linears"][layer_name(path)]
            kernel = read_kernel(packed, sizes["in_features"], sizes["out_features"])
            assert relative_error(materialize(kernel), materialize(w)) < 4e-3


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 288), (384, 96), (64, 10)])
def test_the_kernels_compute_the_formula(inputs, outputs):
    """y = dq(q(x / s)) dq(q(w s - L)) + x L / s + b, up to the rounding of a bfloat16 accumulator (8 bits)."""
    h16 = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    w, x, bias = normal(0, inputs, outputs), h16(normal(3, 5, 7, inputs)), normal(4, outputs)
    quantized = leaf(w)
    kernel = read_kernel(pack_layer(to_layer(quantized, bias)), inputs, outputs)
    q, around = unwrap(quantized)
    small = fake_quantize(h16(x / around[Smoothed].scale), QuantSpec(4, group_size=64))  # the same rounding of ties
    branch = (x / around[Smoothed].scale) @ around[LowRank].down @ around[LowRank].up
    expected = small @ dequantize(q) + branch + bias
    got = kernel_output(kernel, x)
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 0.008
    np.testing.assert_array_equal(got, got.astype(jnp.bfloat16).astype(jnp.float32))
    undivided = kernel.__class__(*[getattr(kernel, name) for name in ("codes", "scales", "bias", "smooth")],
                                 kernel.down * kernel.smooth[:, None], kernel.up)  # fmt: skip
    assert relative_error(kernel_output(undivided, x), expected) > 0.05  # the branch reads x, not x / smooth


def test_round_factors_moves_the_rounding_error_of_factors_into_the_residual():
    w, scale = normal(0, 96, 32), jnp.linspace(0.3, 3, 96)
    down, up = normal(1, 96, 4), normal(2, 4, 32)
    ready = round_factors(Smoothed(LowRank(w * scale[:, None], down, up), scale))
    assert (
        relative_error(materialize(ready), materialize(Smoothed(LowRank(w * scale[:, None], down, up), scale))) < 1e-6
    )
    h16 = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(ready.scale, h16(ready.scale))
    np.testing.assert_array_equal(ready.inner.up, h16(ready.inner.up))


def test_weights_on_another_grid_are_requantized(quantized):
    path = "image_encoder.trunk/blocks.0/attn/qkv/kernel"
    flat = flatten(quantized)
    other = leaf(materialize(flat[path]), QuantSpec(8, False))
    assert not is_on_grid(other)
    params, again = requantize_to_grid(unflatten(flat | {path: other}))
    assert again == [layer_name(path)]
    assert is_on_grid(flatten(params)[path])
    assert relative_error(materialize(flatten(params)[path]), materialize(other)) < 0.12  # 4 bits


def test_a_rotated_model_is_refused(tmp_path, nano):
    path = "image_encoder.trunk/blocks.0/attn/qkv/kernel"
    flat = flatten(nano)
    rotated = unflatten(flat | {path: rotate_kernel(flat[path])})
    with pytest.raises(ValueError, match="kernels do not rotate"):
        save_nunchaku(tmp_path, rotated, ABOUT, "original")
    with pytest.raises(ValueError, match="no linear layer of the trunk"):
        save_nunchaku(tmp_path, nano, ABOUT, "original")
    assert not list(tmp_path.iterdir())

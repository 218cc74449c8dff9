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
    in_file_precision,
    kernel_output,
    load_nunchaku,
    on_grid,
    onto_grid,
    read_kernel,
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
    """`w` smoothed, with a branch, and the rest rounded."""
    scale = jnp.array(np.random.default_rng(len(w)).uniform(0.5, 2, len(w)), jnp.float32)
    down, up = 0.1 * normal(1, len(w), rank), normal(2, rank, w.shape[1])
    ready = in_file_precision(Smoothed(LowRank(w * scale[:, None] - down @ up, down, up), scale))
    return Smoothed(LowRank(quantize(ready.inner.inner, spec), ready.inner.down, ready.inner.up), ready.scale)


@pytest.fixture(scope="module")
def nano():
    return init_params(build("nano"), 0)


@pytest.fixture(scope="module")
def quantized(nano):
    """nano with the linears of its trunk on the file's grid."""
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
    wanted = to_torch(nano)
    wanted = set(hf.to_hf(wanted) if names == "huggingface" else wanted)
    assert replaced <= wanted
    assert blocks | rest == wanted - replaced | packed
    assert len(linears) == 4 * 7
    assert all(len(parts) == 7 for parts in linears.values())
    assert any(key.endswith("norm1.weight") for key in blocks)
    assert any("blocks.1.proj." in key for key in rest)  # the shortcut
    assert set(config["linears"]) == set(linears)


def test_the_header_says_what_loaders_ask_for(tmp_path, quantized):
    save_nunchaku(tmp_path, quantized, ABOUT, "original")
    with safe_open(tmp_path / BLOCKS, "pt") as file:
        header = file.metadata()
    grid = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    wanted = {"method": "svdquant", "weight": grid, "activation": grid, "rank": 16}
    assert json.loads(header["quantization_config"]) == wanted
    size = json.loads(header["config"])["linears"]["image_encoder.trunk.blocks.0.attn.qkv"]
    assert size == {"in_features": 32, "out_features": 96, "padded_in_features": 128, "padded_out_features": 128}


def test_a_file_stands_for_the_same_weights_as_the_tree(tmp_path, quantized):
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
    """y = dq(q(x / s)) dq(q(w s - L)) + x L / s + b, to what an accumulator of 8 bits' precision leaves."""
    h16 = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    w, x, bias = normal(0, inputs, outputs), h16(normal(3, 5, 7, inputs)), normal(4, outputs)
    made = leaf(w)
    kernel = read_kernel(pack_layer(to_layer(made, bias)), inputs, outputs)
    q, around = unwrap(made)
    small = fake_quantize(h16(x / around[Smoothed].scale), QuantSpec(4, group_size=64))  # a tie falls as there
    branch = (x / around[Smoothed].scale) @ around[LowRank].down @ around[LowRank].up
    wanted = small @ dequantize(q) + branch + bias
    got = kernel_output(kernel, x)
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) < 0.008
    np.testing.assert_array_equal(got, got.astype(jnp.bfloat16).astype(jnp.float32))
    forgotten = kernel.__class__(*[getattr(kernel, name) for name in ("codes", "scales", "bias", "smooth")],
                                 kernel.down * kernel.smooth[:, None], kernel.up)  # fmt: skip
    assert relative_error(kernel_output(forgotten, x), wanted) > 0.05  # the branch reads x, not x / smooth


def test_what_the_file_cannot_hold_of_factors_is_left_to_the_codes():
    w, scale = normal(0, 96, 32), jnp.linspace(0.3, 3, 96)
    down, up = normal(1, 96, 4), normal(2, 4, 32)
    ready = in_file_precision(Smoothed(LowRank(w * scale[:, None], down, up), scale))
    assert (
        relative_error(materialize(ready), materialize(Smoothed(LowRank(w * scale[:, None], down, up), scale))) < 1e-6
    )
    h16 = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(ready.scale, h16(ready.scale))
    np.testing.assert_array_equal(ready.inner.up, h16(ready.inner.up))


def test_weights_on_another_grid_are_rounded_onto_the_files(quantized):
    path = "image_encoder.trunk/blocks.0/attn/qkv/kernel"
    flat = flatten(quantized)
    other = leaf(materialize(flat[path]), QuantSpec(8, False))
    assert not on_grid(other)
    params, again = onto_grid(unflatten(flat | {path: other}))
    assert again == [layer_name(path)]
    assert on_grid(flatten(params)[path])
    assert relative_error(materialize(flatten(params)[path]), materialize(other)) < 0.12  # 4 bits


def test_a_rotated_model_is_refused(tmp_path, nano):
    path = "image_encoder.trunk/blocks.0/attn/qkv/kernel"
    flat = flatten(nano)
    rotated = unflatten(flat | {path: rotate_kernel(flat[path])})
    with pytest.raises(ValueError, match="kernels do not rotate"):
        save_nunchaku(tmp_path, rotated, ABOUT, "original")
    with pytest.raises(ValueError, match="no linear of the trunk"):
        save_nunchaku(tmp_path, nano, ABOUT, "original")
    assert not list(tmp_path.iterdir())

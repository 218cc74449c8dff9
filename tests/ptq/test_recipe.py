from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import abstract_params, build, init_params
from sam2jq.config.loader import load
from sam2jq.config.quant import (
    CalibConfig,
    InputsConfig,
    OutputsConfig,
    QuantConfig,
    WeightsConfig,
)
from sam2jq.models.sam2 import TRUNK_LINEAR
from sam2jq.ptq import recipe
from sam2jq.ptq.bit_targets import choose_unsigned
from sam2jq.ptq.pipeline import fold_rotations, in_order
from sam2jq.ptq.recipe import activation_specs, build_transforms, layers, rounding, weight_specs
from sam2jq.quant.algorithms.activations import OutQuantized
from sam2jq.quant.algorithms.gptq import GptqConfig
from sam2jq.quant.algorithms.lowrank import LowRankConfig
from sam2jq.quant.algorithms.rotate import Rotated, RotationConfig
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import each_layer
from sam2jq.tree import flatten, kernels, layer_name, unflatten

LAYERS = ["t.blocks.1.attn", "t.blocks.1.mlp", "t.blocks.10.attn", "neck.conv"]


def stage(chain, name: str):
    return dict(chain.stages)[name]


def specs(**settings) -> dict[str, QuantSpec]:
    return weight_specs(WeightsConfig(**settings), LAYERS)


def test_skips_end_at_a_dot():
    assert list(specs(skips=["t.blocks.1"])) == ["t.blocks.10.attn", "neck.conv"]


def test_an_algorithm_without_a_description_is_logged_by_its_name(monkeypatch):
    monkeypatch.setitem(recipe.ROUNDING, "nearest", lambda specs, *_: each_layer(lambda w, stats, spec: w, specs))
    descriptions = [rounding(WeightsConfig(bias_correction=b), {}).description for b in (False, True)]
    assert descriptions[0].endswith("], nearest")
    assert descriptions[1].endswith("], nearest, bias correction")


def test_the_longest_prefix_sets_the_bits():
    got = specs(dtype="sint4", bits={"t": 3, "t.blocks.1": 6, "t.blocks.1.mlp.weight": 8})
    assert [spec.bits for spec in got.values()] == [6, 8, 3, 4]


@pytest.mark.parametrize(
    ("shapes", "spec"),
    [([[1, 64]], QuantSpec(5, symmetric=False, group_size=64)), ([[1, -1]], QuantSpec(5, symmetric=False))]
    + [([[-1, -1]], QuantSpec(5, symmetric=False, per_tensor=True))],
)
def test_group_shapes_mean_what_the_schema_says(shapes, spec):
    assert set(specs(dtype="uint5", group_shapes=shapes).values()) == {spec}


@pytest.mark.parametrize("where", [{"skips": ["t.blocks.2"]}, {"bits": {"t.blocks.2": 4}}])
def test_a_prefix_that_matches_nothing_is_an_error(where):
    with pytest.raises(ValueError, match=r"no layer under t\.blocks\.2; did you mean 't\.blocks\.1"):
        specs(**where)


def test_a_folded_rotation_changes_no_feature_and_leaves_attn_proj_to_itself():
    model = build("nano", image_size=64)
    params, quant = (
        init_params(model, 0),
        QuantConfig(CalibConfig("photos"), rotation=RotationConfig(["hadamard"], True, True)),
    )
    folded = fold_rotations(model, params, quant, 0)
    encode = jax.jit(partial(model.apply, method="encode_image"))
    image = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    for got, expected in zip(*(encode({"params": tree}, image) for tree in (folded, params))):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    shapes = {layer_name(path): leaf.shape for path, leaf in kernels(flatten(params)).items()}
    turned = flatten(stage(build_transforms(quant, shapes, TRUNK_LINEAR, 0), "rotation").apply(folded, {}))
    block = "image_encoder.trunk/blocks.1"
    assert turned[f"{block}/attn/proj/kernel"] is flatten(folded)[f"{block}/attn/proj/kernel"]
    assert isinstance(turned[f"{block}/attn/qkv/kernel"], Rotated)
    assert not np.allclose(flatten(folded)[f"{block}/attn/qkv/kernel"], flatten(params)[f"{block}/attn/qkv/kernel"])


def test_only_chosen_kernels_are_rounded():
    kernel = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    params = {name: {"kernel": kernel, "bias": kernel[0]} for name in ("a", "b")}
    assert layers(params) == ["a", "b"]
    flat = flatten(round_weights(params, {"b": QuantSpec(4)}))
    assert flat["a/kernel"] is kernel
    assert flat["b/bias"] is params["b"]["bias"]
    assert isinstance(flat["b/kernel"], QTensor)
    np.testing.assert_array_equal(dequantize(flat["b/kernel"]), dequantize(quantize(kernel, QuantSpec(4))))


KNOWN = """
model:  {name: tiny, version: "2.1", checkpoint: checkpoints/sam2.1_hiera_tiny.pt, device: auto, dtype: float32}
cache:  {root: ./cache/sam2}
quant:
  calib:  {path: /path/to/images, num_samples: 128, batch_size: 1, image_size: 1024}
  wgts:   {dtype: uint4, group_shapes: [[1, 128]], skips: [], bits: {},
           kernel_gptq: {damp_percentage: 0.01, block_size: 128, num_inv_tries: 250},
           low_rank: {rank: 32, exclusive: false, num_iters: 1}}
  ipts:   {dtype: uint8, group_shapes: [[1, -1]], static: false}
  smooth: {proj: {granularity: Layer, strategy: GridSearch, num_grids: 20, alpha: 0.5}}
  rotation: {transforms: [hadamard], random: false}
output: {root: ./outputs/sam2, job: hiera_tiny_w4a8}
save_model: true
seed: 42
"""
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "experiments").glob("*_w*.yaml")
    if not path.stem.startswith("cdpq")  # those of distill
)


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {layer_name(path): leaf.shape for path, leaf in kernels(flatten(abstract_params(build(name)))).items()}


def test_the_config_that_users_of_the_original_know_has_every_stage(tmp_path):
    (tmp_path / "known.yaml").write_text(KNOWN)
    config = load(str(tmp_path / "known.yaml"), [])
    names = [name for name, _ in build_transforms(config.quant, shapes("tiny"), TRUNK_LINEAR, config.seed).stages]
    assert names == ["rotation", "smooth", "low rank", "weights", "inputs"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_comes_along_can_be_carried_out(path):
    """Its layers have the sizes that its branches and rotations need, and its prefixes name layers."""
    config = load(str(path), ["--model.checkpoint", "random:0", "--quant.calib.path", "photos"])
    chain = build_transforms(config.quant, shapes(config.model.name), TRUNK_LINEAR, config.seed)
    assert stage(chain, "weights")


def test_a_rank_above_a_layers_size_is_an_error():
    config = QuantConfig(calib=CalibConfig("photos"), wgts=WeightsConfig(low_rank=LowRankConfig(rank=97)))
    with pytest.raises(
        ValueError, match=r"wgts.low_rank: rank 97 is over 96, the most for image_encoder.trunk.blocks.0.attn"
    ):
        build_transforms(config, shapes("tiny"), TRUNK_LINEAR, 0)


def test_one_group_at_a_time_covers_every_layer_once_and_in_the_order_of_the_data():
    groups = in_order(shapes("tiny"))
    assert sorted(layer for group in groups for layer in group) == sorted(shapes("tiny"))
    assert groups[0] == ["image_encoder.trunk.patch_embed.proj"]
    assert [group[0].split(".")[3] for group in groups[1:13]] == [str(i) for i in range(12)]
    config = QuantConfig(calib=CalibConfig("photos"))
    rounded = stage(build_transforms(config, shapes("tiny"), TRUNK_LINEAR, 0, groups[3]), "weights")
    kernel = np.ones((4, 4), np.float32)
    params = unflatten({f"{layer.replace('.', '/')}/kernel": kernel for layer in shapes("tiny")})
    flat = flatten(rounded.apply(params, {}))
    assert {layer_name(path) for path, leaf in flat.items() if isinstance(leaf, QTensor)} == set(groups[3])


def test_only_layers_with_one_sided_inputs_take_the_unsigned_grid():
    """And none that a rotation turns, for it leaves no input one-sided."""
    names = ["image_encoder.trunk.blocks.0.mlp.layers.1", "image_encoder.neck.convs.0.conv", "memory_encoder.out_proj"]
    lows = dict(zip(names, (-0.17, 0.0, -3.0)))
    stats = {layer: Stats(jnp.ones(4), jnp.full(4, low), jnp.full(4, 3.0)) for layer, low in lows.items()}
    config = QuantConfig(calib=CalibConfig("photos"), ipts=InputsConfig("sint8", allow_unsigned=True))
    chosen = choose_unsigned(config, stats, TRUNK_LINEAR)
    assert (chosen.ipts.unsigned, chosen.ipts.allow_unsigned) == (names[:2], False)
    dtypes = {layer: spec.dtype for layer, spec in activation_specs(chosen.ipts, names).items()}
    assert dtypes == dict(zip(names, ("uint8", "uint8", "sint8")))
    turned = replace(config, rotation=RotationConfig(["hadamard"]))
    assert choose_unsigned(turned, stats, TRUNK_LINEAR).ipts.unsigned == names[1:2]


def test_outputs_are_rounded_last_and_of_the_layers_that_are_not_skipped():
    config = QuantConfig(calib=CalibConfig("photos"), opts=OutputsConfig("uint8", skips=["memory_encoder"]))
    steps = build_transforms(config, shapes("nano"), TRUNK_LINEAR, 0)
    assert [name for name, _ in steps.stages] == ["weights", "outputs"]
    params = unflatten({f"{layer.replace('.', '/')}/kernel": np.ones((4, 4), np.float32) for layer in shapes("nano")})
    leaves = kernels(flatten(stage(steps, "outputs").apply(params, {})))
    rounded = {layer_name(path) for path, leaf in leaves.items() if isinstance(leaf, OutQuantized)}
    assert rounded == {layer for layer in shapes("nano") if not layer.startswith("memory_encoder.")}


def test_a_rounding_algorithm_is_chosen_by_its_name():
    layers = {"a": QuantSpec(4)}
    assert rounding(WeightsConfig(), layers).needs == frozenset()
    assert rounding(WeightsConfig(kernel_gptq=GptqConfig()), layers).needs == {"gram"}
    assert rounding(WeightsConfig(rounding="gptq"), layers).needs == {"gram"}
    assert rounding(WeightsConfig(rounding="nearest", kernel_gptq=GptqConfig()), layers).needs == frozenset()
    with pytest.raises(ValueError, match="wgts.rounding 'gptk': allowed are nearest, gptq; did you mean 'gptq'"):
        rounding(WeightsConfig(rounding="gptk"), layers)

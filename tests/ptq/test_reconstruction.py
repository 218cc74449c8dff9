"""Reconstruction of the trunk and the choice of bits by masks, on a model of random weights at 64 pixels."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest

import sam2jq
from sam2jq import build, init_params
from sam2jq.config.quant import QuantConfig, ReconstructConfig, WeightsConfig
from sam2jq.data import draw_scene, preprocess
from sam2jq.errors import ConfigError, UserError
from sam2jq.ptq.reconstruction import reconstruct_trunk, write_maps
from sam2jq.ptq.sensitivity import mask_changes, mask_vector
from sam2jq.quant.algorithms.rtn import rtn
from sam2jq.quant.leaves import base_weight
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, layer_name

MODEL, STEPS = build("nano", image_size=64), ReconstructConfig(steps=2)
LAYERS = r"image_encoder\.trunk\.blocks\.[01]\.mlp\.layers\.0"


def clips(n: int, step: int = 1):
    return (preprocess(draw_scene(i, 64).image, 64)[None] for i in range(n, 3, step))


@pytest.fixture(scope="module")
def full() -> dict:
    return init_params(MODEL, 0)


def test_maps_are_read_from_a_file_that_is_gone(tmp_path):
    maps = [np.full((1, 2, 2, 3), i, np.float32) for i in range(4)]
    got = write_maps(tmp_path, iter(maps))
    assert isinstance(got, np.memmap)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(got, np.concatenate(maps))


def test_without_images_there_is_nothing_to_reconstruct_by():
    with pytest.raises(UserError, match="there is no image"):
        write_maps(None, iter(()))


def test_float_grids_are_refused():
    with pytest.raises(ConfigError, match="reconstruct: wgts.dtype must be sintN or uintN, got fp4"):
        QuantConfig(wgts=WeightsConfig(dtype="fp4"), reconstruct=ReconstructConfig())


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_block_before_to_the_same_bits(full, tmp_path):
    rounded = rtn(QuantSpec(2, False), match=LAYERS).apply(full, {})
    seen = []

    @contextmanager
    def log(name: str, what: str):
        seen.append(what)
        if len(seen) == 2:
            raise KeyboardInterrupt
        yield []

    run = lambda **settings: reconstruct_trunk(MODEL, full, clips, STEPS, **settings).apply(rounded, {})
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(kept=(tmp_path, "clips"), on_stage=log)
    assert seen == ["block 1 of 7", "block 2 of 7"]
    (first,) = tmp_path.iterdir()
    written = first.stat().st_mtime_ns
    resumed = run(kept=(tmp_path, "clips"))
    assert len(list(tmp_path.iterdir())) == 2
    assert first.stat().st_mtime_ns == written  # the first block was read, not trained again
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))
    changed = [path for path, leaf in flatten(whole).items() if leaf is not flatten(rounded)[path]]
    assert all(path.startswith(("image_encoder.trunk/blocks.0/", "image_encoder.trunk/blocks.1/")) for path in changed)


@pytest.mark.slow
def test_changes_of_masks_are_those_of_finite_differences(full):
    layers = ["sam_mask_decoder.conv_s1", "image_encoder.neck.convs.2.conv"]
    paths = {layer_name(path): path for path in kernels(flatten(full))}
    rng = np.random.default_rng(0)
    changes = {k: 1e-3 * rng.standard_normal(flatten(full)[paths[k]].shape).astype(np.float32) for k in layers}
    estimated = mask_changes(MODEL, full, changes, clips)
    doubled = mask_changes(MODEL, full, {k: 2 * d for k, d in changes.items()}, clips)
    y = jax.jit(lambda params, clip: mask_vector(MODEL, params, clip))
    for layer in layers:
        moved = sam2jq.tree.unflatten(flatten(full) | {paths[layer]: flatten(full)[paths[layer]] + changes[layer]})
        measured = np.mean([np.square(y(moved, clip) - y(full, clip)).sum() for clip in clips(0)])
        assert 0.2 < estimated[layer] / measured < 5  # the mean of six squares of a normal variable
        assert doubled[layer] == pytest.approx(4 * estimated[layer], rel=1e-3)


@pytest.mark.slow
def test_a_reconstructed_package_is_read_as_it_was_written(full, tmp_path):
    wgts = WeightsConfig("uint2", target_bits=2.5, bits_by="masks", scale_dtype="bfloat16")
    small, _ = sam2jq.quantize(MODEL, full, QuantConfig(wgts=wgts, reconstruct=STEPS), "scenes:1", num_images=2)
    sam2jq.save(tmp_path / "package.safetensors", MODEL, small)
    _, read = sam2jq.load(tmp_path / "package.safetensors")
    assert jax.tree.structure(read) == jax.tree.structure(small)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, small))
    widths = {base_weight(leaf).spec.bits for leaf in kernels(flatten(small)).values()}
    assert min(widths) == 2 < max(widths)
    assert all(isinstance(base_weight(leaf), QTensor) for leaf in kernels(flatten(small)).values())

"""Damaged files end in one line, at loading; a full disk leaves nothing half-written."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

import sam2jq
from converters.checkpoint import save_checkpoint
from converters.exports import EXPORTS
from converters.torch_files import load_torch, save_torch
from sam2jq import UserError
from sam2jq.api import describe_model, open_package
from sam2jq.files import atomic_write
from tests.conftest import file_limit


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with every kind of file that holds a model."""
    folder = tmp_path_factory.mktemp("written")
    model, params = sam2jq.load("demo")
    small = sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), sam2jq.QuantSpec(4)))
    for name in ("package.pt", "package.safetensors"):
        sam2jq.save(folder / name, model, small)
    about = {"random_weights": False, "model": describe_model(model)}
    for to in ("vanilla", "safetensors"):
        EXPORTS[to].write(folder, model, small, about)
    return folder


def flip(path, position: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def digest(params) -> list:
    import jax

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("name", ["package.pt", "package.safetensors", "vanilla.pt", "model.safetensors"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(written, tmp_path, name):
    """A zip archive has bytes between its records that nothing reads."""
    path = tmp_path / name
    expected, size = digest(sam2jq.load(written / name)[1]), (written / name).stat().st_size
    rng, found = np.random.default_rng(0), []
    for position in [8, *range(16, 200, 67), *rng.integers(0, size, 8), size - 30]:
        shutil.copy(written / name, path)
        flip(path, int(position), int(rng.integers(8)))
        try:
            _, params = sam2jq.load(path)
        except UserError as error:
            found.append(str(error))
        else:
            assert digest(params) == expected
    assert len(found) >= 8
    assert not any("\n" in message or len(message) > 1200 for message in found)


def test_a_package_carries_a_hash_of_its_content(written, tmp_path):
    """The zip archive's checksums are right here: only the hash tells that a value was changed."""
    content = load_torch(written / "package.pt")
    content["tensors"]["no_obj_ptr"][0, 0] += 1
    save_torch(tmp_path / "p.pt", content)
    for read in (sam2jq.load, open_package):
        with pytest.raises(UserError, match="p.pt is damaged: its content does not match its hash"):
            read(tmp_path / "p.pt")
    content["metadata"]["model"]["image_size"] = 512
    content["tensors"]["no_obj_ptr"][0, 0] -= 1
    save_torch(tmp_path / "p.pt", content)
    with pytest.raises(UserError, match="does not match its hash"):
        sam2jq.load(tmp_path / "p.pt")


def test_files_without_a_hash_still_load(written, tmp_path):
    content = load_torch(written / "package.pt")
    del content["sha256"]
    save_torch(tmp_path / "p.pt", content)
    assert digest(sam2jq.load(tmp_path / "p.pt")[1]) == digest(sam2jq.load(written / "package.pt")[1])
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(load_torch(written / "vanilla.pt"), tmp_path / "v.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(load_torch(written / "vanilla.pt"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("v.pt", "old.pt"):
        assert digest(sam2jq.load(tmp_path / name)[1]) == digest(sam2jq.load(written / "vanilla.pt")[1])


@pytest.mark.parametrize("name", ["p.pt", "p.safetensors", "c.pt", "c.safetensors"])
@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, name, size):
    model, params = sam2jq.load("demo")
    save = (
        partial(sam2jq.save, model=model, params=params) if name[0] == "p" else partial(save_checkpoint, params=params)
    )
    with pytest.raises(OSError, match=f"cannot write .*{name}") as error, file_limit(size):
        save(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_writer_are_not_hidden(tmp_path):
    with pytest.raises(RuntimeError, match="a fault"), atomic_write(tmp_path / "x"):
        raise RuntimeError("a fault")
    failing = atomic_write(tmp_path / "x", failures=(RuntimeError,))
    with pytest.raises(OSError, match="cannot write .*x; is the disk full") as error, failing:
        raise RuntimeError("first line\nsecond")
    assert "\n" not in str(error.value)


def test_only_params_that_fit_the_model_are_saved(tmp_path):
    model, params = sam2jq.load("demo")
    wrong = params | {"no_obj_ptr": params["no_obj_ptr"][:, :3], "stranger": params["no_obj_ptr"]}
    without = {key: part for key, part in params.items() if key != "obj_ptr_tpos_proj"}
    for name in ("p.pt", "p.safetensors"):
        with pytest.raises(UserError, match=r"2 do not fit: extra stranger; no_obj_ptr is \[1, 3\], not \[1, 64\]"):
            sam2jq.save(tmp_path / name, model, wrong)
        with pytest.raises(UserError, match="not those of the model: .* missing obj_ptr_tpos_proj/"):
            sam2jq.save(tmp_path / name, model, without)
        with pytest.raises(UserError, match="params are not those of the model: .* more$"):
            sam2jq.save(tmp_path / name, sam2jq.build("tiny"), params)
        with pytest.raises(UserError, match="params must be the tree"):
            sam2jq.save(tmp_path / name, model, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["random:3", "demo"])
def test_a_package_says_whether_its_weights_are_random(tmp_path, source):
    model, params = sam2jq.load(source, name="nano")
    small = sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), sam2jq.QuantSpec(4)))
    sam2jq.save(tmp_path / "p.safetensors", model, small)
    assert open_package(tmp_path / "p.safetensors").metadata["random_weights"] is (source != "demo")

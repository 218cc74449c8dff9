import argparse
import json
import pickle
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from converters.exports.vanilla import build_original
from converters.names import from_torch, shapes, to_torch
from converters.recognize import WIDTH
from sam2jq import VARIANTS, UserError, abstract_params, build, init_params
from tests.conftest import twin

CHECKPOINTS = [(name, version) for name in VARIANTS for version in ("2.0", "2.1")]
LONG = [
    ("large", "2.0"),
    ("large", "2.1"),
    ("base-plus", "2.0"),
    ("base-plus", "2.1"),
    ("small", "2.0"),
    ("small", "2.1"),
    ("tiny", "2.1"),
]  # slow; versions differ in a few memory layers, which tiny covers
QUICK = [pytest.param(*one, marks=pytest.mark.slow if one in LONG else ()) for one in CHECKPOINTS]


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts agree in names, shapes, dtypes and every bit, NaNs included."""
    bits = lambda t: t.contiguous().view(torch.int16)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


@pytest.mark.parametrize(("name", "version"), QUICK)
def test_a_state_dict_is_restored_bit_for_bit(name, version):
    """All values of a tensor differ, and so do tensors of one shape, so that a swap would be noticed."""
    state_dict = build_original(name, version).state_dict()
    steps = lambda i, v: torch.linspace(i, i + 1, v.numel()).reshape(v.shape)
    state_dict = {key: v + steps(i, v) for i, (key, v) in enumerate(state_dict.items())}
    assert same(to_torch(from_torch(state_dict, abstract_params(build(name, version)))), state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_restored_bit_for_bit(dtype):
    state_dict = {k: v.to(dtype) for k, v in to_torch(init_params(build("nano"), 0)).items()}
    assert same(to_torch(from_torch(state_dict, abstract_params(build("nano")))), state_dict)


@pytest.mark.parametrize("name", ["tiny", "small", "base-plus", "large"])
def test_names_and_shapes_equal_the_released_checkpoints(shared, name):
    schema = json.loads((shared / "data" / "sam2.1_schema" / f"sam2.1_hiera_{name.replace('-', '_')}.json").read_text())
    expected = {key: tuple(entry["shape"]) for key, entry in schema.items()}
    assert shapes(abstract_params(build(name))) == expected


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_a_file_of_either_naming_loads_to_the_same_params(tmp_path, version, suffix):
    model, path = build("nano", version), tmp_path / f"checkpoint{suffix}"
    params = init_params(model, 0)
    save_checkpoint(path, params)
    loaded = load_checkpoint(str(path), model)
    assert same(to_torch(loaded.params), to_torch(params))
    assert not loaded.random
    assert list(tmp_path.iterdir()) == [path]


def test_a_hugging_face_folder_is_found_by_its_model_file(tmp_path):
    model = build("nano")
    save_checkpoint(tmp_path / "model.safetensors", init_params(model, 0))
    assert "shared_image_embedding.positional_embedding" in load_file(tmp_path / "model.safetensors")
    load_checkpoint(str(tmp_path), model)


def test_random_weights_are_marked():
    assert load_checkpoint("random:3", build("nano")).random
    with pytest.raises(ValueError, match="whole number"):
        load_checkpoint("random:x", build("nano"))


def test_every_tensor_that_does_not_fit_is_listed_in_one_error(tmp_path):
    state_dict = to_torch(init_params(build("nano"), 0))
    state_dict["stranger"] = state_dict.pop("no_mem_embed")
    state_dict["no_obj_ptr"] = torch.zeros(3)
    torch.save({"model": state_dict}, tmp_path / "c.pt")
    message = "3 tensors do not fit: missing no_mem_embed; extra stranger; no_obj_ptr is"
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(str(tmp_path / "c.pt"), build("nano"))
    assert "\n" not in str(error.value)


def test_the_variant_that_fits_is_named(tmp_path):
    save_checkpoint(tmp_path / "c.pt", init_params(build("nano", "2.0"), 0))
    with pytest.raises(ValueError, match=r"it is nano 2\.0: give --model.name nano --model.version 2\.0"):
        load_checkpoint(str(tmp_path / "c.pt"), build("tiny"))


PARTS = "checkpoint .*c.pt is only a part of SAM 2, {}, without {}: give the whole checkpoint$"


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            lambda sd: only(sd, "sam_mask_decoder"),
            None,
            PARTS.format("sam_mask_decoder", "image.* and .*"),
        ),
        (lambda sd: only(sd, "sam_mask_decoder"), "tiny", PARTS.format("sam_mask_decoder", "image_encoder and .*")),
        (lambda sd: only(sd, "image_encoder"), "nano", PARTS.format("image_encoder", ".* and sam_mask_decoder")),
        (lambda sd: without(sd, "no_mem_embed"), None, "nano 2.1 is closest: 1 tensor does not fit: missing no_mem_"),
        (lambda sd: without(sd, "no_mem_embed"), "tiny", "the model; nano 2.1 is closest: 1 tensor does not fit: miss"),
        (lambda sd: without(sd, "no_mem_embed"), "nano", "does not fit the model: 1 tensor does not fit: missing no_m"),
        (lambda sd: sd, "tiny", "does not fit the model; it is nano 2.1: give --model.name nano --model.version 2.1$"),
        (lambda sd: sd | {WIDTH: torch.zeros(40, 3, 7, 7)}, None, r"proj.weight is \[40, 3, 7, 7\], of another width"),
        (lambda sd: without(sd, WIDTH), None, r"proj.weight is \[\], of another width"),
        (lambda sd: {k: x * float("nan") for k, x in sd.items()}, "nano", "NaN or Inf in every tensor: use an intact"),
        (lambda sd: {"a": torch.ones(2)}, "nano", "none of its tensors has a name such as .*; it holds a$"),
    ],
)
def test_what_does_not_fit_is_said_once(tmp_path, change, name, message):
    torch.save({"model": change(to_torch(init_params(build("nano"), 0)))}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(str(tmp_path / "c.pt"), name, None, None)
    assert str(error.value).count("not fit:") <= 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def only(state_dict: dict, part: str) -> dict:
    return {key: x for key, x in state_dict.items() if key.startswith(part)}


def without(state_dict: dict, name: str) -> dict:
    return {key: x for key, x in state_dict.items() if key != name}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, value):
    params = init_params(build("nano"), 0)
    params["no_obj_ptr"] = params["no_obj_ptr"].at[0, 0].set(value)
    save_checkpoint(tmp_path / "c.pt", params)
    with pytest.raises(ValueError, match="NaN or Inf in no_obj_ptr"):
        load_checkpoint(str(tmp_path / "c.pt"), build("nano"))


class Exploit:
    def __reduce__(self):
        return (print, ("this ran",))


def test_loading_never_runs_code(tmp_path, capfd):
    path = tmp_path / "c.pt"
    for write in (lambda: torch.save({"model": Exploit()}, path), lambda: path.write_bytes(pickle.dumps(Exploit()))):
        write()
        with pytest.raises(ValueError, match="could run code when loaded; it was not loaded"):
            load_checkpoint(str(path), build("nano"))
    assert "this ran" not in capfd.readouterr().out


class Loud:
    """An object whose class would print when it is loaded."""

    def __init__(self):
        self.state = 1

    def __setstate__(self, state):
        print("this ran")


class Call:
    def __reduce__(self):
        return (subprocess.call, (["echo", "this ran"],))


BESIDE = {
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "namespace": argparse.Namespace(lr=1e-3, folder=Path("/x")),
    "defaultdict": defaultdict(list, {"loss": [0.5]}),
    "object": Loud(),
    "call": Call(),
}


@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_weights_are_left_out_and_run_no_code(tmp_path, capfd, name):
    expected = to_torch(init_params(build("nano"), 0))
    torch.save({"model": expected, "extra": BESIDE[name]}, tmp_path / "c.pt")
    _, checkpoint = open_checkpoint(str(tmp_path / "c.pt"), None, None, None)
    assert same(to_torch(checkpoint.params), expected)
    assert "this ran" not in capfd.readouterr().out


def test_another_pickle_protocol_is_named(tmp_path):
    torch.save({"model": to_torch(init_params(build("nano"), 0))}, tmp_path / "c.pt", pickle_protocol=4)
    with pytest.raises(UserError, match="c.pt has a pickle protocol above 2: save it again"):
        load_checkpoint(str(tmp_path / "c.pt"), build("nano"))


def test_a_model_as_an_object_is_named(tmp_path):
    whole = torch.nn.Linear(2, 2)
    torch.save(whole, tmp_path / "whole.pt")
    with pytest.raises(UserError, match="whole.pt holds no state dict but torch.nn.modules.linear.Linear: a SAM"):
        load_checkpoint(str(tmp_path / "whole.pt"), build("nano"))
    torch.save({"model": to_torch(init_params(build("nano"), 0)), "ema": whole}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="two.pt holds objects with tensors of their own beside the model, ema: say"):
        load_checkpoint(str(tmp_path / "two.pt"), build("nano"))
    load_checkpoint(f"{tmp_path / 'two.pt'}#model", build("nano"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    save_checkpoint(path, init_params(build("nano"), 0))
    for length in (path.stat().st_size // 2, 10, 0):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=rf"c{suffix} is not a readable"):
            load_checkpoint(str(path), build("nano"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("nothing.pt", "no checkpoint at nothing.pt; give a file"), ("a/b/c", "no checkpoint"), ("", "no checkpoint")],
)
def test_a_missing_file_is_named(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(source, build("nano"))


def test_a_hub_id_offline_is_a_clear_error(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="cannot fetch facebook/.* from the Hub .*go online, or give a file"):
        load_checkpoint("facebook/sam2.1-hiera-tiny", build("tiny"))


def test_a_checkpoint_saved_by_the_original_code_loads(tmp_path):
    pair = twin("nano", "2.1", 256)
    torch.save({"model": pair.torch.state_dict()}, tmp_path / "c.pt")
    assert same(to_torch(load_checkpoint(str(tmp_path / "c.pt"), pair.model).params), pair.torch.state_dict())

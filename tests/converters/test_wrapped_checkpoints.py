"""Checkpoints as people have them: in wrappers, in half precision, with several models, or of other programs."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sam2jq
from converters.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from converters.names import to_torch
from sam2jq import UserError, build, init_params
from sam2jq.tree import flatten


@pytest.fixture(scope="module")
def nano():
    """The state dict of a nano model, with another value in one tensor for each other model."""
    return to_torch(init_params(build("nano"), 0))


def with_mark(state_dict: dict, value: float) -> dict:
    return state_dict | {"no_obj_ptr": torch.full_like(state_dict["no_obj_ptr"], value)}


def prefixed(state_dict: dict, prefix: str) -> dict:
    return {prefix + key: x for key, x in state_dict.items()}


def infixed(state_dict: dict) -> dict:
    """As `model.image_encoder = torch.compile(model.image_encoder)` or DataParallel of a part names them."""
    return {key.replace("image_encoder.", "image_encoder._orig_mod.module."): x for key, x in state_dict.items()}


ANCHOR = "image_encoder.trunk.patch_embed.proj.weight"
OPTIMIZER = {
    "exp_avg": {ANCHOR: torch.zeros(2)},
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
    "param_groups": [{"lr": 1e-4}],
}
WRAPPED = {
    "bare": lambda sd: sd,
    "data parallel": lambda sd: {"model": prefixed(sd, "module.")},
    "compiled": lambda sd: {"model": prefixed(sd, "_orig_mod.")},
    "both": lambda sd: {"model": prefixed(sd, "module._orig_mod.")},
    "compiled part": lambda sd: {"model": infixed(sd)},
    "trainer": lambda sd: {"model": sd, "optimizer": OPTIMIZER, "epoch": 7, "loss": {"core": 0.5}, "args": None},
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 1},
    "model_state_dict": lambda sd: {"model_state_dict": sd, "optimizer_state_dict": OPTIMIZER},
    "lightning": lambda sd: {"state_dict": prefixed(sd, "model.") | {"loss_fn.weight": torch.ones(3)}, "epoch": 1},
    "only ema": lambda sd: {"ema": sd, "epoch": 3},
    "averaged": lambda sd: prefixed(sd, "module.") | {"n_averaged": torch.tensor(5)},
    "nested": lambda sd: {"checkpoint": {"net": {"model": sd}}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_state_dict_is_the_one_inside(tmp_path, nano, wrapper):
    torch.save(WRAPPED[wrapper](nano), tmp_path / "c.pt")
    model, params = sam2jq.load(tmp_path / "c.pt")
    assert model == build("nano")
    got = to_torch(params)
    assert got.keys() == nano.keys()
    assert all(torch.equal(got[key], x) for key, x in nano.items())


SEVERAL = {
    "ema": lambda a, b: {"model": a, "ema": b, "optimizer": OPTIMIZER},
    "ema of modules": lambda a, b: {"model": prefixed(a, "module."), "ema": prefixed(b, "module.")},
    "teacher": lambda a, b: prefixed(b, "teacher.") | prefixed(a, "student."),
    "teacher.backbone": lambda a, b: {"state_dict": prefixed(a, "student.") | prefixed(b, "teacher.backbone.")},
    "ema_model": lambda a, b: a | prefixed(b, "ema_model."),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_models_one_has_to_be_named(tmp_path, nano, name):
    torch.save(SEVERAL[name](with_mark(nano, 1.0), with_mark(nano, 2.0)), tmp_path / "c.pt")
    part = {"ema of modules": "ema", "teacher.backbone": "state_dict.teacher.backbone"}.get(name, name)
    with pytest.raises(UserError, match=rf"c.pt holds 2 models: .*{part}.*; say which, as in .*c.pt#") as error:
        sam2jq.load(tmp_path / "c.pt")
    assert len(str(error.value)) < 400
    _, params = sam2jq.load(f"{tmp_path / 'c.pt'}#{part}")
    assert float(params["no_obj_ptr"][0, 0]) == 2.0
    with pytest.raises(UserError, match=f"holds no 'best'; it holds .*{part}"):
        sam2jq.load(f"{tmp_path / 'c.pt'}#best")


@pytest.mark.parametrize(
    "names",
    [
        ["lora.blocks.0.lora_A"],
        ["adapters.0.weight"],
        ["model.x.lora_B.default.weight"],
        ["w_As.0.weight"],
        ["x.qkv.linear_a_q.weight"],
    ],
)
def test_adapters_beside_a_model_are_an_error(tmp_path, nano, names):
    torch.save(prefixed(nano, "sam2.") | {name: torch.ones(2) for name in names}, tmp_path / "flat.pt")
    torch.save({"model": nano, "extra": {name: torch.ones(2) for name in names}}, tmp_path / "nested.pt")
    for name in ("flat.pt", "nested.pt"):
        with pytest.raises(UserError, match=f"{name} holds adapters, which change the weights, .* merge them into"):
            sam2jq.load(tmp_path / name)


def test_prefixes_are_taken_off_safetensors_too(tmp_path, nano):
    save_file(prefixed(nano, "module."), tmp_path / "c.safetensors")
    model, params = sam2jq.load(tmp_path / "c.safetensors")
    assert model == build("nano")
    assert torch.equal(to_torch(params)["no_obj_ptr"], nano["no_obj_ptr"])


def test_a_file_with_a_number_sign_in_its_name_is_that_file(tmp_path, nano):
    torch.save({"model": nano}, tmp_path / "run#3")
    assert sam2jq.load(tmp_path / "run#3")[0] == build("nano")


def test_a_tensor_with_and_without_a_prefix_is_an_error(tmp_path, nano):
    torch.save(nano | prefixed(nano, "module."), tmp_path / "c.pt")
    with pytest.raises(UserError, match="two state dicts are called 'model'"):
        sam2jq.load(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {f"encoder.layer.{i}.weight": torch.ones(2) for i in range(500)},
            "none of its tensors has a name such as",
        ),
        ({"model": {"epoch": 3}}, "holds no state dict"),
        ([torch.ones(2)], "holds no state dict"),
        ({}, "holds no state dict"),
    ],
)
def test_what_is_no_sam2_is_said_in_a_short_line(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pt")
    for name in (None, "nano"):
        with pytest.raises(UserError, match=message) as error:
            sam2jq.load(tmp_path / "c.pt", name=name)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", [None, "nano"])
def test_at_most_ten_tensors_are_listed(tmp_path, nano, name):
    torch.save({"model": nano | {f"extra.{i}": torch.ones(1) for i in range(400)}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r": 400 tensors do not fit: extra .*390 more$") as error:
        sam2jq.load(tmp_path / "c.pt", name=name)
    assert len(str(error.value)) < 600


def test_dicts_that_contain_themselves_end(tmp_path, nano):
    loop = {"epoch": 1}
    loop["self"] = loop
    torch.save(loop, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        sam2jq.load(tmp_path / "c.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_with_in_float32_and_come_back_bit_for_bit(tmp_path, nano, dtype, suffix):
    stored = {key: x.to(dtype) for key, x in nano.items()}
    source = tmp_path / "c.pt"
    torch.save({"model": stored}, source)
    _, checkpoint = open_checkpoint(str(source), None, None, None)
    params = flatten(checkpoint.params)
    assert {leaf.dtype for leaf in params.values()} == {np.dtype("float32")}
    got = to_torch(checkpoint.params)
    assert all(torch.equal(got[key], x.float()) for key, x in stored.items())
    save_checkpoint(tmp_path / f"again{suffix}", checkpoint.params, checkpoint.dtypes)
    again = load_checkpoint(str(tmp_path / f"again{suffix}"), build("nano"))
    assert again.dtypes == checkpoint.dtypes
    assert all(np.array_equal(x, y) for x, y in zip(params.values(), flatten(again.params).values()))
    if suffix == ".pt":
        back = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
        assert all(x.dtype == dtype and torch.equal(x, stored[key]) for key, x in back.items())


def test_integers_are_no_weights(tmp_path, nano):
    torch.save({"model": nano | {"no_obj_ptr": nano["no_obj_ptr"].to(torch.int8)}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"holds no floats in no_obj_ptr \(int8\)"):
        sam2jq.load(tmp_path / "c.pt")


def test_tensors_that_numpy_does_not_have_are_one_line(tmp_path, nano):
    torch.save({"model": nano | {"no_obj_ptr": torch.zeros(1, 64).to(torch.float8_e5m2)}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="c.pt holds tensors of another kind than floats"):
        sam2jq.load(tmp_path / "c.pt")

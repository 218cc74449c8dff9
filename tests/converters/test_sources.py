"""Names and files that are no checkpoint: one line says what they are, and what to give."""

import shutil

import numpy as np
import pytest
import torch

import sam2jq
from converters import hf
from converters.checkpoint import load_checkpoint, save_checkpoint
from converters.names import to_torch
from sam2jq import UserError, build, init_params

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 184416285\n"


@pytest.fixture(scope="module")
def params():
    return init_params(build("nano"), 0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a pointer of git-lfs, not the file itself: run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a page of HTML, not a checkpoint: download the file itself"),
        (b"<HTML><body>404", "is a page of HTML"),
        (b"GGUF\3\0\0\0", "is a GGUF file, not a checkpoint: give the .pt or .safetensors file"),
        (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite model"),
        (b"\x89HDF\r\n", "is an HDF5 file"),
        (b"<?xml version='1.0'?><net/>", "is an XML file"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_that(tmp_path, suffix, content, message):
    (tmp_path / f"c{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"/c{suffix} {message}"):
        sam2jq.load(tmp_path / f"c{suffix}")


def test_models_of_other_programs_are_named(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    (tmp_path / "m.mlpackage").mkdir()
    np.savez(tmp_path / "m.npz", x=np.zeros(3))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    for name, message in {
        "m.onnx": "is an ONNX model, not a checkpoint: give the .pt or .safetensors file that it was made from",
        "m.mlpackage": "is a Core ML model, not a checkpoint",
        "m.npz": "is a zip archive of another program than torch.save: it holds x.npy",
        "m.pt": "is a TorchScript program: give the .pt or .safetensors file that it was made from, or its state_dict",
    }.items():
        with pytest.raises(UserError, match=f"{name} {message}"):
            sam2jq.load(tmp_path / name)


def test_a_file_with_the_ending_of_another_kind_is_to_be_renamed(tmp_path, params):
    save_checkpoint(tmp_path / "a.pt", params)
    save_checkpoint(tmp_path / "b.safetensors", params)
    shutil.copy(tmp_path / "a.pt", tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"a.safetensors is a torch file: rename it to end in .pt$"):
        sam2jq.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"b.pt is a safetensors file: rename it to end in .safetensors$"):
        sam2jq.load(tmp_path / "b.pt")
    torch.save(to_torch(params), tmp_path / "a.safetensors", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="a.safetensors is a torch file"):
        sam2jq.load(tmp_path / "a.safetensors")


def test_a_folder_without_a_known_name_says_what_else_is_in_it(tmp_path, params):
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint in {tmp_path}, where package.* for; give a file$"):
        sam2jq.load(tmp_path)
    torch.save(hf.to_hf(to_torch(params)), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="looked for; give a file in it by its path: pytorch_model.bin$"):
        sam2jq.load(tmp_path)
    load_checkpoint(str(tmp_path / "pytorch_model.bin"), build("nano"))


@pytest.mark.parametrize("source", ["https://a.b/c/sam2.1_hiera_tiny.pt", "s3://bucket/c.safetensors", "http://a.b/c"])
def test_an_address_is_to_be_downloaded_first(source):
    with pytest.raises(UserError, match=f"^checkpoint {source} is an address: download the file first, and give its p"):
        load_checkpoint(source, build("nano"))


def test_a_tilde_in_a_name_is_no_folder_of_a_user(tmp_path, params, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("~nobody.known.pt", params)
    load_checkpoint("~nobody.known.pt", build("nano"))
    with pytest.raises(UserError, match="~nobody.known is no user's folder"):
        load_checkpoint("~nobody.known/c.pt", build("nano"))

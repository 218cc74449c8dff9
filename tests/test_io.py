import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sam2jq.errors import UserError
from sam2jq.files import atomic_write
from sam2jq.io import (
    content_hash,
    read_container,
    read_metadata,
    read_safetensors,
    write_container,
    write_safetensors,
)

DTYPES = ["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bfloat16", "float8_e4m3fn"]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_arrays_of_every_dtype_and_shape_are_restored_bit_for_bit(tmp_path, name, shape):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    write_container(tmp_path / "a.safetensors", {"x": x, "transposed": x.T}, {"values": [1, None, "x"]}, "test", 1)
    arrays, header = read_container(tmp_path / "a.safetensors", "test", 1)
    for got, expected in ((arrays["x"], x), (arrays["transposed"], x.T)):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
    assert header == {"values": [1, None, "x"]}


def test_arrays_of_jax_are_written_too(tmp_path):
    write_container(tmp_path / "a.safetensors", {"x": jnp.ones(3, jnp.bfloat16)}, {}, "test", 1)
    arrays, _ = read_container(tmp_path / "a.safetensors", "test", 1)
    assert arrays["x"].dtype == ml_dtypes.bfloat16


def test_files_written_by_torch_are_read_without_it(tmp_path):
    tensors = {"half": torch.arange(6.0).bfloat16().reshape(2, 3), "eight": torch.arange(4.0).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    arrays, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}
    assert arrays["half"].tolist() == tensors["half"].tolist()
    assert arrays["eight"].astype(np.float32).tolist() == [0, 1, 2, 3]


def test_the_hash_depends_on_names_dtypes_shapes_values_and_header():
    x = np.arange(4, dtype=np.int32)
    variants = [({"x": x}, "{}"), ({"y": x}, "{}"), ({"x": x.view(np.uint32)}, "{}"), ({"x": x.reshape(2, 2)}, "{}")]
    variants += [({"x": x[::-1]}, "{}"), ({"x": x}, "[]"), ({"x": x, "y": x}, "{}")]
    assert (
        len({content_hash({k: np.ascontiguousarray(v) for k, v in arrays.items()}, h) for arrays, h in variants}) == 7
    )


def test_a_file_without_a_header_has_no_metadata(tmp_path):
    for content in (b"", b"12345", b"\x05" + bytes(7) + b"[1,2]xxx", json.dumps({"a": 1}).encode()):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert read_metadata(tmp_path / "a.safetensors") == {}
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["", ".", "folder", "/dev/null"])
def test_what_is_no_regular_file_is_never_replaced(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(UserError, match="is not the name of a file"), atomic_write(name) as temporary:
        temporary.write_text("x")
    assert Path("folder").is_dir()
    assert Path("/dev/null").is_char_device()


def test_arrays_in_another_order_keep_their_values(tmp_path):
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    write_safetensors(tmp_path / "a.safetensors", {"a": array}, {})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "a.safetensors")[0]["a"], array)

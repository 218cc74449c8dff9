"""Safetensors files read and written with numpy alone, and the checked container that packages are stored in."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sam2jq.errors import UserError
from sam2jq.file_kinds import check_kind
from sam2jq.files import atomic_write

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}

Arrays = dict[str, np.ndarray]


def read_safetensors(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a safetensors file by name, and its metadata ({} where it has none).

    bfloat16 and float8 arrays have the dtypes of ml_dtypes.
    Raises UserError if the file is of another kind, is damaged or holds a dtype that numpy has no equivalent of.
    """
    check_kind(path, "safetensors")
    content = Path(path).read_bytes()
    try:
        entries = safetensors.deserialize(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file, maybe truncated: fetch it again") from error
    unknown = sorted({entry["dtype"] for _, entry in entries} - DTYPES.keys())
    if unknown:
        raise UserError(f"{path} holds arrays of dtype {', '.join(unknown)}; readable: {', '.join(DTYPES)}")
    return {name: _to_array(entry) for name, entry in entries}, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file without its arrays; {} where it has none or the header is unreadable."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)).get("__metadata__", {}) if length < Path(path).stat().st_size else {}
    except (ValueError, AttributeError):
        return {}


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays, in C order, and text metadata to a safetensors file, atomically."""
    with atomic_write(path) as temporary:
        # the bytes of an array in another order would be written as they lie in memory
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        temporary.write_bytes(safetensors.numpy.save(ordered, metadata))


def write_container(path: str | Path, arrays: Mapping[str, np.ndarray], header: dict, kind: str, version: int) -> None:
    """Writes `arrays` and `header` (any JSON value) to a safetensors file, atomically.

    The file's metadata holds the format name `kind`, its version, the header, and the sha256 of arrays and header.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}  # jax arrays, too
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": kind, "format_version": str(version), "header": text, "sha256": content_hash(arrays, text)}
    write_safetensors(path, arrays, metadata)


def read_container(path: str | Path, kind: str, version: int) -> tuple[Arrays, dict]:
    """The arrays and the header that `write_container` wrote.

    Raises UserError if the file has another format or version, or if its content does not match its hash.
    """
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != kind or "format_version" not in metadata:
        raise UserError(f"{path} is not a {kind} package; sam2jq.save and `sam2jq quantize` write packages")
    if metadata["format_version"] != str(version):
        raise UserError(
            f"{path} has package version {metadata['format_version']}, this sam2jq reads {version}: "
            "quantize again, or use the version that wrote it"
        )
    text = metadata.get("header", "")
    if content_hash(arrays, text) != metadata.get("sha256"):
        raise UserError(f"{path} is damaged: its content does not match its hash; copy or fetch it again")
    return arrays, json.loads(text)


def content_hash(arrays: Mapping[str, np.ndarray], header: str) -> str:
    """The sha256, in hexadecimal, of a header and of the name, dtype, shape and bytes of every array."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _to_array(entry: dict) -> np.ndarray:
    """One array of a safetensors file; it shares the memory of the entry's bytes."""
    return np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])

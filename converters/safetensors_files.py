"""Checkpoints in safetensors files: one, or several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.hf_checks import read_object
from sam2jq.errors import UserError, few
from sam2jq.io import Arrays, content_hash, read_safetensors, write_safetensors
from sam2jq.quant.package import MODEL_KEYS


def read_tensors(path: Path) -> tuple[Arrays, dict]:
    """The arrays in a file, or in the files of an index (.json), and what is known of name, version and image_size.

    Raises UserError if a file is missing or damaged, or does not match the hash that `write_tensors` stored.
    """
    if path.suffix == ".json":
        return read_shards(path), {}
    arrays, metadata = read_safetensors(path)
    about = metadata.get("sam2jq", "")
    if metadata.get("sha256", content := content_hash(arrays, about)) != content:
        raise UserError(f"{path} is damaged: its content does not match its hash; copy or fetch it again")
    try:
        return arrays, known_model(json.loads(about or "{}"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its header does not describe a model; copy or fetch it again") from error


def known_model(about: object) -> dict:
    """The valid ones of name, version and image_size in what a file says about its model; {} if it says nothing."""
    about = about if isinstance(about, Mapping) else {}
    return {key: about[key] for key, kind in MODEL_KEYS.items() if type(about.get(key)) is kind}


def write_tensors(path: str | Path, arrays: Mapping[str, np.ndarray], model: Mapping | None = None) -> None:
    """Writes arrays as a safetensors file that transformers reads, atomically, with a hash of the content.

    model: name, version and image_size, where they are known.
    """
    about = json.dumps(dict(model)) if model else ""
    metadata = {"format": "pt", "sha256": content_hash(arrays, about)} | ({"sam2jq": about} if about else {})
    write_safetensors(path, arrays, metadata)


def read_shards(index: Path) -> Arrays:
    """The arrays of all files that an index names. Raises UserError if a file or a tensor is missing."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is no index of safetensors files: its weight_map must name a file for each tensor")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{index}: {outside[0]!r} lies outside of its folder; name files beside the index")
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names {few(absent)}, which {'is' if len(absent) == 1 else 'are'} not beside it")
    shards = {name: read_safetensors(index.parent / name)[0] for name in files}
    if missing := [f"{key} in {name}" for key, name in names.items() if key not in shards[name]]:
        raise UserError(f"{index} names tensors that are not there: {few(missing)}")
    extra = [f"{key} in {name}" for name in files for key in shards[name] if names.get(key) != name]
    if extra:
        raise UserError(f"{index} does not name {few(extra)}")
    return {key: shards[name][key] for key, name in names.items()}

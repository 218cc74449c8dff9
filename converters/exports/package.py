"""The bit-packed torch package, package.pt: the parts of `sam2jq.quant.packing` as tensors, every tensor in one file.

A native package (package.safetensors) holds the same; `load_package` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.names import array, tensor, to_layout, torch_key
from converters.torch_files import load_torch, save_torch
from sam2jq.errors import UserError
from sam2jq.io import content_hash
from sam2jq.quant.leaves import materialize
from sam2jq.quant.package import (
    FORMAT,
    Package,
    PackedLayer,
    complete_metadata,
    is_native,
    pack_params,
    read_package,
    summarize,
)
from sam2jq.quant.packing import check_codes, map_parts, parts_of

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TorchPackage:
    """layers: by torch module name; tensors: everything that is not quantized, by torch key."""

    metadata: dict
    layers: dict[str, PackedLayer]
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The complete vanilla state dict: `torch.save({"model": package.state_dict()}, p)` loads in build_sam2."""
        return self.tensors | {torch_key(layer.path): dequantize(layer) for layer in self.layers.values()}

    def leaves(self) -> dict[str, object]:
        """{path in the params tree: weight leaf} of the quantized layers."""
        return {layer.path: layer.leaf() for layer in self.layers.values()}

    def summary(self) -> dict:
        """The metadata, one row per layer and the totals; see `sam2jq.quant.package.summarize`."""
        return summarize(self.metadata, self.layers, self.tensors)


def dequantize(layer: PackedLayer) -> torch.Tensor:
    """The float32 weight of a packed layer, in torch's layout."""
    return tensor(to_layout(layer.path, np.asarray(materialize(layer.leaf()))))


def save_package(path: str | Path, params: dict, errors: Mapping[str, float], metadata: dict) -> None:
    """Writes `params` (arrays and weight leaves) with codes packed to their bit width, atomically.

    errors: {layer: relative weight error}, where they are known. metadata: see `complete_metadata`.
    Raises UserError if the metadata does not describe the model.
    """
    package = pack_params(params, errors, complete_metadata(metadata, path))
    layers = {
        name: {"path": layer.path, "error": layer.error, "leaf": map_parts(layer.stored, tensor, np.ndarray)}
        for name, layer in package.layers.items()
    }
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "metadata": package.metadata}
    tensors = to_tensors(package)
    header["sha256"] = package_hash(package.metadata, package.layers, tensors)
    save_torch(path, header | {"layers": layers, "tensors": tensors})


def package_hash(metadata: Mapping, layers: Mapping[str, PackedLayer], tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256, in hexadecimal, of everything in a package."""
    arrays = {f"tensor {key}": array(x) for key, x in tensors.items()}
    described = {}
    for name, layer in layers.items():
        arrays |= {f"layer {name}/{part}": x for part, x in parts_of(layer.stored)}
        described[name] = layer.path, layer.error, map_parts(layer.stored, lambda _: None, np.ndarray)
    return content_hash(arrays, json.dumps([dict(metadata), described], sort_keys=True))


def load_package(path: str | Path) -> TorchPackage:
    """The package in a file, package.pt or package.safetensors; nothing in it is executed.

    Raises UserError if the file is no package, has another version or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no package at {path}; `sam2jq quantize` writes one into its output folder")
    if is_native(path):
        package = read_package(path)
        return TorchPackage(package.metadata, package.layers, to_tensors(package))
    content = load_torch(path) if Path(path).suffix != ".safetensors" else None
    if not is_package(content):
        raise UserError(f"{path} is not a sam2jq package; `sam2jq quantize` writes package.pt into its output folder")
    return open_package(content, path)


def is_package(content: object) -> bool:
    """Whether the content of a torch file is a package."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def open_package(content: dict, path: str | Path) -> TorchPackage:
    """The package with the content of a torch file; `path` is named in errors.

    Raises UserError if it has another version or is damaged.
    """
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has package version {content.get('format_version')}, this sam2jq reads {FORMAT_VERSION}: "
            "quantize again, or use the version that wrote it"
        )
    try:
        layers = {
            name: PackedLayer(entry["path"], map_parts(entry["leaf"], array, torch.Tensor), entry["error"])
            for name, entry in content["layers"].items()
        }
        for name, layer in layers.items():
            check_codes(f"{path}: layer {name}", layer.stored)
        tensors = dict(content["tensors"])
        own = content.get("sha256")  # packages of version 0.1 have none
        if own is not None and own != package_hash(content["metadata"], layers, tensors):
            raise UserError(f"{path} is damaged: its content does not match its hash; copy or fetch it again")
        return TorchPackage(complete_metadata(content["metadata"], path), layers, tensors)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: its content does not describe a package ({error!r})") from error


def to_tensors(package: Package) -> dict[str, torch.Tensor]:
    """The arrays of a package that are not quantized, by torch key and in torch's layout."""
    return {torch_key(path): tensor(to_layout(path, value)) for path, value in package.arrays.items()}

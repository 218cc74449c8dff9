"""Native packages: every array of a quantized model in one safetensors file, read and written without torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import numpy as np

from sam2jq.errors import UserError
from sam2jq.io import read_container, read_metadata, write_container
from sam2jq.quant.leaves import unwrap
from sam2jq.quant.packing import check_codes, map_parts, pack_leaf, parts_of, unpack_leaf
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, layer_name, unflatten

FORMAT, FORMAT_VERSION = "sam2jq", 1
MODEL_KEYS = {"name": str, "version": str, "image_size": int}
# what a package may leave out of its metadata, and what is then assumed
DEFAULTS = {
    "names": "original",  # or "huggingface": the naming style of the source checkpoint's tensors
    "random_weights": False,  # whether the weights were drawn, not trained
    "checkpoint": "",  # hash of the full-precision params
    "input_ranges": {},  # {layer: [lowest, highest input]}
    "config": {},  # resolved settings of the run
    "results": {},  # measured figures
    "versions": {},  # of the packages that wrote the file
}


@dataclass(frozen=True)
class PackedLayer:
    """A quantized kernel as packages store it.

    path: in the params tree. stored: the dict that `pack_leaf` returns. error: the relative weight error
    |w_hat - w| / |w| at quantization, None if it is unknown.
    """

    path: str
    stored: dict
    error: float | None

    def leaf(self):
        """The weight leaf, of numpy arrays."""
        return unpack_leaf(self.stored)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in parts_of(self.stored))


@dataclass(frozen=True)
class Package:
    """layers: by layer name; arrays: every array that is not quantized, by its path in the params tree."""

    metadata: dict
    layers: dict[str, PackedLayer]
    arrays: dict[str, np.ndarray]

    def leaves(self) -> dict[str, object]:
        """{path in the params tree: weight leaf} of the quantized layers."""
        return {layer.path: layer.leaf() for layer in self.layers.values()}

    def params(self) -> dict:
        """The params tree, of numpy arrays and weight leaves."""
        return unflatten(self.arrays | self.leaves())

    def summary(self) -> dict:
        """The metadata, one row per layer and the totals; see `summarize`."""
        return summarize(self.metadata, self.layers, self.arrays)


def pack_params(params: dict, errors: Mapping[str, float], metadata: dict) -> Package:
    """`params` with every weight leaf packed; errors: {layer: relative weight error}, where they are known."""
    flat = flatten(params)
    leaves = {path: leaf for path, leaf in flat.items() if is_dataclass(leaf)}
    layers = {
        layer_name(path): PackedLayer(path, pack_leaf(leaf), errors.get(layer_name(path)))
        for path, leaf in leaves.items()
    }
    return Package(metadata, layers, {path: np.asarray(leaf) for path, leaf in flat.items() if path not in leaves})


def write_package(path: str | Path, package: Package) -> None:
    """Writes a native package, atomically: arrays by path, the rest in the file's JSON header.

    Raises UserError if the metadata does not describe the model.
    """
    metadata = complete_metadata(package.metadata, path)
    arrays, layers = dict(package.arrays), {}
    for name, layer in package.layers.items():
        arrays |= {f"{layer.path}/{part}": array for part, array in parts_of(layer.stored)}
        stored = map_parts(layer.stored, lambda _: {"kind": "stored"}, np.ndarray)
        layers[name] = {"path": layer.path, "error": layer.error, "leaf": stored}
    write_container(path, arrays, {"metadata": metadata, "layers": layers}, FORMAT, FORMAT_VERSION)


def read_package(path: str | Path) -> Package:
    """The native package in a file; nothing in it is executed.

    Raises UserError if the file is no package, has another version or is damaged.
    """
    arrays, header = read_container(path, FORMAT, FORMAT_VERSION)
    layers = {}
    try:
        for name, entry in header["layers"].items():
            stored = _restore(entry["leaf"], entry["path"], arrays)
            check_codes(f"{path}: layer {name}", stored)
            layers[name] = PackedLayer(entry["path"], stored, entry["error"])
        return Package(complete_metadata(header["metadata"], path), layers, arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its header does not describe a package ({error!r})") from error


def is_native(path: str | Path) -> bool:
    """Whether a file, whatever its name, says in its safetensors header that it is a native package."""
    return read_metadata(path).get("format") == FORMAT


def complete_metadata(metadata: Mapping, path: str | Path) -> dict:
    """`metadata` with DEFAULTS for what it leaves out.

    Raises UserError if metadata["model"] lacks a key of MODEL_KEYS, or if a value has another type or is
    not plain.
    """
    model = metadata.get("model")
    model = dict(model) if isinstance(model, Mapping) else {}
    problems = [f"model.{key}" for key, kind in MODEL_KEYS.items() if type(model.get(key)) is not kind]
    full = DEFAULTS | {key: value for key, value in metadata.items()}
    problems += [key for key, default in DEFAULTS.items() if type(full[key]) is not type(default)]
    if full["names"] not in ("original", "huggingface"):
        problems.append("names")
    problems += [key for key, value in full.items() if key not in problems and not is_plain(value)]
    if problems:
        raise UserError(f"{path}: a package's metadata lacks a valid {', '.join(problems)}: write it with sam2jq.save")
    return full | {"model": {"checkpoint": "unknown"} | model}


def is_plain(value: object) -> bool:
    """Whether a value is made of what JSON has: numbers, text, booleans, None, lists and dicts."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def summarize(metadata: dict, layers: Mapping[str, PackedLayer], tensors: Mapping) -> dict:
    """The metadata, one row per layer and the totals, as plain numbers and strings.

    tensors: everything that is not quantized, numpy or torch. effective_bits counts codes, scales and zero points per
    quantized weight; bytes are those of the arrays, without names.
    """
    rows = [describe(name, layer) for name, layer in layers.items()]
    weights, size = (sum(row[key] for row in rows) for key in ("weights", "bytes"))
    parameters = weights + sum(math.prod(tensor.shape) for tensor in tensors.values())
    return metadata | {
        "layers": rows,
        "parameters": parameters,
        "quantized_weights": weights,
        "effective_bits": 8 * size / weights if weights else None,
        "bytes_quantized": size,
        "bytes_unquantized": sum(tensor.nbytes for tensor in tensors.values()),
        "bytes_float32": 4 * parameters,
    }


def describe(name: str, layer: PackedLayer) -> dict:
    """One row of a summary.

    around: the kinds of the leaves around the rounded weight, outermost first; rank: of the low-rank branch, 0 without
    one; inputs: the dtype that inputs are rounded to, None if they are not; relative_error: NaN if it is unknown.
    """
    around, stored, rank, inputs = [], layer.stored, 0, None
    while "inner" in stored:
        match stored["kind"]:
            case "LowRank":
                rank = stored["up"]["shape"][0]
            case "ActQuantized":
                inputs = unpack_leaf(stored["spec"]).dtype
        around, stored = [*around, stored["kind"]], stored["inner"]
    spec = None if stored["kind"] == "array" else QuantSpec(**stored["spec"])
    return {
        "name": name,
        "dtype": spec.dtype if spec else "float32",
        "bits": spec.bits if spec else 32,
        "group": spec.group if spec else "",
        "around": around,
        "rank": rank,
        "inputs": inputs,
        "weights": math.prod(stored["shape"]),
        "bytes": layer.nbytes,
        "relative_error": math.nan if layer.error is None else layer.error,
    }


def mismatches(got: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """One entry per name that only one side has or whose shapes differ; [] if both sides agree."""
    missing = [f"missing {key}" for key in expected if key not in got]
    extra = [f"extra {key}" for key in got if key not in expected]
    misshapen = [
        f"{key} is {list(got[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in got and tuple(got[key]) != tuple(shape)
    ]
    return missing + extra + misshapen


def full_shape(leaf) -> tuple[int, ...]:
    """The shape [*reduce, out] of the kernel that a leaf or a plain array stands for."""
    inner, _ = unwrap(leaf)
    return tuple(inner.qvalue.shape if isinstance(inner, QTensor) else inner.shape)


def _restore(stored: dict, prefix: str, arrays: dict[str, np.ndarray]) -> dict:
    """`stored` with the arrays in place of {"kind": "stored"}; they are removed from `arrays`."""
    return {
        name: part
        if not isinstance(part, dict)
        else arrays.pop(f"{prefix}/{name}")
        if part == {"kind": "stored"}
        else _restore(part, f"{prefix}/{name}", arrays)
        for name, part in stored.items()
    }

"""The bit-packed torch package: every tensor of a quantized model in one file, complete on its own."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from converters.names import tensor, to_layout, torch_key
from converters.torch_files import load_torch, save_torch
from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import materialize
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import E2M1, QuantSpec
from sam2jq.tree import flatten, layer_name

FORMAT, FORMAT_VERSION = "sam2jq", 2
LEAVES = {cls.__name__: cls for cls in (QuantSpec, Smoothed, Rotated, LowRank, ActQuantized, OutQuantized)}


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [ceil(n * bits / 8)]: the low `bits` bits of each code, least significant first, without gaps."""
    spread = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [count]: the codes that `pack_bits` packed, without their sign."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]


@dataclass(frozen=True)
class PackedLayer:
    """A quantized kernel as it lies in the file: its path in the tree, its leaf in plain dicts and tensors, and its
    relative weight error |w_hat - w| / |w| when it was made."""

    path: str
    stored: dict
    error: float

    def leaf(self):
        """The weight leaf that was packed, of numpy arrays."""
        return unpack_leaf(self.stored)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight in torch's layout that the leaf stands for."""
        return tensor(to_layout(self.path, np.asarray(materialize(self.leaf()))))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in tensors(self.stored))


@dataclass(frozen=True)
class Package:
    """layers: by torch module name; tensors: everything that is not quantized, by torch key."""

    metadata: dict
    layers: dict[str, PackedLayer]
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The complete vanilla state dict: `torch.save({"model": package.state_dict()}, p)` loads in build_sam2."""
        weights = {torch_key(layer.path): layer.dequantize() for layer in self.layers.values()}
        return self.tensors | weights

    def leaves(self) -> dict[str, object]:
        """{path in the params tree: weight leaf} of the quantized layers."""
        return {layer.path: layer.leaf() for layer in self.layers.values()}

    def summary(self) -> dict:
        """The metadata with a row per layer and the totals, plain numbers and strings: what reports are made of.

        effective_bits counts codes, scales and zeros per quantized weight; bytes are those of tensors, without names.
        """
        rows = [describe(name, layer) for name, layer in self.layers.items()]
        weights, size = (sum(row[key] for row in rows) for key in ("weights", "bytes"))
        rest = sum(t.nbytes for t in self.tensors.values())
        parameters = weights + sum(t.numel() for t in self.tensors.values())
        return self.metadata | {
            "layers": rows,
            "parameters": parameters,
            "quantized_weights": weights,
            "effective_bits": 8 * size / weights if weights else None,
            "bytes_quantized": size,
            "bytes_unquantized": rest,
            "bytes_float32": 4 * parameters,
        }


def describe(name: str, layer: PackedLayer) -> dict:
    """One row of a summary; `around`: what stands round the rounded weight, from outside; rank: of the branch, 0 for
    none; inputs: the dtype they are rounded to, None where they are not."""
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
        "relative_error": layer.error,
    }


def save_package(path: str | Path, params: dict, errors: dict[str, float], metadata: dict) -> None:
    """Writes `params` (arrays and weight leaves) with codes packed to their width; `errors` by layer name."""
    flat = flatten(params)
    leaves = {p: leaf for p, leaf in flat.items() if dataclasses.is_dataclass(leaf)}
    layers = {
        layer_name(p): {"path": p, "error": errors[layer_name(p)], "leaf": pack_leaf(leaf)}
        for p, leaf in leaves.items()
    }
    plain = {torch_key(p): tensor(to_layout(p, np.asarray(leaf))) for p, leaf in flat.items() if p not in leaves}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "metadata": metadata}
    save_torch(path, header | {"layers": layers, "tensors": plain})


def load_package(path: str | Path) -> Package:
    """The package in a file, nothing in it executed. ValueError: not a package, of another version, or damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no package at {path}; `sam2jq quantize` writes one into its output folder")
    content = load_torch(path)
    if not is_package(content):
        raise UserError(f"{path} is not a sam2jq package; `sam2jq quantize` writes package.pt into its output folder")
    return open_package(content, path)


def is_package(content: object) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def open_package(content: dict, path: str | Path) -> Package:
    """The package that a file's content is; `path` for the error."""
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has package version {content['format_version']}, this sam2jq reads {FORMAT_VERSION}: "
            "quantize again, or use the version that wrote it"
        )
    layers = {
        name: PackedLayer(entry["path"], entry["leaf"], entry["error"]) for name, entry in content["layers"].items()
    }
    for name, layer in layers.items():
        check_codes(f"{path}: layer {name}", layer.stored)
    return Package(content["metadata"], layers, content["tensors"])


def check_codes(where: str, stored: dict) -> None:
    """ValueError unless a stored leaf holds as many bytes of codes as its shape wants."""
    if "inner" in stored:
        check_codes(where, stored["inner"])
    elif stored["kind"] == "QTensor":
        expected = math.ceil(math.prod(stored["shape"]) * stored["spec"]["bits"] / 8)
        if stored["codes"].numel() != expected:
            raise UserError(f"{where} has {stored['codes'].numel()} bytes of codes, not {expected}: damaged")


def pack_leaf(leaf) -> dict:
    """A weight leaf, and those inside it, as dicts of tensors and plain values; `kind` names its class."""
    match leaf:
        case QTensor(values, scale, zero, spec):
            return {
                "kind": "QTensor",
                "shape": list(values.shape),
                "spec": dataclasses.asdict(spec),
                "codes": torch.from_numpy(pack_bits(to_bits(np.asarray(values), spec), spec.bits)),
                "scale": compact(scale),
                "zero": None if zero is None else tensor(np.asarray(zero).astype(np.uint8)),
            }
        case QuantSpec():
            return {"kind": "QuantSpec"} | dataclasses.asdict(leaf)
        case _ if dataclasses.is_dataclass(leaf):
            parts = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            return {"kind": type(leaf).__name__} | {
                name: part if isinstance(part, bool | None) else pack_leaf(part) for name, part in parts.items()
            }
        case _:
            return {"kind": "array", "shape": list(leaf.shape), "values": compact(leaf)}


def compact(array) -> torch.Tensor:
    """A tensor of `array`, in bfloat16 where that loses nothing, as scales and branches are often made to be."""
    array = np.asarray(array)
    half = array.astype(ml_dtypes.bfloat16)
    return tensor(half if np.array_equal(half.astype(array.dtype), array) else array)


def unpack_leaf(stored: dict):
    """The leaf that `pack_leaf` made the dict of, with numpy arrays."""
    match stored:
        case {"kind": "QTensor", "shape": shape, "spec": spec, "codes": codes, "scale": scale, "zero": zero}:
            spec = QuantSpec(**spec)
            values = from_bits(unpack_bits(codes.numpy(), spec.bits, math.prod(shape)), spec).reshape(shape)
            return QTensor(
                values, scale.float().numpy(), None if zero is None else zero.numpy().astype(np.float32), spec
            )
        case {"kind": "array", "values": values}:
            return values.float().numpy()
        case {"kind": kind, **parts}:
            return LEAVES[kind](
                **{k: unpack_leaf(part) if isinstance(part, dict) else part for k, part in parts.items()}
            )


def to_bits(values: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """A QTensor's values as integers whose low `bits` bits are the code; an e2m1's are sign and magnitude."""
    if spec.codes == "int":
        return values
    if spec.bits == 8:
        return values.view(np.uint8)
    values = values.astype(np.float32)
    return (np.searchsorted(E2M1, np.abs(values)) + 8 * (values < 0)).astype(np.uint8)


def from_bits(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Inverse of `to_bits`."""
    if spec.codes == "int":
        unused = 8 - spec.bits
        return (codes << unused).view(np.int8) >> unused if spec.symmetric else codes
    if spec.bits == 4:
        codes = (np.array(E2M1)[codes & 7] * np.where(codes & 8, -1, 1)).astype(ml_dtypes.float8_e4m3fn)
    return codes.view(ml_dtypes.float8_e4m3fn)


def tensors(stored: dict) -> Iterator[torch.Tensor]:
    """Every tensor in a stored leaf."""
    for part in stored.values():
        if isinstance(part, dict):
            yield from tensors(part)
        elif isinstance(part, torch.Tensor):
            yield part

"""The bit-packed torch package: every tensor of a quantized model in one file, complete on its own."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.files import load_torch, save_torch
from converters.names import tensor, to_layout, torch_key
from sam2jq.quant.qtensor import QTensor, dequantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, layer_name

FORMAT, FORMAT_VERSION = "sam2jq", 1


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [ceil(n * bits / 8)]: the low `bits` bits of each code, least significant first, without gaps."""
    spread = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [count]: the codes that `pack_bits` packed, without their sign."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]


@dataclass(frozen=True)
class PackedTensor:
    """A quantized kernel as it lies in the file. codes: uint8 [bytes]; shape: of the kernel, [*reduce, out]."""

    path: str
    shape: tuple[int, ...]
    spec: QuantSpec
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def qtensor(self) -> QTensor:
        """The weight leaf that was packed, of numpy arrays."""
        codes = unpack_bits(self.codes.numpy(), self.spec.bits, math.prod(self.shape)).reshape(self.shape)
        if self.spec.symmetric:  # sign-extend
            unused = 8 - self.spec.bits
            codes = (codes << unused).view(np.int8) >> unused
        zero = None if self.zero is None else self.zero.numpy().astype(np.float32)
        return QTensor(codes, self.scale.numpy(), zero, self.spec)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight in torch's layout: (code - zero) * scale."""
        return tensor(to_layout(self.path, dequantize(self.qtensor())))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero) if t is not None)


@dataclass(frozen=True)
class PackedLayer:
    """error: relative weight error |w_hat - w| / |w| when it was made."""

    tensor: PackedTensor
    error: float


@dataclass(frozen=True)
class Package:
    """layers: by torch module name; tensors: everything that is not quantized, by torch key."""

    metadata: dict
    layers: dict[str, PackedLayer]
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The complete vanilla state dict: `torch.save({"model": package.state_dict()}, p)` loads in build_sam2."""
        weights = {torch_key(layer.tensor.path): layer.tensor.dequantize() for layer in self.layers.values()}
        return self.tensors | weights

    def summary(self) -> dict:
        """The metadata with a row per layer and the totals, plain numbers and strings: what reports are made of.

        effective_bits counts codes, scales and zeros per quantized weight; bytes are those of tensors, without names.
        """
        rows = [
            {
                "name": name,
                "dtype": layer.tensor.spec.dtype,
                "group": layer.tensor.spec.group,
                "weights": math.prod(layer.tensor.shape),
                "bytes": layer.tensor.nbytes,
                "relative_error": layer.error,
            }
            for name, layer in self.layers.items()
        ]
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


def save_package(path: str | Path, params: dict, errors: dict[str, float], metadata: dict) -> None:
    """Writes `params` (arrays and QTensor leaves) with codes packed to their width; `errors` by layer name."""
    flat = flatten(params)
    layers = {
        layer_name(p): _pack(p, q) | {"error": errors[layer_name(p)]} for p, q in flat.items() if isinstance(q, QTensor)
    }
    tensors = {
        torch_key(p): tensor(to_layout(p, np.asarray(leaf)))
        for p, leaf in flat.items()
        if not isinstance(leaf, QTensor)
    }
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "metadata": metadata}
    save_torch(path, header | {"layers": layers, "tensors": tensors})


def load_package(path: str | Path) -> Package:
    """The package in a file, nothing in it executed. ValueError: not a package, of another version, or damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no package at {path}; `sam2jq quantize` writes one into its output folder")
    content = load_torch(path)
    if not is_package(content):
        raise ValueError(f"{path} is not a sam2jq package; `sam2jq quantize` writes package.pt into its output folder")
    return open_package(content, path)


def is_package(content: object) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def open_package(content: dict, path: str | Path) -> Package:
    """The package that a file's content is; `path` for the error."""
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has package version {content['format_version']}, this sam2jq reads {FORMAT_VERSION}: "
            "quantize again, or use the version that wrote it"
        )
    layers = {name: PackedLayer(_unpack(entry), entry["error"]) for name, entry in content["layers"].items()}
    for name, layer in layers.items():
        packed, expected = layer.tensor, math.ceil(math.prod(layer.tensor.shape) * layer.tensor.spec.bits / 8)
        if packed.codes.numel() != expected:
            raise ValueError(f"{path}: layer {name} has {packed.codes.numel()} bytes of codes, not {expected}: damaged")
    return Package(content["metadata"], layers, content["tensors"])


def _pack(path: str, q: QTensor) -> dict:
    spec = q.spec
    return {
        "path": path,
        "shape": list(q.values.shape),
        "bits": spec.bits,
        "symmetric": spec.symmetric,
        "group_size": spec.group_size,
        "per_tensor": spec.per_tensor,
        "codes": torch.from_numpy(pack_bits(np.asarray(q.values), spec.bits)),
        "scale": tensor(q.scale),
        "zero": None if q.zero is None else tensor(np.asarray(q.zero).astype(np.uint8)),
    }


def _unpack(entry: dict) -> PackedTensor:
    spec = QuantSpec(entry["bits"], entry["symmetric"], entry["group_size"], entry["per_tensor"])
    return PackedTensor(entry["path"], tuple(entry["shape"]), spec, entry["codes"], entry["scale"], entry["zero"])

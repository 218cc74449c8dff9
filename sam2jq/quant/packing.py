"""Weight leaves as plain dicts of numpy arrays, with codes packed to their bit width: the codec of all packages."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import ml_dtypes
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant import algorithms
from sam2jq.quant.leaves import LEAVES
from sam2jq.quant.qtensor import QTensor, storage_dtype
from sam2jq.quant.spec import QuantSpec


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [ceil(n * bits / 8)]: the low `bits` bits of each code, least significant first, without gaps."""
    spread = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [count]: the codes that `pack_bits` packed, without sign extension."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]


def pack_leaf(leaf) -> dict:
    """A weight leaf and the leaves inside it as nested dicts of numpy arrays and plain values.

    `kind` is the name of the leaf's class, "array" for a plain array.
    """
    match leaf:
        case QTensor(codes, scale, zero_point, spec):
            return {
                "kind": "QTensor",
                "shape": list(codes.shape),
                "spec": dataclasses.asdict(spec),
                "codes": pack_bits(to_bits(np.asarray(codes), spec), spec.bits),
                "scale": compact(scale),
                "zero": None if zero_point is None else np.asarray(zero_point).astype(np.uint8),
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


def unpack_leaf(stored: dict):
    """The leaf that `pack_leaf` converted, with numpy arrays in float32.

    Raises UserError if no leaf class is called `kind`, or if the class has other fields.
    """
    match stored:
        case {"kind": "QTensor", "shape": shape, "spec": spec, "codes": codes, "scale": scale, "zero": zero}:
            spec = QuantSpec(**spec)
            codes = from_bits(unpack_bits(codes, spec.bits, math.prod(shape)), spec).reshape(shape)
            zero_point = None if zero is None else zero.astype(np.int16)
            return QTensor(codes, scale.astype(np.float32), zero_point, spec)
        case {"kind": "array", "values": values}:
            return values.astype(np.float32)
        case {"kind": "QuantSpec", **fields}:
            return QuantSpec(**fields)
        case {"kind": kind, **parts} if kind in leaf_classes():
            cls = leaf_classes()[kind]
            if unknown := parts.keys() - {field.name for field in dataclasses.fields(cls)}:
                raise UserError(f"weight leaf {kind} has no field {', '.join(sorted(unknown))}")
            return cls(**{k: unpack_leaf(part) if isinstance(part, dict) else part for k, part in parts.items()})
    raise UserError(f"unknown weight leaf {stored.get('kind')!r}; known: {', '.join(sorted(leaf_classes()))}")


@cache
def leaf_classes() -> dict[str, type]:
    """The classes of weight leaves by name, after every module that may define one was imported."""
    for module in iter_modules(algorithms.__path__):
        import_module(f"{algorithms.__name__}.{module.name}")
    return dict(LEAVES)


def to_bits(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """A QTensor's codes as integers whose low `bits` bits hold the code; for e2m1 they are sign and magnitude index."""
    if spec.codes == "int":
        return codes
    return codes.view(np.uint8)


def from_bits(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Inverse of `to_bits`, with sign extension, in the spec's `storage_dtype`."""
    if spec.codes == "float":
        return codes.view(ml_dtypes.float4_e2m1fn if spec.bits == 4 else ml_dtypes.float8_e4m3fn)
    unused = 8 - spec.bits
    codes = (codes << unused).view(np.int8) >> unused if spec.symmetric else codes
    return codes.astype(storage_dtype(spec))


def compact(array) -> np.ndarray:
    """`array` in bfloat16 if that is lossless, else as it is; many scales and branches are bfloat16 values."""
    array = np.asarray(array)
    half = array.astype(ml_dtypes.bfloat16)
    return half if np.array_equal(half.astype(array.dtype), array) else array


def check_codes(where: str, stored: dict) -> None:
    """Raises UserError unless a stored leaf holds as many bytes of codes as its shape and bit width require."""
    if "inner" in stored:
        check_codes(where, stored["inner"])
    elif stored["kind"] == "QTensor":
        expected = math.ceil(math.prod(stored["shape"]) * stored["spec"]["bits"] / 8)
        if len(stored["codes"]) != expected:
            raise UserError(f"{where} has {len(stored['codes'])} bytes of codes, not {expected}: damaged")


def map_parts(stored: dict, fn: Callable, kind: type) -> dict:
    """`stored` with fn(part) in place of every part of class `kind`, in nested dicts too."""
    convert = lambda part: map_parts(part, fn, kind) if isinstance(part, dict) else part
    return {name: fn(part) if isinstance(part, kind) else convert(part) for name, part in stored.items()}


def parts_of(stored: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The path, as in "inner/codes", and the array of every array in a stored leaf."""
    for name, part in stored.items():
        if isinstance(part, dict):
            yield from parts_of(part, f"{prefix}{name}/")
        elif isinstance(part, np.ndarray):
            yield prefix + name, part

"""Params tree <-> torch state dict: a bijection of names and layouts. torch is imported only where tensors are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import ml_dtypes
import numpy as np

from sam2jq.errors import UserError, few
from sam2jq.quant.package import mismatches
from sam2jq.tree import flatten, unflatten

if TYPE_CHECKING:
    import torch

LEAF = {"kernel": "weight", "scale": "weight"}
# dtypes that numpy and torch do not share, by the integer type that transfers their bits
SHARED_BITS = {"bfloat16": (ml_dtypes.bfloat16, "int16"), "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, "int8")}
TRANSPOSED = ("output_upscaling.0", "output_upscaling.3")  # the two ConvTranspose layers of the mask decoder


def torch_key(path: str) -> str:
    """The torch key of a path: "blocks.0/attn/qkv/kernel" -> "blocks.0.attn.qkv.weight"."""
    *modules, leaf = path.split("/")
    return ".".join((*modules, LEAF.get(leaf, leaf)))


def to_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel [*reduce, out] in torch's layout; other arrays as they are.

    Linear [in, out] -> [out, in]; Conv [kh, kw, in, out] -> [out, in, kh, kw]; ConvTranspose -> [in, out, kh, kw],
    with the window rotated by 180 degrees, because torch computes the gradient of a convolution and XLA a dilated one.
    """
    module, _, leaf = path.rpartition("/")
    if leaf != "kernel":
        return array
    if module.endswith(TRANSPOSED):
        return array[::-1, ::-1].transpose(2, 3, 0, 1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Inverse of `to_layout`."""
    module, _, leaf = path.rpartition("/")
    if leaf != "kernel":
        return array
    if module.endswith(TRANSPOSED):
        return array.transpose(2, 3, 0, 1)[::-1, ::-1]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def tensor(array) -> torch.Tensor:
    """`array` as a contiguous tensor with its own memory, bit for bit."""
    import torch

    array = np.array(array, order="C")
    for name, (dtype, bits) in SHARED_BITS.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(bits)).view(getattr(torch, name))
    return torch.from_numpy(array)


def array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    """Inverse of `tensor`, without a copy; a numpy array as it is."""
    if isinstance(value, np.ndarray):
        return value
    import torch

    value = value.detach().cpu()
    for name, (dtype, bits) in SHARED_BITS.items():
        if value.dtype == getattr(torch, name):
            return value.view(getattr(torch, bits)).numpy().view(dtype)
    return value.numpy()


def to_torch(params: dict) -> dict[str, torch.Tensor]:
    """The state dict of a tree of plain arrays, under the names and in the layouts of the original checkpoints."""
    return {torch_key(p): tensor(to_layout(p, np.asarray(leaf))) for p, leaf in flatten(params).items()}


def from_torch(state_dict: Mapping[str, torch.Tensor | np.ndarray], like: dict) -> dict:
    """The params tree with the structure of `like` (see `abstract_params`) and the values of `state_dict`, dtypes kept.

    Raises UserError that lists tensors that are missing, extra or of another shape.
    """
    paths = {torch_key(path): path for path in flatten(like)}
    problems = mismatches({k: tuple(v.shape) for k, v in state_dict.items()}, shapes(like))
    if problems:
        raise UserError(count_mismatches(problems))
    flat = {paths[k]: np.ascontiguousarray(from_layout(paths[k], array(v))) for k, v in state_dict.items()}
    return jax.device_put(unflatten(flat))


def count_mismatches(problems: list[str]) -> str:
    """What `mismatches` found, in words: "2 tensors do not fit: missing a; extra b"; at most ten are listed."""
    return f"{len(problems)} tensor{' does' if len(problems) == 1 else 's do'} not fit: {few(problems, separator='; ')}"


def shapes(like: dict) -> dict[str, tuple[int, ...]]:
    """The torch shape of every parameter by its torch key; `like` may hold shapes only (`abstract_params`)."""
    empty = lambda leaf: np.broadcast_to(np.float32(0), leaf.shape)  # takes no memory
    return {torch_key(path): to_layout(path, empty(leaf)).shape for path, leaf in flatten(like).items()}

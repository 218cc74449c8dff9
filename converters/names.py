"""Params tree <-> torch state dict: a bijection of names and layouts."""

from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import torch

from sam2jq.errors import UserError
from sam2jq.tree import flatten, unflatten

LEAF = {"kernel": "weight", "scale": "weight"}
# what numpy and torch share no type for: the torch type, and the integers that carry its bits across
CARRIED = {
    ml_dtypes.bfloat16: (torch.bfloat16, torch.int16),
    ml_dtypes.float8_e4m3fn: (torch.float8_e4m3fn, torch.int8),
}
TRANSPOSED = ("output_upscaling.0", "output_upscaling.3")  # the two ConvTranspose layers of the mask decoder


def torch_key(path: str) -> str:
    """The torch key of a path: "blocks.0/attn/qkv/kernel" -> "blocks.0.attn.qkv.weight"."""
    *modules, leaf = path.split("/")
    return ".".join((*modules, LEAF.get(leaf, leaf)))


def to_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel [*reduce, out] in torch's layout; other arrays as they are.

    Linear [in, out] -> [out, in]; Conv [kh, kw, in, out] -> [out, in, kh, kw]; ConvTranspose -> [in, out, kh, kw],
    its window turned by 180 degrees, because torch writes the gradient of a convolution and XLA a dilated one.
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
    """`array` as a contiguous tensor of its own memory, bit for bit."""
    array = np.array(array, order="C")
    for ours, (theirs, _) in CARRIED.items():
        if array.dtype == ours:
            return torch.from_numpy(array.view(f"i{array.itemsize}")).view(theirs)
    return torch.from_numpy(array)


def array(value: torch.Tensor) -> np.ndarray:
    """Inverse of `tensor`; no copy."""
    value = value.detach().cpu()
    for ours, (theirs, bits) in CARRIED.items():
        if value.dtype == theirs:
            return value.view(bits).numpy().view(ours)
    return value.numpy()


def to_torch(params: dict) -> dict[str, torch.Tensor]:
    """The state dict of a tree of plain arrays, under the names and in the layouts of the original checkpoints."""
    return {torch_key(p): tensor(to_layout(p, np.asarray(leaf))) for p, leaf in flatten(params).items()}


def from_torch(state_dict: Mapping[str, torch.Tensor], like: dict) -> dict:
    """The params tree laid out as `like` (see `abstract_params`) with the tensors of `state_dict`, dtypes kept.

    ValueError: lists every tensor that is missing, extra or of another shape.
    """
    paths = {torch_key(path): path for path in flatten(like)}
    problems = mismatches({k: tuple(v.shape) for k, v in state_dict.items()}, shapes(like))
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit: {'; '.join(problems)}")
    flat = {paths[k]: np.ascontiguousarray(from_layout(paths[k], array(v))) for k, v in state_dict.items()}
    return jax.device_put(unflatten(flat))


def shapes(like: dict) -> dict[str, tuple[int, ...]]:
    """The torch shape of every key of a params tree; needs shapes only, no arrays."""
    empty = lambda leaf: np.broadcast_to(np.float32(0), leaf.shape)  # no memory
    return {torch_key(path): to_layout(path, empty(leaf)).shape for path, leaf in flatten(like).items()}


def mismatches(got: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """One entry per key that only one side has or that differs in shape; [] when they fit exactly."""
    missing = [f"missing {key}" for key in expected if key not in got]
    extra = [f"extra {key}" for key in got if key not in expected]
    misshapen = [
        f"{key} is {list(got[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in got and tuple(got[key]) != tuple(shape)
    ]
    return missing + extra + misshapen

"""What deepcompressor keeps beside a model, written from a quantized params tree: model, scale, smooth and branch .pt.

Letters: K inputs, N outputs, R rank, G groups of inputs that share a scale.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import torch

from converters import hf
from converters.exports.nunchaku_model import module_name
from converters.names import tensor, to_layout, torch_key
from converters.torch_files import save_torch
from sam2jq.errors import UserError
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import materialize, unwrap
from sam2jq.quant.qtensor import QTensor, to_e4m3
from sam2jq.tree import flatten

WHY_NOT_ROTATED = "these files have no place for a rotation: quantize without quant.rotation, or export to vanilla"


def save_deepcompressor(folder: Path, params: dict, names: str) -> None:
    """Writes the four files into `folder`; names: "original" or "huggingface", in which tensors are called.

    model.pt: a state dict whose rounded weights are what is left beside smoothing and branch, dequantized.
    ValueError: a rotated layer.
    """
    for name, content in to_deepcompressor(params, names).items():
        save_torch(folder / f"{name}.pt", content)


def to_deepcompressor(params: Mapping, names: str) -> dict[str, dict]:
    """{"model", "scale", "smooth", "branch": the content of its file}."""
    state_dict, scale, smooth, branch = {}, {}, {}, {}
    for path, leaf in flatten(jax.device_get(params)).items():  # JAX would compile a product for every shape
        inner, around = unwrap(leaf)
        if Rotated in around:
            raise UserError(WHY_NOT_ROTATED)
        state_dict[torch_key(path)] = tensor(to_layout(path, materialize(inner)))
        if not path.endswith("/kernel"):
            continue
        module = module_name(path, names)
        if Smoothed in around:
            smooth[module] = tensor(around[Smoothed].scale)
        if LowRank in around:
            rows = around[LowRank].down.reshape(-1, around[LowRank].down.shape[-1])
            branch[module] = {"a.weight": tensor(rows.T), "b.weight": tensor(around[LowRank].up.T)}
        if isinstance(inner, QTensor):
            scale |= grids(f"{module}.weight", inner)
    return {
        "model": hf.to_hf(state_dict) if names == "huggingface" else state_dict,
        "scale": scale,
        "smooth": smooth,
        "branch": branch,
    }


def grids(weight: str, q: QTensor) -> dict[str, torch.Tensor | None]:
    """The scales and zero points [N, 1, G, 1] of one weight; nvfp4's have a scale of the tensor, [1], before them."""
    by_output = lambda x: tensor(x.T[:, None, :, None])
    if q.spec.scales == "e4m3":
        common = q.scale.max() / 448  # as `compute_scale_zero_point` chose it
        steps = by_output(to_e4m3(jnp.asarray(q.scale) / common))
        return {f"{weight}.scale.0": torch.tensor([common]), f"{weight}.scale.1": steps, f"{weight}.zero": None}
    return {
        f"{weight}.scale.0": by_output(q.scale),
        f"{weight}.zero": None if q.zero_point is None else by_output(q.zero_point),
    }

"""The files that deepcompressor keeps beside a model, from a quantized params tree and back to plain weights.

A layer computes y = u W + (u a^T) b^T of its input x, where u = (x Q) / smooth and Q = diag(signs) H / sqrt(K) is its
rotation.

- model.pt: a state dict with the weight W of each rounded layer, dequantized. It excludes smoothing, rotation and
  low-rank branch: for a rotated layer it is the weight in the rotated basis, Q^T times the original one, which is what
  was rounded.
- scale.pt: the scales and zero points of W. smooth.pt: the smoothing factors [K] by module.
- branch.pt: {"a.weight": [R, K], "b.weight": [N, R]} by module; a reads u.
- rotation.pt, only if a layer is rotated: by module the signs [K], or None for a Hadamard matrix without signs. The
  Hadamard matrix of size K is that of `sam2jq.quant.algorithms.hadamard`. deepcompressor itself has no such file.

Letters: K inputs, N outputs, R rank, G groups of inputs that share a scale.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from converters import hf
from converters.exports.nunchaku_model import module_name
from converters.names import array, from_layout, tensor, to_layout, torch_key
from converters.torch_files import load_torch, save_torch
from sam2jq.errors import UserError
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import materialize, unwrap
from sam2jq.quant.qtensor import QTensor, to_e4m3
from sam2jq.tree import flatten

FILES = ("model", "scale", "smooth", "branch", "rotation")
ORDER = (Rotated, Smoothed, LowRank)  # of the leaves in a layer, outermost first


def save_deepcompressor(folder: Path, params: dict, names: str) -> None:
    """Writes the files into `folder`; names: "original" or "huggingface", the naming style of the tensors."""
    for name, content in to_deepcompressor(params, names).items():
        save_torch(folder / f"{name}.pt", content)


def to_deepcompressor(params: Mapping, names: str) -> dict[str, dict]:
    """{name in FILES: content of the file}, without "rotation" if no layer is rotated."""
    files = {name: {} for name in FILES}
    for path, leaf in flatten(jax.device_get(params)).items():  # numpy: JAX would compile a product for every shape
        inner, around = unwrap(leaf)
        files["model"][torch_key(path)] = tensor(to_layout(path, materialize(inner)))
        if path.endswith("/kernel"):
            add_layer(files, module_name(path, names), inner, around)
    if names == "huggingface":
        files["model"] = hf.to_hf(files["model"])
    if not files["rotation"]:
        del files["rotation"]
    return files


def add_layer(files: dict[str, dict], module: str, inner, around: Mapping[type, object]) -> None:
    """Adds a layer's scales, smoothing factors, branch and rotation to `files`."""
    check_order(module, around)
    if Smoothed in around:
        files["smooth"][module] = tensor(around[Smoothed].scale)
    if Rotated in around:
        signs = around[Rotated].signs
        files["rotation"][module] = None if signs is None else tensor(signs)
    if LowRank in around:
        branch = around[LowRank]
        rows = branch.down.reshape(-1, branch.down.shape[-1])  # [K, R]
        files["branch"][module] = {"a.weight": tensor(rows.T), "b.weight": tensor(branch.up.T)}
    if isinstance(inner, QTensor):
        files["scale"] |= scales(f"{module}.weight", inner)


def check_order(module: str, around: Mapping[type, object]) -> None:
    """Raises UserError unless a layer rotates first, then smooths, and its branch reads the result."""
    order = [cls for cls in around if cls in ORDER]
    if order != [cls for cls in ORDER if cls in around]:
        named = lambda classes: " > ".join(cls.__name__ for cls in classes)
        raise UserError(
            f"layer {module}: these files take leaves in the order {named(ORDER)} from outside to inside, not "
            f"{named(order)}: export to vanilla"
        )


def scales(weight: str, q: QTensor) -> dict[str, torch.Tensor | None]:
    """The scales and zero points [N, 1, G, 1] of one weight; for nvfp4 the tensor's scale [1] comes first."""
    by_output = lambda x: tensor(x.T[:, None, :, None])
    if q.spec.scales == "e4m3":
        common = q.scale.max() / 448  # as `compute_scale_zero_point` chose it
        steps = by_output(to_e4m3(jnp.asarray(q.scale) / common))
        return {f"{weight}.scale.0": torch.tensor([common]), f"{weight}.scale.1": steps, f"{weight}.zero": None}
    return {
        f"{weight}.scale.0": by_output(q.scale),
        f"{weight}.zero": None if q.zero_point is None else by_output(np.asarray(q.zero_point, np.float32)),
    }


def load_deepcompressor(folder: Path) -> dict[str, torch.Tensor]:
    """The plain float32 state dict, with the original names, that the files in `folder` represent.

    It equals what `materialize_params` gives for the params that were written, to float32 rounding.
    """
    files = {name: load_torch(folder / f"{name}.pt") for name in FILES if (folder / f"{name}.pt").is_file()}
    original = lambda key: hf.from_hf({key: torch.empty(0)}).popitem()[0] if hf.is_hf(files["model"]) else key
    parts = {
        name: {original(f"{module}.weight"): part for module, part in files.get(name, {}).items()}
        for name in ("smooth", "branch", "rotation")
    }
    state_dict = hf.from_hf(files["model"]) if hf.is_hf(files["model"]) else files["model"]
    changed = set().union(*parts.values())
    return state_dict | {key: plain_weight(key, state_dict[key], parts) for key in changed}


def plain_weight(key: str, weight: torch.Tensor, parts: Mapping[str, Mapping]) -> torch.Tensor:
    """The weight, in torch's layout, of a plain layer that computes the same.

    parts: the contents of smooth.pt, branch.pt and rotation.pt, by torch key.
    """
    path = f"{key.removesuffix('.weight')}/kernel"  # layouts depend on the module's name and on the last part
    leaf = from_layout(path, array(weight))
    if key in parts["branch"]:
        rows, up = (array(parts["branch"][key][name]).T for name in ("a.weight", "b.weight"))
        leaf = LowRank(leaf, rows.reshape(*leaf.shape[:-1], -1), up)
    if key in parts["smooth"]:
        leaf = Smoothed(leaf, array(parts["smooth"][key]))
    if key in parts["rotation"]:
        signs = parts["rotation"][key]
        leaf = Rotated(leaf, None if signs is None else array(signs))
    return tensor(to_layout(path, np.asarray(materialize(leaf))))

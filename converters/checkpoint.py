"""Checkpoints by name (a file, a Hugging Face Hub id, `demo` or `random:<seed>`) to params, and params to files.

Safetensors files, native packages and the demo model need no torch; `.pt` and `.pth` files do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from converters import hf
from converters.hf_checks import check_config, config_size, read_config
from converters.names import array, from_torch, mismatches, shapes, to_layout, to_torch, torch_key
from converters.recognize import choose_model, describe_mismatches, leaf_shapes, params_like
from converters.safetensors_files import known_model, read_tensors
from converters.sources import CONTENTS, find
from converters.state_dicts import select, split_part
from sam2jq.errors import UserError, few
from sam2jq.file_kinds import check_kind
from sam2jq.files import home
from sam2jq.models.sam2 import SAM2, VARIANTS, build, init_params, is_image_only
from sam2jq.quant.package import is_native, read_package
from sam2jq.tree import flatten, unflatten

DEMO = {"name": "nano", "version": "2.1"}


class Checkpoint(NamedTuple):
    """A params tree, in float32, and where it comes from.

    It lacks the params of the memory if the source is an image-only model.
    """

    params: dict
    source: str
    random: bool  # whether the weights are random, not trained; results computed with them are marked
    names: str = "original"  # or "huggingface": the naming style of the source's tensors
    dtypes: Mapping[str, np.dtype] = {}  # by path, of the params that the source holds in another dtype
    image_size: int | None = None  # in pixels, where the source holds it


@dataclass(frozen=True)
class Weights:
    """The content of a checkpoint file.

    tensors: by original name and in torch's layout. leaves: the weight leaves of a package, by path. random and names
    as in `Checkpoint`. model: any of name, version and image_size that the file holds. config: the content of Hugging
    Face's configuration files beside it, by path.
    """

    tensors: dict[str, np.ndarray]
    leaves: dict[str, object] = field(default_factory=dict)
    random: bool = False
    names: str = "original"
    model: dict | None = None
    config: Mapping[Path, dict] = field(default_factory=dict)


def load_checkpoint(source: str, model: SAM2) -> Checkpoint:
    """The params of `model` from `source`.

    source: an original checkpoint (.pt, .pth), {"model": state_dict} or as training programs wrap it, with "#ema" and
      the like after the name where it holds several models; Hugging Face safetensors (a file, or a folder with
      model.safetensors or its shards); a package (package.pt or package.safetensors, or the folder of a run), with its
      weight leaves; a Hub id such as facebook/sam2.1-hiera-tiny (extra `hub`); random:<seed>; or demo, the nano model
      as trained by experiments/demo_model.
    Raises UserError or FileNotFoundError that names the file or tensor, and the size and version that would fit.
    """
    if source.startswith("random:"):
        return Checkpoint(init_params(model, random_seed(source)), source, random=True)
    return fit_weights(read_weights(source), model, source)


def open_checkpoint(source: str, name: str | None, version: str | None, image_size: int | None):
    """(SAM2, Checkpoint) of `source`: `load_checkpoint` with the model that the file holds; see `sam2jq.load`.

    Raises UserError if the name or version is neither given nor known, or if what is given contradicts the file.
    """
    if source.startswith("random:"):
        if name is None:
            raise UserError(f"{source} needs the name of a model: {', '.join(VARIANTS)}")
        model = build(name, version or "2.1", image_size)
        return model, load_checkpoint(source, model)
    weights = read_weights(source)
    model = choose_model(shapes_of(weights), weights.model, source, name, version, image_size)
    return model, fit_weights(weights, model, source)


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The torch shape of every tensor, by original name."""
    return {key: tuple(x.shape) for key, x in weights.tensors.items()} | leaf_shapes(weights.leaves)


def fit_weights(weights: Weights, model: SAM2, source: str) -> Checkpoint:
    """The params of `model` with these weights, in float32.

    Raises UserError if a tensor is missing, extra, of another shape, not of floats or not finite, and for
    configuration files of a model that computes otherwise.
    """
    got = shapes_of(weights)
    like = params_like(model, got)
    if problems := mismatches(got, shapes(like)):
        raise UserError(describe_mismatches(source, got, problems))
    check_config(weights.config, model, video=not is_image_only(like))
    if integers := [f"{key} ({x.dtype})" for key, x in weights.tensors.items() if not is_float(x)]:
        raise UserError(f"checkpoint {source} holds no floats in {few(integers)}: use the one before quantization")
    with np.errstate(over="ignore"):  # of float64: found below
        tensors = {key: x.astype(np.float32, copy=False) for key, x in weights.tensors.items()}
    if broken := [key for key, x in tensors.items() if not np.isfinite(x).all()]:
        where = few(broken) if len(broken) < len(tensors) else "every tensor"
        raise UserError(f"checkpoint {source} holds NaN or Inf in {where}: use an intact one")
    plain = {path: leaf for path, leaf in flatten(like).items() if path not in weights.leaves}
    dtypes = {path: weights.tensors[torch_key(path)].dtype for path in plain}
    params = flatten(from_torch(tensors, unflatten(plain)))
    return Checkpoint(
        jax.device_put(unflatten(params | weights.leaves)),
        source,
        weights.random,
        weights.names,
        {path: dtype for path, dtype in dtypes.items() if dtype != np.float32},
        (weights.model or {}).get("image_size"),
    )


def save_checkpoint(path: str | Path, params: dict, dtypes: Mapping[str, np.dtype] | None = None) -> None:
    """Writes a tree of plain arrays, atomically: `.pt` with the original names, `.safetensors` with Hugging Face's.

    dtypes: by path, of params to store in another dtype, such as `Checkpoint.dtypes`.
    """
    from converters.safetensors_files import write_tensors
    from converters.torch_files import save_torch

    cast = lambda path, x: np.asarray(x).astype((dtypes or {}).get(path, x.dtype))
    state_dict = to_torch(unflatten({path: cast(path, x) for path, x in flatten(params).items()}))
    if Path(path).suffix == ".safetensors":
        write_tensors(path, {key: array(x) for key, x in hf.to_hf(state_dict).items()})
    else:
        save_torch(path, {"model": state_dict})


def read_weights(source: str) -> Weights:
    """The content of the file that `source` names.

    Raises UserError or FileNotFoundError if there is no such file, or if it holds no checkpoint.
    """
    file, part = (source, None) if Path(home(source)).exists() else split_part(source)
    path = find(file)
    if is_native(path):
        package = read_package(path)
        tensors = {torch_key(p): to_layout(p, x) for p, x in package.arrays.items()}
        return _of_package(package, tensors)
    if path.suffix not in (".safetensors", ".json"):
        return read_torch(path, part)
    arrays, about = read_tensors(path)
    # what lies beside a file of another name may not belong to it
    config = read_config(path.parent) if path.suffix == ".json" or path.name == "model.safetensors" else {}
    arrays = select(arrays, part, path, lambda x: isinstance(x, np.ndarray))
    if codes := [key for key in arrays if key.endswith((".weight_packed", ".weight_scale"))]:
        raise UserError(
            f"{path} holds weights in codes of compressed-tensors ({codes[0]}): give the package that it was made of, "
            "or the checkpoint before quantization"
        )
    known = DEMO if source == "demo" else about | config_size(config)
    return replace(from_state_dict(arrays, path), model=known, config=config)


def read_torch(path: Path, part: str | None = None) -> Weights:
    """The content of a torch file: a package, or a state dict; part: as in `state_dicts.select`.

    Raises UserError if it is neither, or if torch is not installed.
    """
    check_kind(path, "torch")
    refuse_deepcompressor(path)
    try:
        import torch

        from converters.exports.package import is_package, open_package
        from converters.inert import Inert, class_name
        from converters.torch_files import load_torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"{path} is a torch file and that needs torch: pip install 'sam2jq[torch]'") from error
    content = load_torch(path)
    if is_package(content):
        package = open_package(content, path)
        return _of_package(package, {key: array(x) for key, x in package.tensors.items()})
    entries = content if isinstance(content, dict) else {"": content}
    content = content if isinstance(content, dict) else {}
    tensors = select(content, part, path, lambda x: torch.is_tensor(x) and x.layout is torch.strided)
    if not tensors:
        objects = few((f"{key} {class_name(x)}".strip() for key, x in entries.items() if isinstance(x, Inert)), 3)
        what = f"{path} holds no state dict{objects and ' but ' + objects}"
        raise UserError(f"{what}: a SAM 2 checkpoint is {{'model': model.state_dict()}}, written by torch.save")
    try:
        arrays = {key: array(x) for key, x in tensors.items()}
    except (TypeError, RuntimeError) as error:  # quantized tensors of torch, and dtypes that numpy has no equivalent of
        raise UserError(f"{path} holds tensors of another kind than floats ({error}): save it in float32") from error
    weights = from_state_dict(arrays, path)
    return replace(weights, random=content.get("random_weights") is True, model=known_model(content.get("sam2jq")))


def refuse_deepcompressor(path: Path) -> None:
    """Raises UserError for model.pt of deepcompressor's files: the weights lack what the files beside it hold.

    See `converters.exports.deepcompressor`: smoothing, rotation and branches are left out.
    """
    if path.name == "model.pt" and {"scale.pt", "smooth.pt", "branch.pt"} <= {p.name for p in path.parent.glob("*.pt")}:
        packages = [path.parent.parent / name for name in CONTENTS[:2]]
        package = next(filter(Path.is_file, packages), "the package of its run")
        raise UserError(
            f"{path} is one of deepcompressor's files, which alone gives wrong results: smoothing, rotation and "
            f"branches of its layers are in the files beside it; give {package}"
        )


def from_state_dict(tensors: dict[str, np.ndarray], path: Path) -> Weights:
    """A state dict in either naming style as weights with the original names."""
    if not hf.is_hf(tensors):
        return Weights(tensors)
    try:
        return Weights(hf.from_hf(tensors), names="huggingface")
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def random_seed(source: str) -> int:
    """The seed in random:<seed>. Raises UserError if it is no whole number."""
    seed = source.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit()):
        raise UserError(f"checkpoint {source!r}: the seed must be a whole number, as in random:0")
    return int(seed)


def is_float(x: np.ndarray) -> bool:
    """Whether an array is of a floating-point dtype, bfloat16 and float8 included."""
    return jax.dtypes.issubdtype(x.dtype, np.floating)


def _of_package(package, tensors: dict[str, np.ndarray]) -> Weights:
    """The `Weights` of a package whose unquantized tensors are `tensors`."""
    about = package.metadata
    return Weights(tensors, package.leaves(), about["random_weights"], about["names"], about["model"])

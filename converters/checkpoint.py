"""Checkpoints by name (a file, a Hugging Face Hub id, `demo` or `random:<seed>`) to params, and params to files.

Safetensors files, native packages and the demo model need no torch; `.pt` and `.pth` files do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import sam2jq
from converters import hf
from converters.names import array, from_torch, mismatches, shapes, to_layout, to_torch, torch_key
from sam2jq.errors import UserError, suggest
from sam2jq.files import atomic_write
from sam2jq.io import read_safetensors
from sam2jq.models.sam2 import SAM2, VARIANTS, VERSIONS, abstract_params, build, init_params
from sam2jq.quant.package import full_shape, is_native, read_package
from sam2jq.tree import flatten, unflatten

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".pt", ".pth", ".safetensors")
PACKAGES = ("package.safetensors", "package.pt")  # of a run, in the order of preference
ASSETS = Path(sam2jq.__file__).parent / "assets"
DEMO = {"name": "nano", "version": "2.1", "image_size": 256}


class Checkpoint(NamedTuple):
    """A params tree and where it comes from."""

    params: dict
    source: str
    random: bool  # whether the weights are random, not trained; results computed with them are marked
    names: str = "original"  # or "huggingface": the naming style of the source's tensors


@dataclass(frozen=True)
class Weights:
    """The content of a checkpoint file.

    tensors: by original name and in torch's layout. leaves: the weight leaves of a package, by path. random and names
    as in `Checkpoint`. model: name, version and image_size where the file holds them.
    """

    tensors: dict[str, np.ndarray]
    leaves: dict[str, object] = field(default_factory=dict)
    random: bool = False
    names: str = "original"
    model: dict | None = None


def load_checkpoint(source: str, model: SAM2) -> Checkpoint:
    """The params of `model` from `source`.

    source: an original `.pt` ({"model": state_dict}); Hugging Face safetensors (a file, or a folder with
      model.safetensors); a package (package.pt or package.safetensors, or the folder of a run), with its weight leaves;
      a Hub id such as facebook/sam2.1-hiera-tiny (extra `hub`); random:<seed>; or demo, the nano model as trained by
      experiments/demo_model.
    Raises UserError or FileNotFoundError that names the file or tensor, and the size and version that would fit.
    """
    if source.startswith("random:"):
        return Checkpoint(init_params(model, random_seed(source)), source, random=True)
    return fit_weights(read_weights(source), model, source)


def fit_weights(weights: Weights, model: SAM2, source: str) -> Checkpoint:
    """The params of `model` with these weights.

    Raises UserError if a tensor is missing, extra, of another shape or not finite.
    """
    broken = [key for key, x in weights.tensors.items() if is_float(x) and not np.isfinite(x).all()]
    if broken:
        raise UserError(f"checkpoint {source} holds NaN or Inf in {', '.join(broken)}: use an intact one")
    like = abstract_params(model)
    got = {key: x.shape for key, x in weights.tensors.items()} | leaf_shapes(weights.leaves)
    if problems := mismatches(got, shapes(like)):
        raise UserError(
            f"checkpoint {source} does not fit the model{_hint(got)}: "
            f"{len(problems)} tensors do not fit: {'; '.join(problems)}"
        )
    plain = {path: leaf for path, leaf in flatten(like).items() if path not in weights.leaves}
    params = flatten(from_torch(weights.tensors, unflatten(plain)))
    return Checkpoint(jax.device_put(unflatten(params | weights.leaves)), source, weights.random, weights.names)


def save_checkpoint(path: str | Path, params: dict) -> None:
    """Writes a tree of plain arrays, atomically: `.pt` with the original names, `.safetensors` with Hugging Face's."""
    from safetensors.torch import save_file

    from converters.torch_files import save_torch

    state_dict = to_torch(params)
    if Path(path).suffix == ".safetensors":
        with atomic_write(path) as temporary:
            save_file(hf.to_hf(state_dict), temporary, metadata={"format": "pt"})
    else:
        save_torch(path, {"model": state_dict})


def read_weights(source: str) -> Weights:
    """The content of the file that `source` names.

    Raises UserError or FileNotFoundError if there is no such file, or if it holds no checkpoint.
    """
    path = find(source)
    if is_native(path):
        package = read_package(path)
        tensors = {torch_key(p): to_layout(p, x) for p, x in package.arrays.items()}
        return _of_package(package, tensors)
    if path.suffix != ".safetensors":
        return read_torch(path)
    weights = from_state_dict(read_safetensors(path)[0], path)
    if source != "demo":
        return weights
    # stored in float16 to be small
    return replace(weights, tensors={key: x.astype(np.float32) for key, x in weights.tensors.items()}, model=DEMO)


def read_torch(path: Path) -> Weights:
    """The content of a torch file: a package, or a state dict.

    Raises UserError if it is neither, or if torch is not installed.
    """
    try:
        import torch

        from converters.exports.package import is_package, open_package
        from converters.torch_files import load_torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"{path} is a torch file and that needs torch: pip install 'sam2jq[torch]'") from error
    content = load_torch(path)
    if is_package(content):
        package = open_package(content, path)
        return _of_package(package, {key: array(x) for key, x in package.tensors.items()})
    random = isinstance(content, dict) and content.get("random_weights") is True
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{path} holds no state dict: a SAM 2 checkpoint is {{'model': {{name: tensor}}}}")
    return replace(from_state_dict({key: array(x) for key, x in content.items()}, path), random=random)


def from_state_dict(tensors: dict[str, np.ndarray], path: Path) -> Weights:
    """A state dict in either naming style as weights with the original names."""
    if not hf.is_hf(tensors):
        return Weights(tensors)
    try:
        return Weights(hf.from_hf(tensors), names="huggingface")
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def find(source: str) -> Path:
    """The local file that `source` names, downloaded from the Hub if it is a Hub id.

    In a folder it is package.safetensors, package.pt or model.safetensors, the first that exists.
    Raises FileNotFoundError if there is none.
    """
    if source == "demo":
        return ASSETS / "nano.safetensors"
    path = Path(source).expanduser()
    if path.is_dir():
        candidates = [path / name for name in (*PACKAGES, "model.safetensors")]
        path = next(filter(Path.is_file, candidates), candidates[-1])
    if path.is_file():
        return path
    if HUB_ID.fullmatch(source) and path.suffix not in FILES and not Path(source).exists():
        return download(source)
    near = suggest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    raise FileNotFoundError(
        f"no checkpoint at {path}{near}; give a file, a Hub id such as facebook/sam2.1-hiera-tiny, or random:0"
    )


def download(repository: str) -> Path:
    """model.safetensors of a Hub repository, from the local cache if it is there.

    Raises UserError if the extra `hub` is not installed, or if the file cannot be fetched.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f"{repository} is a Hub id and that needs the extra hub: pip install 'sam2jq[hub]', or give a file"
        ) from error
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # the library raises errors of many classes for network, Hub and cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot fetch {repository} from the Hub ({reason}): go online, or give a file") from error


def random_seed(source: str) -> int:
    """The seed in random:<seed>. Raises UserError if it is no whole number."""
    seed = source.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit()):
        raise UserError(f"checkpoint {source!r}: the seed must be a whole number, as in random:0")
    return int(seed)


def recognize(got: Mapping[str, tuple]) -> tuple[str, str] | None:
    """The name and version of the model that tensors of these shapes, by original name, fit exactly; None if none."""
    width = got.get("image_encoder.trunk.patch_embed.proj.weight", (0,))[0]
    return next(
        (
            (name, version)
            for name, variant in VARIANTS.items()
            if variant.embed_dim == width
            for version in VERSIONS
            if not mismatches(got, shapes(abstract_params(build(name, version))))
        ),
        None,
    )


def _hint(got: Mapping[str, tuple]) -> str:
    """Part of an error: the name and version that the tensors fit; "" if they fit none."""
    fits = recognize(got)
    return f"; it is {' '.join(fits)}: give --model.name {fits[0]} --model.version {fits[1]}" if fits else ""


def leaf_shapes(leaves: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """{torch key: torch shape} of the kernels that the weight leaves represent."""
    return {torch_key(p): to_layout(p, np.broadcast_to(0, full_shape(leaf))).shape for p, leaf in leaves.items()}


def is_float(x: np.ndarray) -> bool:
    """Whether an array is of a floating-point dtype, bfloat16 and float8 included."""
    return jax.dtypes.issubdtype(x.dtype, np.floating)


def _of_package(package, tensors: dict[str, np.ndarray]) -> Weights:
    """The `Weights` of a package whose unquantized tensors are `tensors`."""
    about = package.metadata
    return Weights(tensors, package.leaves(), about["random_weights"], about["names"], about["model"])

"""Checkpoints by name: a file, a Hugging Face Hub id or `random:<seed>` -> params, and back to files."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file

import sam2jq
from converters import hf
from converters.exports.package import is_package, open_package
from converters.names import array, from_torch, mismatches, shapes, to_torch
from converters.torch_files import atomic_write, load_torch, save_torch
from sam2jq.errors import UserError, suggest
from sam2jq.models.sam2 import SAM2, VARIANTS, VERSIONS, abstract_params, build, init_params
from sam2jq.tree import flatten, unflatten

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".pt", ".pth", ".safetensors")
ASSETS = Path(sam2jq.__file__).parent / "assets"


class Checkpoint(NamedTuple):
    """A params tree and where it comes from."""

    params: dict
    source: str
    random: bool  # weights that nobody trained: every figure made with them says so
    names: str = "original"  # or "huggingface": how the source calls its tensors


def load_checkpoint(source: str, model: SAM2) -> Checkpoint:
    """The params of `model` under the name `source`.

    source: an original `.pt` ({"model": state_dict}), Hugging Face safetensors (a file, or a folder with
      model.safetensors), a `package.pt` written here (with its weight leaves), a Hub id such as
      facebook/sam2.1-hiera-tiny (extra `hub`), random:<seed>, or demo: nano as trained by experiments/demo_model.
    ValueError, FileNotFoundError: names the file or tensor and the way out; for another size or version, the one
      that fits.
    """
    if source.startswith("random:"):
        seed = source.removeprefix("random:")
        if not seed.isdigit():
            raise UserError(f"checkpoint {source!r}: the seed must be a whole number, as in random:0")
        return Checkpoint(init_params(model, int(seed)), source, random=True)
    state_dict, leaves, random, names = read_state_dict(find(source))
    if source == "demo":  # in float16 on disk, only to be small
        state_dict = {key: value.float() for key, value in state_dict.items()}
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"checkpoint {source} holds NaN or Inf in {', '.join(broken)}: use an intact one")
    try:
        params = from_torch(state_dict, abstract_params(model))
    except UserError as error:
        raise UserError(f"checkpoint {source} does not fit the model{fitting(state_dict)}: {error}") from error
    return Checkpoint(jax.device_put(unflatten(flatten(params) | leaves)), source, random, names)


def save_checkpoint(path: str | Path, params: dict) -> None:
    """Writes a tree of plain arrays: `.pt` as the original checkpoints are, `.safetensors` as Hugging Face's are."""
    state_dict = to_torch(params)
    if Path(path).suffix == ".safetensors":
        with atomic_write(path) as temporary:
            save_file(hf.to_hf(state_dict), temporary, metadata={"format": "pt"})
    else:
        save_torch(path, {"model": state_dict})


def find(source: str) -> Path:
    """The local file that `source` names, from the Hub if it is an id there."""
    if source == "demo":
        return ASSETS / "nano.safetensors"
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file():
        return path
    if HUB_ID.fullmatch(source) and path.suffix not in FILES and not Path(source).exists():
        return download(source)
    near = suggest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    raise FileNotFoundError(
        f"no checkpoint at {path}{near}; give a file, a Hub id such as facebook/sam2.1-hiera-tiny, or random:0"
    )


def download(repository: str) -> Path:
    """model.safetensors of a Hub repository, from the local cache where it is there."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f"{repository} is a Hub id and that needs the extra hub: pip install 'sam2jq[hub]', or give a file"
        ) from error
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # whatever the network, the hub or the cache may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot fetch {repository} from the Hub ({reason}): go online, or give a file") from error


def read_state_dict(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], bool, str]:
    """The state dict in a file, under the original names; the weight leaves of a package, by path; whether the weights
    are known to be random; and whose names the tensors had."""
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file, maybe truncated: fetch it again") from error
    else:
        content = load_torch(path)
    if is_package(content):
        package = open_package(content, path)
        return package.state_dict(), package.leaves(), package.metadata["random_weights"], package.metadata["names"]
    random = isinstance(content, dict) and content.get("random_weights") is True
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{path} holds no state dict: a SAM 2 checkpoint is {{'model': {{name: tensor}}}}")
    try:
        theirs = hf.is_hf(content)
        return hf.from_hf(content) if theirs else content, {}, random, "huggingface" if theirs else "original"
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def fitting(state_dict: dict) -> str:
    """Which other size or version `state_dict` fits exactly, as the tail of an error; "" when none does."""
    got = {key: tuple(np.shape(array(value))) for key, value in state_dict.items()}
    width = got.get("image_encoder.trunk.patch_embed.proj.weight", (0,))[0]
    for name in (name for name, variant in VARIANTS.items() if variant.embed_dim == width):
        for version in VERSIONS:
            if not mismatches(got, shapes(abstract_params(build(name, version)))):
                return f"; it is {name} {version}: give --model.name {name} --model.version {version}"
    return ""

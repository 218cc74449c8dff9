"""The Python API: models from files and to files, and post-training quantization of a params tree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from sam2jq import __version__
from sam2jq.errors import UserError
from sam2jq.files import home
from sam2jq.models.params import check_params
from sam2jq.models.sam2 import SAM2, VARIANTS, is_untrained
from sam2jq.quant.leaves import materialize
from sam2jq.quant.package import (
    Package,
    is_native,
    pack_params,
    read_package,
    write_package,
)

if TYPE_CHECKING:
    from converters.exports.package import TorchPackage
    from sam2jq.config.quant import QuantConfig
    from sam2jq.quant.transform import NamedChain, Transform

Model = tuple[SAM2, dict]
Images = str | Path | Sequence[str | Path | np.ndarray]


class LayerError(NamedTuple):
    """What quantization changed in a layer, by its weight alone.

    relative_error: |w_hat - w| / |w|. output_error: |x w_hat - x w| / |x w| over the calibration inputs x, None if no
    Gram matrix of them was collected. part: of the model, for tables.
    """

    relative_error: float
    output_error: float | None
    part: str


class Report(NamedTuple):
    """layers: {layer: LayerError} of the quantized layers, in the order in which data runs through them."""

    layers: dict[str, LayerError]

    @property
    def relative_errors(self) -> dict[str, float]:
        """{layer: relative weight error}, as the metadata of `save` takes it."""
        return {layer: error.relative_error for layer, error in self.layers.items()}


def quantize(
    model: SAM2,
    params: dict,
    transform: Transform | NamedChain | QuantConfig,
    images: Images = (),
    *,
    num_images: int = 128,
    seed: int = 0,
) -> tuple[dict, Report]:
    """The quantized params, with weight leaves in place of kernels, and a `Report`.

    transform: what `chain`, `gptq`, ... return, or a recipe, the YAML section `quant` as a `QuantConfig`.
    images: for calibration. uint8 [H, W, 3] arrays or file names; or one name: a folder, or "scenes:<seed>" for drawn
      scenes, of which `num_images` are drawn by `seed`. They may be left out if nothing is calibrated. A recipe's own
      `calib.path` is not read.
    Raises UserError that names the layer, the key or the image.
    """
    from sam2jq.config.quant import QuantConfig
    from sam2jq.eval.fidelity import layer_errors
    from sam2jq.ptq.pipeline import FOLDED, quantize_params, transform_params
    from sam2jq.quant.transform import check_transform

    check_params("quantize", model, params)
    if not isinstance(transform, QuantConfig):
        check_transform(transform)
    else:
        transform = replay_bits(transform)
    clips = Clips(images, num_images, seed, model.variant.image_size)
    plain = jax.tree.map(lambda node: materialize(node) if is_dataclass(node) else node, params, is_leaf=is_dataclass)
    with jax.enable_x64(False):  # all algorithms compute in float32
        if isinstance(transform, QuantConfig):
            done = quantize_params(model, plain, transform, clips, seed=seed)
        else:
            done = transform_params(model, params, transform, clips)
        figures = layer_errors(done.params_by_stage.get(FOLDED, plain), done.params, done.stats)
    return done.params, Report({layer: LayerError(**row) for layer, row in figures.items()})


class Clips:
    """Calibration images as `collect` takes them: clips(n, step) yields each step-th image after the first n."""

    def __init__(self, images: Images, num_images: int, seed: int, size: int):
        from sam2jq.data.sources import find_images

        if isinstance(images, str | Path):
            images = find_images(str(images), num_images, seed)
        self.images = [] if images is None else list(images)
        self.size = size

    def __call__(self, start: int, step: int = 1) -> Iterator[np.ndarray]:
        """Yields float32 [1, S, S, 3] per image. Raises UserError if there is none, or if one cannot be read."""
        from sam2jq.data.images import preprocess, read_image

        if not self.images:
            raise UserError("this transform needs calibration images: give a list of images, a folder or 'scenes:0'")
        for image in self.images[start::step]:
            pixels = read_image(str(image)) if isinstance(image, str | Path) else check_pixels(image)
            yield preprocess(pixels, self.size)[None]


def check_pixels(image: np.ndarray) -> np.ndarray:
    """`image` as it is. Raises UserError unless it is uint8 [H, W, 3]."""
    from sam2jq.data.images import as_numpy

    image = as_numpy(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"images are uint8 [H, W, 3] arrays or file names, got {image.dtype} {list(image.shape)}")
    return image


def load(
    source: str | Path, *, name: str | None = None, version: str | None = None, image_size: int | None = None
) -> Model:
    """The model and its params from `source`.

    source: "demo"; a package (package.safetensors, package.pt) or the folder of a run; an original checkpoint (.pt,
      .pth), also as training programs wrap it, with "#ema" or the like after the name where it holds several models;
      Hugging Face safetensors, a file or its folder; a Hub id (extra `hub`); or random:<seed>, with a name.
    name, version: of the model (tiny, small, base-plus, large, nano; "2.0", "2.1"). Packages hold them, and they are
      recognized from the tensors of checkpoints. image_size: in pixels, in place of the model's; packages and Hugging
      Face's folders hold it. What is given must not contradict the file.
    Packages come with their weight leaves, whose codes of 4 bits and less take half a byte of the device's memory each.
    Params are float32, whatever the file holds; those of an image-only model lack the memory. `.pt` and `.pth` need
    torch, nothing else does.
    Raises UserError or FileNotFoundError that names the file and what to do.
    """
    from converters.checkpoint import open_checkpoint

    model, checkpoint = open_checkpoint(str(source), name, version, image_size)
    return model, checkpoint.params


def save(path: str | Path, model: SAM2, params: dict, metadata: Mapping | None = None) -> None:
    """Writes a package: native if `path` ends in .safetensors, a torch package if it ends in .pt; atomically.

    params: arrays and weight leaves. metadata: any of "names", "random_weights", "checkpoint", "input_ranges",
      "config", "results" and "versions" as `sam2jq quantize` writes them, and "relative_errors": {layer: relative
      weight error}; the model's name, version and image size are added, and whether the weights are random.
    Raises UserError if the params do not fit the model, the file name has another ending or the metadata is invalid.
    """
    path = Path(home(os.fspath(path)))
    described = describe_model(model)
    check_params(path, model, params)
    about = {"versions": {"sam2jq": __version__}, "random_weights": is_untrained(params), **(metadata or {})}
    errors = about.pop("relative_errors", {})
    given = about.get("model", {})
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: model in the metadata is a mapping such as {{'checkpoint': name}}, got {given!r}")
    about["model"] = dict(given) | described
    match path.suffix:
        case ".safetensors":
            write_package(path, pack_params(params, errors, about))
        case ".pt":
            try:
                from converters.exports.package import save_package
            except ModuleNotFoundError as error:
                raise _needs_torch(path, error) from error
            save_package(path, params, errors, about)
        case _:
            raise UserError(f"{path}: give a name that ends in .safetensors, or in .pt for a torch package")


def replay_bits(quant: QuantConfig) -> QuantConfig:
    """`quant` with the bits of the package that its `bits_from` names; `quant` itself if it names none."""
    from sam2jq.ptq.run import with_bits_of

    if not quant.bits_from:
        return quant
    return with_bits_of(quant, open_package(quant.bits_from).summary()["layers"])


def describe_model(model: SAM2) -> dict:
    """{"name", "version", "image_size"} of a model. Raises UserError if it has a size that is not in VARIANTS."""
    size = model.variant.image_size
    name = next((name for name, v in VARIANTS.items() if replace(v, image_size=size) == model.variant), None)
    if name is None:
        raise UserError(f"a package holds a model of a known size, one of {', '.join(VARIANTS)}: use sam2jq.build")
    return {"name": name, "version": model.version, "image_size": size}


def open_package(path: str | Path) -> Package | TorchPackage:
    """The package in a file or in the folder of a run, for its `metadata` and `summary()`; torch only for package.pt.

    Raises UserError or FileNotFoundError if there is none, or if it is damaged.
    """
    path = find_package(path)
    if is_native(path):
        return read_package(path)
    try:
        from converters.exports.package import load_package
    except ModuleNotFoundError as error:
        raise _needs_torch(path, error) from error
    return load_package(path)


def find_package(path: str | Path) -> Path:
    """The package that a path names: in a folder package.safetensors or package.pt. Raises FileNotFoundError."""
    path = Path(home(str(path)))
    candidates = [path / name for name in ("package.safetensors", "package.pt")] if path.is_dir() else [path]
    found = next(filter(Path.is_file, candidates), None)
    if found is None:
        raise FileNotFoundError(f"no package at {candidates[-1]}; `sam2jq quantize` and sam2jq.save write packages")
    return found


def _needs_torch(path: str | Path, error: ModuleNotFoundError) -> Exception:
    """The error to raise for a torch package where `error` was raised by an import."""
    if error.name != "torch":
        return error
    return UserError(f"{path} is a torch package and that needs torch: pip install 'sam2jq[torch]'")

"""Formats that a quantized model can be written in: the table EXPORTS, one entry per target of `sam2jq export --to`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sam2jq.models.sam2 import SAM2, is_image_only

log = logging.getLogger("sam2jq")


class Export(NamedTuple):
    """An export target.

    help: the files that it writes, for `--help`. write(out, model, params, metadata) writes them into `out`, a folder
    that exists; metadata is that of a package (`complete_metadata`). Modules that need torch are imported in `write`.
    nearest(params): the params with layers that `write` refuses in forms that it writes, for `--nearest`.
    """

    help: str
    write: Callable[[Path, SAM2, dict, dict], None]
    nearest: Callable[[dict], dict] | None = None


def write_vanilla(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.exports.vanilla import save_vanilla

    save_vanilla(out / "vanilla.pt", params, metadata["random_weights"], metadata["model"])


def write_safetensors(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.hf import to_hf
    from converters.hf_config import write_config
    from converters.names import array, to_torch
    from converters.safetensors_files import write_tensors
    from sam2jq.quant.leaves import materialize_params

    warn_of_memory_features(model, params)
    state_dict = to_hf(to_torch(materialize_params(params)))
    write_tensors(out / "model.safetensors", {key: array(x) for key, x in state_dict.items()}, metadata["model"])
    write_config(out, model, video=not is_image_only(params))


def warn_of_memory_features(model: SAM2, params: dict) -> None:
    """Warns about a size whose video model transformers cannot build: it fixes the width of memories."""
    from converters.hf_config import HF_MEMORY_FEATURES

    if not is_image_only(params) and model.variant.memory_features != HF_MEMORY_FEATURES:
        log.warning(
            "safetensors Sam2VideoModel of transformers has memories of %d channels, this size has %d: there it can "
            "only be loaded as Sam2Model, for images",
            HF_MEMORY_FEATURES,
            model.variant.memory_features,
        )


def write_compressed_tensors(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.exports.compressed_tensors import save_compressed_tensors

    warn_of_memory_features(model, params)
    save_compressed_tensors(out, model, params, metadata)


def nearest_compressed_tensors(params: dict) -> dict:
    from converters.exports import compressed_tensors as target
    from converters.exports.nearest import round_again

    return round_again(params, target.why_refused, target.nearest_leaf)


def write_deepcompressor(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.exports.deepcompressor import save_deepcompressor

    save_deepcompressor(out, params, metadata["names"])


def write_nunchaku(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    """Warns about linear layers of the trunk that are not on the grid of the kernels: it rounds them a second time."""
    from converters.exports.nunchaku_model import requantize_to_grid, save_nunchaku

    params, again = requantize_to_grid(params)
    if again:
        log.warning(
            "nunchaku    %d linear layers were on another grid and were rounded a second time, to nearest: "
            "quantize --convert-nunchaku rounds them once, with GPTQ",
            len(again),
        )
    save_nunchaku(out, params, metadata["model"], metadata["names"])


def write_onnx(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.exports.onnx.write import save_onnx

    save_onnx(out, model, params, metadata)


def nearest_onnx(params: dict) -> dict:
    from converters.exports.nearest import round_again
    from converters.exports.onnx import leaves as target

    return round_again(params, target.why_refused, target.nearest_leaf)


EXPORTS = {
    "vanilla": Export("vanilla.pt for build_sam2", write_vanilla),
    "safetensors": Export("a folder for Sam2VideoModel.from_pretrained of transformers", write_safetensors),
    "compressed-tensors": Export(
        "a folder for from_pretrained of transformers that holds linear layers in codes, for its package of that name",
        write_compressed_tensors,
        nearest_compressed_tensors,
    ),
    "deepcompressor": Export(
        "model.pt, scale.pt, smooth.pt and branch.pt, and rotation.pt where layers are rotated", write_deepcompressor
    ),
    "nunchaku": Export("hiera_blocks.safetensors and unquantized_layers.safetensors", write_nunchaku),
    "onnx": Export(
        "image_encoder.onnx, prompt_mask_decoder.onnx, ... for sam2jq.deploy, and model.json", write_onnx, nearest_onnx
    ),
}

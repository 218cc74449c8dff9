"""Formats that a quantized model can be written in: the table EXPORTS, one entry per target of `sam2jq export --to`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sam2jq.models.sam2 import SAM2

log = logging.getLogger("sam2jq")


class Export(NamedTuple):
    """An export target.

    help: the files that it writes, for `--help`. write(out, model, params, metadata) writes them into `out`, a folder
    that exists; metadata is that of a package (`complete_metadata`). Modules that need torch are imported in `write`.
    """

    help: str
    write: Callable[[Path, SAM2, dict, dict], None]


def write_vanilla(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.exports.vanilla import save_vanilla

    save_vanilla(out / "vanilla.pt", params, metadata["random_weights"])


def write_safetensors(out: Path, model: SAM2, params: dict, metadata: dict) -> None:
    from converters.checkpoint import save_checkpoint
    from sam2jq.quant.leaves import materialize_params

    save_checkpoint(out / "model.safetensors", materialize_params(params))


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


EXPORTS = {
    "vanilla": Export("vanilla.pt for build_sam2", write_vanilla),
    "safetensors": Export("model.safetensors with Hugging Face's names", write_safetensors),
    "deepcompressor": Export(
        "model.pt, scale.pt, smooth.pt and branch.pt, and rotation.pt where layers are rotated", write_deepcompressor
    ),
    "nunchaku": Export("hiera_blocks.safetensors and unquantized_layers.safetensors", write_nunchaku),
}

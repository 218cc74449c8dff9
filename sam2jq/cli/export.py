"""`sam2jq export`: a package in another format."""

import argparse
import logging
from pathlib import Path

from sam2jq.cli.arguments import refuse_flags
from sam2jq.cli.loading import package_path

SCHEMA = None
FORMATS = {
    "vanilla": "vanilla.pt for build_sam2",
    "safetensors": "model.safetensors with Hugging Face's names",
    "deepcompressor": "model.pt, scale.pt, smooth.pt and branch.pt",
    "nunchaku": "hiera_blocks.safetensors and unquantized_layers.safetensors",
}
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {files}" for name, files in FORMATS.items())
    parser.add_argument("--package", required=True, help="package.pt of a run, or the run's folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help=formats)
    parser.add_argument("--out", required=True, help="the folder to write into")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes a package in the format `args.to` into the folder `args.out`."""
    from converters.checkpoint import load_checkpoint
    from converters.exports.package import load_package
    from sam2jq.models.sam2 import build

    refuse_flags(args, flags)
    path, out = package_path(args.package), Path(args.out)
    metadata = load_package(path).metadata
    about = metadata["model"]
    model = build(about["name"], about["version"], about["image_size"])
    write(args.to, out, load_checkpoint(str(path), model).params, metadata)
    log.info("written     %s", out)


def write(target: str, out: Path, params: dict, metadata: dict) -> None:
    """Writes `params` in the format `target`, a key of FORMATS, into the folder `out`."""
    from converters.checkpoint import save_checkpoint
    from converters.exports import deepcompressor, nunchaku_model, vanilla
    from sam2jq.quant.leaves import materialize_params

    match target:
        case "vanilla":
            vanilla.save_vanilla(out / "vanilla.pt", params, metadata["random_weights"])
        case "safetensors":
            save_checkpoint(out / "model.safetensors", materialize_params(params))
        case "deepcompressor":
            deepcompressor.save_deepcompressor(out, params, metadata["names"])
        case "nunchaku":
            params, again = nunchaku_model.onto_grid(params)
            if again:
                log.warning(
                    "nunchaku    %d linears stood on another grid and were rounded a second time, to nearest: "
                    "quantize --convert-nunchaku rounds them once, with GPTQ",
                    len(again),
                )
            nunchaku_model.save_nunchaku(out, params, metadata["model"], metadata["names"])

"""`sam2jq inspect`: the layers, sizes and scores of a package."""

import argparse

from sam2jq.cli.arguments import refuse_flags
from sam2jq.report import text

SCHEMA = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", help="a package, .safetensors or .pt, or the folder of a run")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints a row for each quantized layer, the totals, and how the original sam2 loads the vanilla checkpoint."""
    from converters.hydra_config import hydra_config
    from sam2jq import api

    refuse_flags(args, flags)
    summary = api.open_package(args.package).summary()
    model = summary["model"]
    name, overrides = hydra_config(model["name"], model["version"], model["image_size"])
    print(f"{text.layer_table(summary['layers'])}\n\n{text.totals(summary)}")
    print(f"vanilla.pt  build_sam2({name!r}, 'vanilla.pt', hydra_overrides_extra={overrides!r})")

"""`sam2jq inspect`: the layers, sizes and scores of a package."""

import argparse
import logging

from sam2jq.cli.arguments import refuse_flags
from sam2jq.cli.loading import package_path
from sam2jq.report import text

SCHEMA = None
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", help="package.pt of a run, or the run's folder")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints a row for each quantized layer, the totals, and how the original sam2 loads the vanilla checkpoint."""
    from converters.exports.package import load_package
    from converters.exports.vanilla import hydra_config

    refuse_flags(args, flags)
    summary = load_package(package_path(args.package)).summary()
    model = summary["model"]
    name, overrides = hydra_config(model["name"], model["version"], model["image_size"])
    log.info("%s\n\n%s", text.layer_table(summary["layers"]), text.totals(summary))
    log.info("vanilla.pt  build_sam2(%r, 'vanilla.pt', hydra_overrides_extra=%r)", name, overrides)

"""`sam2jq export`: a package in another format."""

import argparse
import logging

from converters.exports import EXPORTS
from sam2jq.cli.arguments import refuse_flags
from sam2jq.errors import UserError
from sam2jq.files import check_folder

SCHEMA = None
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {export.help}" for name, export in EXPORTS.items())
    parser.add_argument("--package", required=True, help="a package, .safetensors or .pt, or the folder of a run")
    parser.add_argument("--to", required=True, choices=EXPORTS, help=formats)
    parser.add_argument("--out", required=True, help="the folder to write into")
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="round again what the format cannot hold, to the nearest that it can, in place of an error",
    )


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes a package in the format `args.to` into the folder `args.out`."""
    from sam2jq import api

    refuse_flags(args, flags)
    out, target = check_folder(args.out), EXPORTS[args.to]
    if args.nearest and target.nearest is None:
        able = ", ".join(name for name, export in EXPORTS.items() if export.nearest)
        raise UserError(f"--nearest is for {able}: {args.to} rounds nothing again, leave it out")
    metadata = api.open_package(args.package).metadata
    model, params = api.load(args.package)
    if args.nearest:
        params = target.nearest(params)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        target.write(out, model, params, metadata)
    except UserError:  # what the format refuses is known before anything is written
        if is_new and not any(out.iterdir()):
            out.rmdir()
        raise
    log.info("written     %s", args.out)

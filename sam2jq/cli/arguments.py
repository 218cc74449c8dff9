"""Command-line arguments that several commands share."""

import argparse
import math
import shlex
from collections.abc import Callable

from sam2jq.errors import UserError


def add_config(parser: argparse.ArgumentParser, example: str = "") -> None:
    parser.add_argument("--config", help=f"YAML file with settings; every key is also a flag{example}")


def numbers(count: int) -> Callable[[str], list[float]]:
    """A parser of `count` numbers separated by commas."""

    def parse(argument: str) -> list[float]:
        try:
            parsed = [float(part) for part in argument.split(",")]
        except ValueError:
            parsed = []
        if len(parsed) != count or not all(map(math.isfinite, parsed)):
            raise argparse.ArgumentTypeError(f"{argument.strip()!r} is not {count} finite numbers separated by commas")
        return parsed

    return parse


def refuse_flags(args: argparse.Namespace, flags: list[str]) -> None:
    """Raises UserError if a command without settings was given any."""
    if flags:
        raise UserError(f"{args.command} does not take {flags[0]}")


def command_line(args: argparse.Namespace, flags: list[str]) -> str:
    """The command that was given, quoted for a shell."""
    config = ["--config", args.config] if args.config else []
    return shlex.join(["sam2jq", args.command, *config, *flags])

"""Command-line arguments that several commands share."""

import argparse
import math
import shlex
from collections.abc import Callable

from sam2jq.errors import UserError
from sam2jq.predictors.prompts import LABELS


def add_config(parser: argparse.ArgumentParser, example: str = "") -> None:
    parser.add_argument("--config", help=f"YAML file with settings; every key is also a flag{example}")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    labels = "1 foreground (default), 0 background, 2 and 3 corners of a box"
    parser.add_argument("--points", nargs="+", type=numbers(2), default=[], metavar="X,Y", help="clicks, in pixels")
    parser.add_argument("--labels", nargs="+", type=int, metavar="L", help=labels)
    parser.add_argument("--box", type=numbers(4), metavar="X0,Y0,X1,Y1", help="a box, in pixels")


def prompt_labels(args: argparse.Namespace) -> list[int]:
    """One label for each of args.points. Raises UserError if there is no prompt, or the counts differ."""
    if not args.points and args.box is None:
        raise UserError("no prompt: give --points X,Y [X,Y ...] or --box X0,Y0,X1,Y1")
    if args.box is not None and not (args.box[0] < args.box[2] and args.box[1] < args.box[3]):
        raise UserError(f"--box {args.box} has no area: it is X0,Y0,X1,Y1, the upper left and the lower right corner")
    labels = args.labels or [1] * len(args.points)
    if len(labels) != len(args.points):
        raise UserError(f"{len(args.points)} points but {len(labels)} labels: give one label each")
    if wrong := set(labels) - set(LABELS):
        raise UserError(f"--labels {wrong.pop()}: allowed are {', '.join(map(str, LABELS))}")
    return labels


def check_inside(args: argparse.Namespace, size: tuple[int, int]) -> None:
    """Raises UserError unless all clicks, and a part of the box, lie in a picture of `size` (H, W) in pixels."""
    height, width = size
    picture = f"the picture, {width} x {height} pixels"
    for x, y in args.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"--points {x:g},{y:g} lies outside of {picture}: x comes first, from the left")
    if args.box and not (args.box[0] < width and args.box[1] < height and args.box[2] > 0 and args.box[3] > 0):
        raise UserError(f"--box {','.join(f'{value:g}' for value in args.box)} lies outside of {picture}")


def numbers(count: int) -> Callable[[str], list[float]]:
    """A parser of `count` numbers separated by commas."""

    def parse(argument: str) -> list[float]:
        try:
            parsed = [float(part) for part in argument.split(",")]
        except ValueError:
            parsed = []
        if len(parsed) != count or not all(map(math.isfinite, parsed)):
            raise argparse.ArgumentTypeError(f"{argument!r} is not {count} finite numbers separated by commas")
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

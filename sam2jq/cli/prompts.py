"""Prompts on the command line: --points, --labels and --box for one object, or a json file for several."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sam2jq.cli.arguments import numbers
from sam2jq.data.listed import read_json
from sam2jq.errors import UserError, few, suggest
from sam2jq.files import home
from sam2jq.predictors.prompts import LABELS

LABEL_HELP = "1 foreground (default), 0 background, 2 and 3 corners of a box"
BACKGROUND = (0, -1)


class Prompt(NamedTuple):
    """What marks an object in one frame. points: [[x, y], ...], each with a label; box: x0 y0 x1 y1; mask: a file."""

    object: int = 1
    frame: int = 0
    points: Sequence[list[float]] = ()
    labels: Sequence[int] = ()
    box: list[float] | None = None
    mask: str | None = None
    source: str = ""  # for errors: "prompts.json: prompt 0: ", or "--"

    def clicks(self, points: str = "points", labels: str = "labels") -> dict:
        """The points and labels as the named arguments of a predictor; {} if there are none."""
        return {points: self.points, labels: self.labels} if self.points else {}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", nargs="+", type=numbers(2), default=[], metavar="X,Y", help="clicks, in pixels")
    parser.add_argument("--labels", nargs="+", type=int, metavar="L", help=LABEL_HELP)
    parser.add_argument("--box", type=numbers(4), metavar="X0,Y0,X1,Y1", help="a box, in pixels")
    parser.add_argument("--prompts", metavar="FILE", help="a json file with prompts of several objects")


def has_prompt_flags(args: argparse.Namespace) -> bool:
    """Whether an object is given by flags."""
    return bool(args.points or args.labels or args.box)


def prompts_of(args: argparse.Namespace, frame: int = 0, mask: str | None = None) -> list[Prompt]:
    """The prompts of a command, of which there is one at least; frame, mask: of the flags' prompt.

    Raises UserError if there is none, or if one is incomplete or contradicts another.
    """
    if args.prompts is not None:
        if has_prompt_flags(args) or mask is not None or frame != 0:
            raise UserError("--prompts: the file holds all prompts: leave the flags of a single one out")
        return read_prompts(args.prompts)
    if mask is not None:
        if has_prompt_flags(args):
            raise UserError("--mask: a mask is the whole prompt: leave --points, --labels and --box out")
        return [Prompt(frame=frame, mask=mask, source="--")]
    if not args.points and args.box is None:
        raise UserError("no prompt: give --points X,Y [X,Y ...] or --box X0,Y0,X1,Y1")
    labels = args.labels or [1] * len(args.points)
    return [check_prompt(Prompt(1, frame, args.points, labels, args.box, source="--"))]


def read_prompts(path: str) -> list[Prompt]:
    """The prompts in a json file, [{"object": 1, "frame": 0, "points": [[x, y]], "labels": [1]}, ...].

    Keys: object, a whole number from 1 on; frame, 0 if it is left out; and points with labels (all 1 if left out), a
    box [x0, y0, x1, y1], both, or the name of a mask file, relative to the json's folder.
    Raises UserError if one is malformed, an object is prompted twice in a frame, or has background points only.
    """
    content = read_json(Path(path))
    if not isinstance(content, list) or not content:
        raise UserError(f'{path}: holds no list of prompts, such as [{{"object": 1, "points": [[10, 20]]}}]')
    prompts = [parse_prompt(entry, f"{path}: prompt {i}: ", Path(path).parent) for i, entry in enumerate(content)]
    by_place = defaultdict(list)
    for prompt in prompts:
        by_place[prompt.object, prompt.frame].append(prompt)
    for (number, frame), same in by_place.items():
        if len(same) > 1:
            raise UserError(f"{same[1].source}object {number} is prompted in frame {frame} already; put all its points "
                            "of a frame into one prompt")  # fmt: skip
    marked = {p.object for p in prompts if p.box or p.mask or not set(p.labels) <= set(BACKGROUND)}
    if unknown := [p for p in prompts if p.object not in marked]:
        raise UserError(f"{unknown[0].source}object {unknown[0].object} has background points only, so that it is "
                        f"unknown; known objects: {few(sorted(marked)) or 'none'}")  # fmt: skip
    return prompts


def parse_prompt(entry, source: str, folder: Path) -> Prompt:
    """The prompt of an entry of a json file. Raises UserError, which starts with `source`, if it is malformed."""
    if not isinstance(entry, dict):
        raise UserError(f"{source}{entry!r} is no object with keys")
    known = [name for name in Prompt._fields if name != "source"]
    if unknown := [key for key in entry if key not in known]:
        raise UserError(f"{source}unknown key {unknown[0]!r}; allowed: {', '.join(known)}{suggest(unknown[0], known)}")
    for name, least in (("object", 1), ("frame", 0)):
        value = entry.get(name, least if name == "frame" else None)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise UserError(f"{source}{name} is {value!r:.20}; give a whole number from {least} on, below 2 ** 31")
    points, box, mask = entry.get("points", []), entry.get("box"), entry.get("mask")
    if not is_rows(points, 2):
        raise UserError(f"{source}points must be [[x, y], ...], finite numbers in pixels")
    if box is not None and not is_rows([box], 4):
        raise UserError(f"{source}box must be [x0, y0, x1, y1], finite numbers in pixels")
    if mask is not None and (not isinstance(mask, str) or points or box):
        raise UserError(f"{source}mask must be the name of a file, and the whole prompt")
    if not points and box is None and mask is None:
        raise UserError(f"{source}no prompt: give points, a box or a mask")
    labels = entry.get("labels", [1] * len(points))
    if not isinstance(labels, list):
        raise UserError(f"{source}labels must be a list, one for each point")
    mask = None if mask is None else str(folder / home(mask))
    return check_prompt(Prompt(entry["object"], entry.get("frame", 0), points, labels, box, mask, source))


def is_rows(rows, count: int) -> bool:
    """Whether `rows` is a list of lists of `count` finite numbers."""
    finite = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == count and all(map(finite, row)) for row in rows
    )


def check_prompt(prompt: Prompt) -> Prompt:
    """`prompt`. Raises UserError if its box has no area, or if its labels are not one of LABELS for each point."""
    source, points, labels, box = prompt.source, prompt.points, prompt.labels, prompt.box
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(f"{source}box {box} has no area: it is X0,Y0,X1,Y1, the upper left and the lower right corner")
    if len(labels) != len(points):
        raise UserError(f"{source.rstrip('-')}{len(points)} points but {len(labels)} labels: give one label each")
    if wrong := [label for label in labels if label not in LABELS]:
        raise UserError(f"{source}labels {wrong[0]}: allowed are {', '.join(map(str, LABELS))}")
    return prompt


def check_inside(prompts: list[Prompt], size: tuple[int, int], frames: int = 1) -> None:
    """Raises UserError unless all frames are there, and all points, and a part of each box, lie in `size` (H, W)."""
    height, width = size
    picture = f"the picture, {width} x {height} pixels"
    for _, frame, points, _, box, _, source in prompts:
        if not 0 <= frame < frames:
            what = f"the clip has frames 0 to {frames - 1}" if frames > 1 else "there is only frame 0"
            raise UserError(f"{source}frame {frame}: {what}")
        for x, y in points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise UserError(f"{source}points {x:g},{y:g} lies outside of {picture}: x comes first, from the left")
        if box and not (box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0):
            raise UserError(f"{source}box {','.join(f'{value:g}' for value in box)} lies outside of {picture}")

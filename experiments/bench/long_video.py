"""Measures the peak memory of tracking clips of 100, 1,000 and 10,000 frames, and writes a table.

python experiments/bench/long_video.py [--frames 100 1000 10000] [--side 128] [--out experiments/bench/long_video.md]

One object of the demo model in a drawn clip that is repeated, as JPEG frames or as an mp4. Each cell is a process of
its own. VideoPredictor keeps all outputs, so that every frame can be corrected: most of them in a temporary file. track
and StreamPredictor drop them.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from timing import processor

from sam2jq import StreamPredictor, VideoPredictor, load
from sam2jq.cli.clip_files import clip_file
from sam2jq.cli.main import main as sam2jq
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.data.video import open_video

CLICK = {"points": [[37, 30]], "labels": [1]}
LENGTH = 24  # frames of the drawn clip, which is shown forwards and backwards


def write_clip(folder: Path, count: int, side: int) -> None:
    """Writes `count` frames as folder/frames/00000.jpg, ... and as folder/clip.mp4."""
    drawn = [Image.fromarray(frame).resize((side, side)) for frame in draw_clip(2002, LENGTH).frames]
    (folder / "frames").mkdir()
    with clip_file(folder / "clip.mp4", Fraction(24), count) as add:
        for i in range(count):
            picture = drawn[min(i % (2 * LENGTH), 2 * LENGTH - 1 - i % (2 * LENGTH))]
            picture.save(folder / f"frames/{i:05d}.jpg", quality=95)
            add(picture)


def predictor(side: int) -> VideoPredictor:
    return VideoPredictor(*load("demo", image_size=side))


def track(folder: Path, side: int, *options: str) -> None:
    """The command, from clip.mp4; with --reverse, from the frames."""
    clip = "frames" if "--reverse" in options else "clip.mp4"
    point = ",".join(map(str, CLICK["points"][0]))
    model = ["--model.checkpoint", "demo", "--model.image_size", str(side), "--points", point]
    assert sam2jq(["track", str(folder / clip), *model, "--masks", str(folder / "masks"), *options]) == 0


def video(folder: Path, side: int) -> None:
    model = predictor(side)
    state = model.init_state(str(folder / "frames"))
    model.add_new_points_or_box(state, 0, 1, **CLICK)
    for _, _, logits in model.propagate_in_video(state):
        np.asarray(logits)


def stream(folder: Path, side: int) -> None:
    model = StreamPredictor(predictor(side))
    for frame in open_video(str(folder / "frames")):
        model.step(frame)
        if not model.obj_ids:
            model.add_new_points_or_box(1, **CLICK)


WAYS = {
    "track --out o.mp4": lambda folder, side, _: track(folder, side, "--out", str(folder / "o.mp4")),
    "track --out o.gif --reverse": lambda folder, side, last: track(
        folder, side, "--out", str(folder / "o.gif"), "--reverse", "--frame", str(last)
    ),
    "VideoPredictor": lambda folder, side, _: video(folder, side),
    "StreamPredictor": lambda folder, side, _: stream(folder, side),
}


def run(way: str, count: int, side: int) -> None:
    """Prints the peak of the process in MB and the seconds of one cell; the memory of writing the clip is not in it."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()  # before any thread of jax
        if child == 0:
            write_clip(Path(folder), count, side)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        begin = time.perf_counter()
        WAYS[way](Path(folder), side, count - 1)
        print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} {time.perf_counter() - begin:.0f}")


def measure(way: str, count: int, side: int) -> list[str]:
    """Peak MB and seconds of one cell, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--frames", str(count), "--side", str(side)]
    cell = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    print(f"{way:30s} {count:6d} frames  {cell[0]:>6s} MB  {cell[1]:>5s} s", flush=True)
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--side", type=int, default=128, help="pixels, of the frames and of the model")
    parser.add_argument("--way", choices=list(WAYS), help="run one cell in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.way:
        return run(args.way, args.frames[0], args.side)
    cells = {way: [measure(way, count, args.side) for count in args.frames] for way in WAYS}
    lines = [
        "# Long clips: peak memory",
        "",
        f"`python experiments/bench/long_video.py --side {args.side}` on {os.cpu_count()} cores of "
        f"{processor()}, jax {jax.__version__}, numpy {version('numpy')}: the demo model, nano, at "
        f"{args.side} x {args.side}, float32, frames of that size, one object. Peak resident memory of the process in "
        "MB, and seconds with loading and compiling.",
        "",
        f"| | {' | '.join(f'{count:,} frames' for count in args.frames)} |",
        "|---" * (len(args.frames) + 1) + "|",
        *(f"| `{way}` | {' | '.join(f'{mb} MB, {s} s' for mb, s in row)} |" for way, row in cells.items()),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return None


if __name__ == "__main__":
    main()

"""Times the video predictor against sam2's, frame by frame in alternation, and writes a table.

python experiments/bench/video.py [--model tiny] [--frames 12] [--objects 1 4] [--out experiments/bench/video.md]

A clip of drawn frames at the model's own size, one click an object on the first frame, float32, the same random weights
in both. The two predictors take turns at each frame, so that a change in the speed of the machine affects both. Each
runs the clip once before, of 2 frames, so that compiling is not timed; it is stated on its own.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import processor, seconds

from converters.exports.vanilla import build_original
from converters.names import from_torch
from sam2jq import VARIANTS, VideoPredictor, abstract_params, build
from sam2jq.data.synthetic.scenes import draw_clip


def predictors(name: str) -> list:
    """Our predictor and the original on the same random weights."""
    torch.manual_seed(0)
    original = build_original(name, video=True)
    model = build(name)
    return [VideoPredictor(model, from_torch(original.state_dict(), abstract_params(model))), original]


def masks(predictor, clip: str, objects: int) -> Iterator:
    """Yields after each tracked frame of the clip; the first time also after the clicks."""
    state = predictor.init_state(clip)
    for obj in range(objects):
        point = np.array([[100.0 + 150 * obj, 300.0]], np.float32)
        predictor.add_new_points_or_box(state, 0, obj, points=point, labels=np.array([1], np.int32))
    yield
    with torch.inference_mode():
        for _, _, logits in predictor.propagate_in_video(state):
            np.asarray(logits)
            yield


def row(pair: list, clip: str, short: str, objects: int) -> str:
    """One line of the table."""
    begin = time.perf_counter()
    list(masks(pair[0], short, objects))
    first_run = time.perf_counter() - begin
    list(masks(pair[1], short, objects))
    runs = [masks(predictor, clip, objects) for predictor in pair]
    clicks = [seconds(lambda run=run: next(run)) for run in runs]
    frames = []
    for _ in range(len(os.listdir(clip))):
        frames.append([seconds(lambda run=run: next(run)) for run in runs])
    ours, theirs = map(sum, zip(*frames))
    late = [statistics.median(column) for column in zip(*frames[-5:])]  # the memory bank is full
    return (
        f"| {objects} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {late[0]:.2f} | {late[1]:.2f} | "
        f"{late[0] / late[1]:.2f} | {clicks[0]:.2f} | {clicks[1]:.2f} | {first_run:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=list(VARIANTS))
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    side = VARIANTS[args.model].image_size
    command = f"python experiments/bench/video.py --model {args.model} --frames {args.frames}"
    columns = [
        *("objects", "sam2jq s", "sam2 s", "ratio"),
        *("sam2jq s a frame", "sam2 s a frame", "ratio a frame"),
        *("sam2jq clicks s", "sam2 clicks s", "sam2jq first run s"),
    ]
    lines = [
        "# Video predictor: sam2jq against sam2",
        "",
        f"`{command}` on {os.cpu_count()} cores of {processor()}, jax {version('jax')}, "
        f"torch {version('torch')}; {side} x {side}, float32. Seconds of tracking all frames, frame by frame in turn. "
        "A frame: the median of the last five, with a full memory bank. Clicks: one an object, with the first frame's "
        "features. First run: 2 frames with compiling.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for count in (args.frames, 2):
            (Path(folder) / str(count)).mkdir()
            for i, frame in enumerate(draw_clip(0, count).frames):
                Image.fromarray(frame).resize((side, side)).save(f"{folder}/{count}/{i:05d}.jpg")
        pair = predictors(args.model)
        for objects in args.objects:
            lines.append(row(pair, f"{folder}/{args.frames}", f"{folder}/2", objects))
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

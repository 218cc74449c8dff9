"""Times the original SAM 2, sam2jq and its ONNX files in turn, by the calls that all have, and writes a table.

python -m experiments.bench.deploy [--models tiny base-plus] [--clips tiny] [--runs 3] [--out FILE]

Random weights, batch 1. Every part of the work is done by one predictor after the other, again and again, so that a
change in the speed of the machine affects all. The first round is not counted, as it compiles. Peak memory is that of a
process that sets an image and clicks twice. Static grids are arbitrary: they change no time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from converters.exports.onnx.write import save_onnx
from converters.exports.vanilla import build_original
from experiments.bench.encoder import proc, seconds
from sam2jq import VARIANTS, ImagePredictor, QuantSpec, VideoPredictor, build, init_params
from sam2jq.api import describe_model
from sam2jq.data import draw_clip
from sam2jq.deploy import OnnxImagePredictor, OnnxVideoPredictor
from sam2jq.deploy.engines import ENGINES
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.qtensor import quantize
from sam2jq.tree import flatten, unflatten

FRAMES, CLICKS = 12, 64
PARTS = ("image", "click", f"{CLICKS} clicks", f"{FRAMES} frames")
UINT8 = QuantSpec(8, symmetric=False, per_tensor=True)
QUANTIZED = {  # {name: what stands in place of the kernel of a Dense}
    "float32": lambda w: w,
    "w8a8": lambda w: ActQuantized(quantize(w, QuantSpec(8)), np.float32(0.05), np.float32(128), UINT8),
    "w4": lambda w: quantize(w, QuantSpec(4, group_size=128)),
}


def export(folder: Path, model: SAM2, params: dict, leaf: Callable) -> None:
    """Writes the ONNX files of `params` with leaf(kernel) in every Dense."""
    folder.mkdir(exist_ok=True)
    dense = lambda path, x: path.endswith("/kernel") and x.ndim == 2
    tree = unflatten({path: leaf(x) if dense(path, x) else x for path, x in flatten(params).items()})
    save_onnx(folder, model, tree, {"model": describe_model(model), "random_weights": True})


def predictors(name: str, side: str, folder: Path):
    """(image predictor, video predictor, context to call them in) of a side: torch, torch bfloat16, jax, or "w8a8 in
    openvino", whose files are in `folder`."""
    if side.startswith("torch"):
        original = build_original(name, video=True)
        from sam2.sam2_image_predictor import SAM2ImagePredictor  # imports torchvision, which `build_original` prepares

        side_of = original.image_size
        image = SAM2ImagePredictor(original)
        image._bb_feat_sizes = [(side_of // stride,) * 2 for stride in (4, 8, 16)]
        context = torch.autocast("cpu", torch.bfloat16) if "bfloat16" in side else nullcontext()
        return image, original, context
    if side == "jax":
        model = build(name)
        params = init_params(model, 0)
        return ImagePredictor(model, params), VideoPredictor(model, params), nullcontext()
    files, engine = side.split(" in ")
    where = folder / files, engine
    return OnnxImagePredictor(*where), OnnxVideoPredictor(*where), nullcontext()


def work(image_predictor, video_predictor, context, clip: Path) -> dict[str, Callable]:
    """{part of PARTS: function that does it once, to the end}."""
    image = np.array(Image.open(clip / "00000.jpg"))
    clicks = np.random.default_rng(0).uniform(0, min(image.shape[:2]), (CLICKS, 1, 2)).astype(np.float32)
    labels = np.ones((CLICKS, 1), np.int32)

    def track():
        state = video_predictor.init_state(str(clip))
        video_predictor.add_new_points_or_box(state, 0, 1, points=clicks[0], labels=labels[0])
        return list(video_predictor.propagate_in_video(state))

    calls = (
        lambda: image_predictor.set_image(image),
        lambda: image_predictor.predict(clicks[0], labels[0]),
        lambda: image_predictor.predict(clicks, labels),
        track,
    )

    def within(call: Callable) -> Callable:
        def run():
            with context:
                call()

        return run

    return dict(zip(PARTS, map(within, calls)))


def table(name: str, runs: int, parts: Sequence[str]) -> list[str]:
    """The lines of a model size, one per side, with the seconds of these parts; the others are left empty."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build(name)
        params = init_params(model, 0)
        for files, leaf in QUANTIZED.items():
            export(folder / files, model, params, leaf)
        (folder / "clip").mkdir()
        for i, frame in enumerate(draw_clip(0, FRAMES).frames):
            Image.fromarray(frame).save(folder / "clip" / f"{i:05d}.jpg")
        sides = ["torch", "torch bfloat16", "jax"]
        sides += [f"{files} in {engine}" for engine in ENGINES if find_spec(engine) for files in QUANTIZED]
        done = {side: work(*predictors(name, side, folder), folder / "clip") for side in sides}
        taken = {side: {} for side in sides}
        for part in parts:
            turns = [{side: seconds(done[side][part]) for side in sides} for _ in range(runs + 1)][1:]
            for side in sides:
                taken[side][part] = statistics.median(turn[side] for turn in turns)
        sizes = {files: sum(path.stat().st_size for path in (folder / files).iterdir()) / 1e6 for files in QUANTIZED}
        row = lambda side: [f"{taken[side][part]:.3f}" if part in parts else "" for part in PARTS]
        memory = lambda side: f"{peak_gigabytes(name, side, folder):.2f}"
        size = lambda side: f"{sizes[side.split(' in ')[0]]:.0f}" if " in " in side else ""
        return [f"| {' | '.join([name, side, *row(side), memory(side), size(side)])} |" for side in sides]


def peak_gigabytes(name: str, side: str, folder: Path) -> float:
    """The peak memory, in GB, of a new process that sets an image and clicks, twice."""
    command = [sys.executable, "-m", "experiments.bench.deploy", "--models", name, "--alone", side, str(folder)]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base-plus"], choices=list(VARIANTS))
    parser.add_argument("--clips", nargs="*", default=["tiny"], help="the models that track a clip, too")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.alone:
        side, folder = args.alone
        calls = work(*predictors(args.models[0], side, Path(folder)), Path(folder) / "clip")
        for _ in range(2):
            calls["image"](), calls["click"]()
        print(proc("self/status", "VmHWM").split()[0])
        return
    lines = [
        "# The original, sam2jq and its ONNX files",
        "",
        f"`python -m experiments.bench.deploy --runs {args.runs}` on {os.cpu_count()} cores of "
        f"{proc('cpuinfo', 'model name')}. Random weights; medians of {args.runs} runs in turn, in seconds.",
        "",
        f"| model | side | {' | '.join(PARTS)} | peak GB | files MB |",
        f"|{'---|' * (4 + len(PARTS))}",
        *(line for name in args.models for line in table(name, args.runs, PARTS[: None if name in args.clips else -1])),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

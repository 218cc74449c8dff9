"""Times the original SAM 2, sam2jq and its ONNX files in turn, by the calls that all have, and writes a table.

python -m experiments.bench.deploy [--models tiny base-plus] [--clips tiny] [--runs 3] [--sides ...] [--out FILE]

Random weights, batch 1. One side after the other does all of the work in a process of its own, again and again, so that
a change in the speed of the machine affects all. Static grids are arbitrary: they change no time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from converters.exports.onnx.write import save_onnx
from experiments.bench.deploy_side import CLIPS, PARTS
from experiments.bench.timing import processor
from sam2jq import VARIANTS, QuantSpec, build, init_params
from sam2jq.api import describe_model
from sam2jq.cli.cost import folder_megabytes
from sam2jq.data import draw_clip
from sam2jq.deploy.engines import ENGINES
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.qtensor import quantize
from sam2jq.tree import flatten, unflatten

UINT8 = QuantSpec(8, symmetric=False, per_tensor=True)
QUANTIZED = {  # {name: what stands in place of the kernel of a Dense}
    "float": lambda w: w,
    "w8a8": lambda w: ActQuantized(quantize(w, QuantSpec(8)), np.float32(0.05), np.float32(128), UINT8),
    "w4": lambda w: quantize(w, QuantSpec(4, group_size=128)),
}


def export(folder: Path, model: SAM2, params: dict, leaf: Callable) -> None:
    """Writes the ONNX files of `params` with leaf(kernel) in every Dense."""
    folder.mkdir(exist_ok=True)
    dense = lambda path, x: path.endswith("/kernel") and x.ndim == 2
    tree = unflatten({path: leaf(x) if dense(path, x) else x for path, x in flatten(params).items()})
    save_onnx(folder, model, tree, {"model": describe_model(model), "random_weights": True})


def measure_alone(*arguments: str) -> dict[str, float]:
    """What deploy_side.py prints in a new process."""
    command = [sys.executable, "-m", "experiments.bench.deploy_side", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, runs: int, track: bool, only: list[str] | None) -> list[str]:
    """The lines of a model size, one per side; only: the names of some sides, None for all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build(name)
        params = init_params(model, 0)
        for files, leaf in QUANTIZED.items():
            export(folder / files, model, params, leaf)
        for clip, frames in CLIPS.items():
            (folder / clip).mkdir()
            for i, frame in enumerate(draw_clip(0, frames).frames):
                Image.fromarray(frame).save(folder / clip / f"{i:05d}.jpg")
        sides = ["torch", "torch bfloat16", "jax"]
        engines = [engine for engine in ENGINES if find_spec(engine)]
        engines += ["openvino bfloat16"] * ("openvino" in engines)
        sides += [f"{files} in {engine}" for engine in engines for files in QUANTIZED]
        sides = sides if only is None else only
        once = lambda side: measure_alone(name, side, str(folder), *["track"] * track)
        turns = [{side: once(side) for side in sides} for _ in range(runs)]
        sizes = {files: folder_megabytes(folder / files) for files in QUANTIZED}
    lines = []
    for side in sides:
        median = {part: statistics.median(turn[side][part] for turn in turns) for part in turns[0][side]}
        cells = [f"{median[part]:.3f}" if part in median else "" for part in PARTS] + [f"{median['peak']:.2f}"]
        size = f"{sizes[side.split(' in ')[0]]:.0f}" if " in " in side else ""
        lines.append(f"| {' | '.join([name, side, *cells, size])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base-plus"], choices=list(VARIANTS))
    parser.add_argument("--clips", nargs="*", default=["tiny"], help="the models that track a clip, too")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", help='such as torch "w8a8 in openvino"; default: all')
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "# The original, sam2jq and its ONNX files",
        "",
        f"`python -m experiments.bench.deploy --runs {args.runs}` on {os.cpu_count()} cores of {processor()}. Random "
        f"weights; medians of {args.runs} runs in turn, in seconds: an image that is set, a click on it, and a clip "
        "with one object. Peak memory of a process with an image and a click. Where nothing else is said, in "
        "float32.",
        "",
        f"| model | side | {' | '.join(PARTS)} | peak GB | files MB |",
        f"|{'---|' * (4 + len(PARTS))}",
        *(line for name in args.models for line in table(name, args.runs, name in args.clips, args.sides)),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

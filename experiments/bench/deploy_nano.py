"""Writes a table and a picture of size, seconds and mIoU of the demo model's deployed files, beside the original sam2.

make quantize ARGS=--convert-onnx CONFIG="experiments/nano_w8a8_static.yaml experiments/nano_w4a16.yaml
    experiments/nano_w2a16.yaml"
python -m experiments.bench.deploy_nano outputs/nano_w8a8_static outputs/nano_w4a16 outputs/nano_w2a16

Writes deploy_nano.md and deploy_nano.png beside this file. All sides take turns on one image, so that a change in the
speed of the machine affects all. The original's mIoU is that of our float32 predictor, which computes the same.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch

import sam2jq
from converters.exports.onnx.write import save_onnx
from converters.exports.vanilla import build_original, save_vanilla
from experiments.bench.deploy_side import original_image_predictor
from experiments.bench.timing import processor, seconds
from experiments.measured import ABOUT, cached_samples
from sam2jq.cli.cost import folder_megabytes
from sam2jq.data import read_image
from sam2jq.deploy import OnnxImagePredictor
from sam2jq.deploy.engines import ENGINES
from sam2jq.eval.image_benchmark import evaluate_images
from sam2jq.predictors.prompted_image import PromptedImage

IMAGES = "scenes:1001", 48
ENGINE_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


class Side(NamedTuple):
    """weights: their scheme; program: what runs them; megabytes: of the files; segment(image): one image, one click."""

    weights: str
    program: str
    megabytes: float
    segment: Callable[[np.ndarray], object]
    miou: dict[str, float]


def click(predictor) -> Callable[[np.ndarray], object]:
    """A function that sets an image and clicks at its centre."""

    def segment(image: np.ndarray) -> object:
        predictor.set_image(image)
        center = np.array([[image.shape[1] / 2, image.shape[0] / 2]], np.float32)
        return predictor.predict(center, np.array([1], np.int32))

    return segment


def miou(predictor: PromptedImage) -> dict[str, float]:
    """{prompt: mIoU in percent} on IMAGES."""
    scores = evaluate_images(predictor, cached_samples(*IMAGES))["miou"]
    return {prompt: 100 * value for prompt, value in scores.items()}


def onnx_sides(weights: str, folder: Path) -> list[Side]:
    """The files of a folder in each engine that is installed."""
    engines = [engine for engine in ENGINES if find_spec(engine)]
    predictors = {engine: OnnxImagePredictor(folder, engine) for engine in engines}
    size = folder_megabytes(folder)
    return [Side(weights, ENGINE_NAMES[engine], size, click(x), miou(x)) for engine, x in predictors.items()]


def float_sides(folder: Path) -> list[Side]:
    """The original, ours, and ONNX files, all in float32; `folder` gets their files."""
    model, params = sam2jq.load("demo")
    save_vanilla(folder / "vanilla.pt", params)
    original = build_original("nano", checkpoint=folder / "vanilla.pt")
    theirs = original_image_predictor(original)
    (folder / "onnx").mkdir()
    save_onnx(folder / "onnx", model, params, ABOUT | {"random_weights": False})
    ours = sam2jq.ImagePredictor(model, params)
    size, scores = (folder / "vanilla.pt").stat().st_size / 1e6, miou(ours)
    pair = [Side("float32", "sam2 (torch)", size, click(theirs), scores)]
    pair += [Side("float32", "sam2jq (JAX)", size, click(ours), scores)]
    return pair + onnx_sides("float32", folder / "onnx")


def run_sides(run: Path) -> list[Side]:
    """The package of a run in our predictor, and its ONNX files."""
    weights = run.name.removeprefix("nano_").replace("_", " ").upper().replace("STATIC", "static")
    ours = sam2jq.ImagePredictor(*sam2jq.load(str(run / "package.pt")))
    package = Side(weights, "sam2jq (JAX)", (run / "package.pt").stat().st_size / 1e6, click(ours), miou(ours))
    return [package, *onnx_sides(weights, run / "onnx")]


def draw(sides: list[Side], taken: list[float], path: Path) -> None:
    """mIoU against the size of the files and against the seconds of an image: a mark for a program, a colour for a
    scheme."""
    marks = dict(zip(dict.fromkeys(side.program for side in sides), "*osD"))
    colors = dict(zip(dict.fromkeys(side.weights for side in sides), ("black", "tab:blue", "tab:orange", "tab:red")))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, values, label in (
        (axes[0], [side.megabytes for side in sides], "files, MB"),
        (axes[1], [1000 * x for x in taken], "an image and a click, milliseconds"),
    ):
        for side, value in zip(sides, values):
            mean = statistics.mean(side.miou.values())
            axis.scatter(value, mean, s=60, color=colors[side.weights], marker=marks[side.program], alpha=0.8)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU, %")
    handles = [axes[1].scatter([], [], s=60, color=color, marker="s", label=name) for name, color in colors.items()]
    handles += [axes[1].scatter([], [], s=60, color="grey", marker=mark, label=name) for name, mark in marks.items()]
    figure.legend(handles=handles, loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="the folder of a run with --convert-onnx")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        sides = [*float_sides(Path(folder)), *(side for run in args.run for side in run_sides(run))]
        image = read_image("scenes:2002/0002")
        for side in sides:
            side.segment(image)
        turns = [[seconds(lambda side=side: side.segment(image)) for side in sides] for _ in range(args.runs)]
    taken = [statistics.median(column) for column in zip(*turns)]
    lines = [
        "# The demo model's deployed files beside the original",
        "",
        f"`python -m experiments.bench.deploy_nano --runs {args.runs} {' '.join(map(str, args.run))}` on "
        f"{os.cpu_count()} cores of {processor()}. mIoU in percent on {IMAGES[1]} images of "
        f"{IMAGES[0]}. Milliseconds of setting an image of 256 pixels and one click, medians of {args.runs} runs in "
        "turn; all sides share a process, and differences of 10 ms are chance. Files: of the whole model, its memory "
        "included.",
        "",
        "| weights | program | box | 1 click | 3 clicks | ms | of sam2 | files MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, value in zip(sides, taken):
        scores = " | ".join(f"{score:.1f}" for score in side.miou.values())
        lines.append(
            f"| {side.weights} | {side.program} | {scores} | {1000 * value:.0f} | {value / taken[0]:.2f} | "
            f"{side.megabytes:.2f} |"
        )
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(sides, taken, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()

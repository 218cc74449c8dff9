"""Times the image predictor and the automatic mask generator against sam2's, in turn, and writes a table.

python experiments/bench/images.py [--model tiny] [--points 32] [--repeat 3] [--out experiments/bench/images.md]

A drawn scene of the model's own size, float32, the same random weights in both. Everything-mode keeps the half of the
masks whose estimated IoU is above the median, whatever their stability, since random weights have no good masks.
torchvision's nms, which a CPU build of torch lacks, is replaced in sam2 by ours. Compiling is not timed.
"""

import argparse
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import torch
from timing import processor

from converters.exports.vanilla import build_original
from converters.names import from_torch
from sam2jq import VARIANTS, AutomaticMaskGenerator, ImagePredictor, abstract_params, build
from sam2jq.data import draw_scene
from sam2jq.predictors.crops import non_maximum_suppression


def suppress(boxes, scores, idxs, iou_threshold):
    """torchvision's `batched_nms` of one category."""
    return torch.from_numpy(non_maximum_suppression(boxes.numpy(), scores.numpy(), iou_threshold))


def predictors(name: str) -> tuple[list, Callable]:
    """Our predictor and the original on the same weights, and the function that makes their two generators."""
    torch.manual_seed(0)
    original = build_original(name)
    model = build(name)
    params = from_torch(original.state_dict(), abstract_params(model))
    from sam2 import automatic_mask_generator
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    automatic_mask_generator.batched_nms = suppress
    theirs = SAM2ImagePredictor(original)
    sizes = [(model.variant.image_size // stride,) * 2 for stride in (4, 8, 16)]
    theirs._bb_feat_sizes = sizes

    def generators(**settings):
        pair = [AutomaticMaskGenerator(model, params, **settings),
                automatic_mask_generator.SAM2AutomaticMaskGenerator(original, **settings)]  # fmt: skip
        pair[1].predictor._bb_feat_sizes = sizes
        return pair

    return [ImagePredictor(model, params), theirs], generators


def costs(run: Callable) -> tuple[float, float]:
    """Seconds of wall time and of CPU time of one call."""
    begin, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - begin, time.process_time() - cpu


def row(name: str, runs: list[Callable], repeat: int) -> str:
    """One line of the table, from the medians."""
    runs[0]()
    times = np.median([[costs(run) for run in runs] for _ in range(repeat)], axis=0)
    (ours, our_cpu), (theirs, their_cpu) = times
    cells = ours, theirs, ours / theirs, our_cpu, their_cpu, our_cpu / their_cpu
    return f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=list(VARIANTS))
    parser.add_argument("--points", type=int, default=32, help="points per side of everything-mode")
    parser.add_argument(
        "--repeat", type=int, default=3, help="turns of everything-mode; the others get five times as many"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    side = VARIANTS[args.model].image_size
    image, rng = draw_scene(3, side).image, np.random.default_rng(0)
    pair, generators = predictors(args.model)

    def encode(predictor):
        predictor.set_image(image)
        return predictor.get_image_embedding()

    click = {"point_coords": np.array([[0.4 * side, 0.5 * side]]), "point_labels": np.array([1])}
    clicks = {"point_coords": rng.uniform(0, side, (64, 1, 2)), "point_labels": np.ones((64, 1), int)}
    calls = {"set_image": encode, "a click": lambda p: p.predict(**click), "64 clicks": lambda p: p.predict(**clicks)}
    lines = [row(name, [lambda p=p, f=f: f(p) for p in pair], 5 * args.repeat) for name, f in calls.items()]
    threshold = float(np.median(pair[0].predict(**clicks)[1]))
    both = generators(points_per_side=args.points, pred_iou_thresh=threshold, stability_score_thresh=0.0)
    runs = [lambda generator=generator: generator.generate(image) for generator in both]
    lines.append(row(f"everything, {args.points} x {args.points} points", runs, args.repeat))
    columns = "call", "sam2jq s", "sam2 s", "ratio", "sam2jq CPU s", "sam2 CPU s", "ratio of CPU s"
    command = f"python experiments/bench/images.py --model {args.model} --points {args.points} --repeat {args.repeat}"
    table = [
        "# Images: sam2jq against sam2",
        "",
        f"`{command}` on {os.cpu_count()} cores of {processor()}, jax {version('jax')}, "
        f"torch {version('torch')}; {side} x {side}, float32. Medians of calls in turn; "
        "there are five times as many of those before everything-mode.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *lines,
    ]
    print("\n".join(table))
    if args.out:
        args.out.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

"""Counts what each virtual device does in calibration and evaluation of the demo model, and writes a table.

python -m experiments.bench.devices [--out experiments/bench/devices.md]

Virtual devices share the cores of one machine, so this says nothing of speed: only that no work is done twice.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from sam2jq import load
from sam2jq.data.labeled import LabeledImage
from sam2jq.data.sources import find_samples
from sam2jq.eval.image_benchmark import score_sample
from sam2jq.files import atomic_write
from sam2jq.predictors.image import ImagePredictor
from sam2jq.ptq.calibration import batches
from sam2jq.training.parallel_map import parallel_map, replicate
from sam2jq.training.sharding import make_mesh

DEVICES, CLIPS, IMAGES = (1, 2, 4), 10, 12
HEADER = f"""# What each virtual device does

{CLIPS} clips of calibration, and {IMAGES} drawn scenes scored by the demo model:
`python -m experiments.bench.devices`. Virtual devices share the cores of one machine, so this says nothing of speed:
only that each clip and image is computed once, by one device. An image goes to the first device that is free.

| devices | clips of each | images of each |
|---|---|---|
"""


def clips(start: int, step: int = 1) -> Iterator[np.ndarray]:
    """Yields each step-th of CLIPS small clips after the first `start`."""
    return (np.zeros((1, 8, 8, 3), np.float32) for _ in range(start, CLIPS, step))


def count_work() -> dict[str, list[int]]:
    """{"clips", "images": how many each device of this process computes}."""
    folded = sum(np.asarray(is_clip).astype(int) for _, is_clip in batches(clips, (1, 8, 8, 3), make_mesh(), 0))
    scored, (model, params) = Counter(), load("demo")

    def score(predictor: ImagePredictor, sample: LabeledImage) -> None:
        (device,) = jax.tree.leaves(predictor.params)[0].devices()
        scored[device.id] += 1
        score_sample(predictor, sample)

    parallel_map(score, replicate(partial(ImagePredictor, model), params), find_samples("scenes:2002", IMAGES))
    return {"clips": folded.tolist(), "images": [scored[device] for device in sorted(scored)]}


def row(devices: int) -> str:
    """The line of the table for so many virtual devices, which a process of its own has."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "experiments.bench.devices", "--count"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True, stdout=subprocess.PIPE, text=True)
    counts = (" + ".join(map(str, numbers)) for numbers in json.loads(done.stdout).values())
    return f"| {devices} | {' | '.join(counts)} |\n"


def main() -> None:
    """Writes the table to the file that --out names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="experiments/bench/devices.md")
    parser.add_argument("--count", action="store_true", help="print the counts of this process")
    args = parser.parse_args()
    if args.count:
        print(json.dumps(count_work()))
        return
    with atomic_write(Path(args.out)) as temporary:
        temporary.write_text(HEADER + "".join(map(row, DEVICES)))


if __name__ == "__main__":
    main()

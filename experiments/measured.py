"""Scores of the demo model and a log of finished runs, both used by the tables of this folder."""

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path

import jax

from converters.exports.package import load_package, save_package
from converters.sources import ASSETS
from sam2jq.data.sources import LabeledImage, find_clips, find_samples
from sam2jq.eval.image_benchmark import evaluate_images
from sam2jq.eval.vos_benchmark import evaluate_clips
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.video import VideoPredictor
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.tree import flatten, kernels, layer_name

ABOUT = {"model": {"name": "nano", "version": "2.1", "image_size": 256}}  # the metadata that a package needs
Data = tuple[str, int]  # (data source, number of images or clips)


@cache
def cached_samples(data: str, count: int) -> list[LabeledImage]:
    """The first `count` images of `data` with masks; each is read once per process."""
    return [sample._replace(read=cache(sample.read)) for sample in find_samples(data, count)]


def measure(model: SAM2, params: dict, images: Data, clips: Data | None = None) -> dict[str, float]:
    """{prompt: mIoU in percent, "bits": bits per weight in a package, "J&F": in percent, if there are `clips`}."""
    scores = evaluate_images(ImagePredictor(model, materialize_weights(params)), cached_samples(*images))["miou"]
    results = {prompt: 100 * value for prompt, value in scores.items()} | {"bits": effective_bits(params)}
    if clips:
        data, count = clips
        predictor = VideoPredictor(model, materialize_weights(params))
        results["J&F"] = evaluate_clips(predictor, find_clips(data, "", count), None)["j&f"]
    return results


def effective_bits(params: dict) -> float:
    """Bits per weight of the quantized layers in a package, scales and low-rank branches included; 32 without any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "package.pt"
        save_package(path, params, dict.fromkeys(map(layer_name, kernels(flatten(params))), 0.0), ABOUT)
        return load_package(path).summary()["effective_bits"] or 32.0


class Runs(dict[str, dict]):
    """{run: its row} of a file of JSON lines, without runs made with other weights of nano."""

    def __init__(self, path: Path):
        self.path = path
        self.weights = hashlib.sha256((ASSETS / "nano.safetensors").read_bytes()).hexdigest()[:12]
        rows = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
        super().__init__((row["run"], row) for row in rows if row["weights"] == self.weights)

    def add(self, run: str, row: dict) -> None:
        """Adds a row, also to the file, and clears compiled programs: those of ten models do not fit in memory."""
        self[run] = {"weights": self.weights, "run": run} | row
        with self.path.open("a") as file:
            print(json.dumps(self[run]), file=file)
        jax.clear_caches()

"""What each technique saves of the demo model's masks: one row for each that is added to those before it; and
experiments/nano_*.yaml as they are, where that is another combination.

python experiments/ptq/table.py > experiments/ptq/table.md

Goes on where it was stopped: each run is a line of runs.jsonl, which tells on which weights it was made. The names of
some grids make only their rows, so that two processes can share the work; with --kept it runs nothing and tells what is
there.
`fresh` first makes only the first rows and those of the configs, on scenes that no choice was made on: fresh.md.
"""

import hashlib
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax

from converters.checkpoint import ASSETS, load_checkpoint
from converters.package import load_package, save_package
from sam2jq import build
from sam2jq import config as settings
from sam2jq.config import GptqConfig, LowRankConfig, QuantConfig, RotationConfig, SmoothConfig, SmoothProjConfig
from sam2jq.data import find_images, preprocess, read_image
from sam2jq.eval.evaluate import Sample, evaluate_clips, evaluate_images, find_clips, find_samples
from sam2jq.ptq import quantize_params
from sam2jq.quant.act import simulated
from sam2jq.quant.ops import effective_params
from sam2jq.tree import flatten, kernels, layer_name
from sam2jq.video import VideoPredictor

GRIDS = ("w8a8", "w4a16", "w4a8", "w4a4", "w3a16")  # weights and inputs as in experiments/nano_*.yaml
SEEDS = (7, 8, 9)  # of the scenes to calibrate on; figures are medians over these
CALIBRATED, IMAGES, CLIPS = 32, ("scenes:1001", 48), ("scenes:2002", 4)  # held out
FRESH = ("scenes:4004", 48)  # the configs were chosen on the first 32 of IMAGES
RUNS = Path(__file__).with_name("runs.jsonl")


def rows(quant: QuantConfig) -> dict[str, QuantConfig]:
    """{name: config}, each with one technique more than the one before."""
    bare = replace(quant.wgts, target_bits=None, kernel_gptq=None, low_rank=None, ridge=0.0, bias_correction=False)
    at = replace(quant, wgts=bare, smooth=SmoothConfig(), rotation=RotationConfig())
    found = {"RTN": at}
    for name, change in {
        "+ GPTQ": lambda q: replace(q, wgts=replace(q.wgts, kernel_gptq=GptqConfig())),
        "+ bias correction": lambda q: replace(q, wgts=replace(q.wgts, bias_correction=True)),
        "+ smoothing": lambda q: replace(q, smooth=SmoothConfig(SmoothProjConfig(strategy="GridSearch"))),
        "+ bits by layer": lambda q: replace(q, wgts=replace(q.wgts, target_bits=float(q.wgts.dtype[-1]))),
        "+ rotation": lambda q: replace(q, rotation=RotationConfig(["hadamard"])),
        "+ low rank 8": lambda q: replace(q, wgts=replace(q.wgts, low_rank=LowRankConfig(rank=8, num_iters=10))),
    }.items():
        found[name] = at = change(at)
    if quant.wgts.dtype[-1] == "8":  # no layer can have more, and there is nothing left for the others to save
        return dict(list(found.items())[:4])
    if quant not in found.values():
        found["as configured"] = quant
    return found


def effective_bits(params: dict) -> float:
    """Bits a weight that a package takes for the quantized layers, with scales, zeros and branches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "package.pt"
        errors = dict.fromkeys(map(layer_name, kernels(flatten(params))), 0.0)
        save_package(path, params, errors, {})
        return load_package(path).summary()["effective_bits"]


@cache
def drawn(data: str, count: int) -> list[Sample]:
    """Samples that are drawn once, for all runs."""
    return [sample._replace(read=cache(sample.read)) for sample in find_samples(data, count)]


def measure(model, params: dict, images: tuple[str, int], clips: bool) -> dict[str, float]:
    """mIoU of each prompt, and J&F of clips if asked for, in percent."""
    found = evaluate_images(model, params, drawn(*images))["miou"]
    found = {name: 100 * value for name, value in found.items()}
    if clips:
        found["J&F"] = evaluate_clips(VideoPredictor(model, params), find_clips(CLIPS[0], "", CLIPS[1]), None)["j&f"]
    return found


def main() -> None:
    model, asked = build("nano"), sys.argv[1:]
    told, fresh = "--kept" in asked, "fresh" in asked
    images = FRESH if fresh else IMAGES
    grids = [name for name in asked if name not in ("--kept", "fresh")] or GRIDS
    jax.config.update("jax_compilation_cache_dir", str(Path("cache/sam2/compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    full = effective_params(load_checkpoint("demo", model).params)
    weights = hashlib.sha256((ASSETS / "nano.safetensors").read_bytes()).hexdigest()[:12]
    lines = map(json.loads, RUNS.read_text().splitlines() if RUNS.is_file() else [])
    runs = {line["run"]: line["scores"] for line in lines if line["weights"] == weights}

    def known(name: str, make) -> dict[str, float] | None:
        run = f"fresh {name}" if fresh else name
        if run not in runs and not (told and name != "full"):
            runs[run] = make()
            if len(runs) % 10 == 0:
                jax.clear_caches()  # the programs of a hundred models do not fit into one process
            with RUNS.open("a") as log:
                print(json.dumps({"weights": weights, "run": run, "scores": runs[run]}), file=log)
        return runs.get(run)

    def quantized(config: QuantConfig, seed: int) -> dict[str, float]:
        size, names = model.variant.image_size, find_images(f"scenes:{seed}", CALIBRATED, 0)
        clips = lambda n: (preprocess(read_image(name), size)[None] for name in names[n:])
        store = Path("cache/sam2/calibration"), names
        needs = ("gram", "tokens")  # of all rows, so that one calibration serves them
        *_, params = quantize_params(model, full, config, clips, seed=seed, needs=needs, cache=store).reached.values()
        clips = seed == SEEDS[0] and not fresh
        return measure(model, simulated(params), images, clips) | {"bits": effective_bits(params)}

    configs = {grid: settings.load(f"experiments/nano_{grid}.yaml", []).quant for grid in grids}
    every = {(grid, name): config for grid in grids for name, config in rows(configs[grid]).items()}
    chief = {row for row, config in every.items() if row[1] == "RTN" or config == configs[row[0]]}
    found = {row: config for row, config in every.items() if not fresh or row in chief}
    reference = known("full", lambda: measure(model, full, images, clips=not fresh))
    order = sorted(itertools.product(SEEDS, found), key=lambda run: (run[0] > SEEDS[0]) * (2 - (run[1] in chief)))
    scores = {row: [] for row in found}
    for seed, row in order:  # each row once, then those at the ends of a range of techniques, then the others again
        run = known(f"{' '.join(row)} {seed}", partial(quantized, found[row], seed))
        if run:
            scores[row].append(run)

    columns = ["box", "1 click", "3 clicks", "J&F"][: 3 + (not fresh)]
    cells = " | ".join(f"{reference[c]:.1f}" for c in columns)
    print(f"| weights, inputs | | runs | bits a weight | box mIoU | {' | '.join(columns[1:])} |")
    print(f"|{'---|' * (4 + len(columns))}")
    print(f"| float32 | | | 32 | {cells} |")
    for (grid, name), made in scores.items():
        if made:
            change = [statistics.median(run[c] for run in made if c in run) - reference[c] for c in columns]
            text = " | ".join(f"{x:+.1f}" for x in change)
            print(f"| {grid.upper()} | {name} | {len(made)} | {made[0]['bits']:.2f} | {text} |")
    print(
        f"\nnano: the first row in percent, the others the change in points. mIoU of {images[1]} held-out images of "
        f"{images[0]}, medians over runs calibrated on {CALIBRATED} images of scenes:{SEEDS[0]}, then of the next"
        + (
            ". `python experiments/ptq/table.py fresh > experiments/ptq/fresh.md`"
            if fresh
            else f"; J&F of {CLIPS[1]} clips of {CLIPS[0]}, for the first run. "
            "`python experiments/ptq/table.py > experiments/ptq/table.md`, some two hours of two cores."
        )
    )


if __name__ == "__main__":
    main()

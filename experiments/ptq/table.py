"""What each technique saves of the demo model's masks: one row for each that is added to those before it; and
experiments/nano_*.yaml as they are, where that is another combination.

python -m experiments.ptq.table > experiments/ptq/table.md

Goes on where it was stopped: each run is a line of runs.jsonl, which tells on which weights it was made. The names of
some grids make only their rows, so that two processes can share the work; with --kept it runs nothing and tells what is
there.
`fresh` first makes only the first rows and those of the configs, on scenes that no choice was made on: fresh.md.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from converters.checkpoint import load_checkpoint
from experiments.measured import Runs, measure
from sam2jq import build
from sam2jq.config import loader
from sam2jq.config.quant import GptqConfig, LowRankConfig, QuantConfig, RotationConfig, SmoothConfig, SmoothSection
from sam2jq.data import find_images, preprocess, read_image
from sam2jq.ptq.pipeline import quantize_params
from sam2jq.quant.leaves import materialize_params

GRIDS = ("w8a8", "w4a16", "w4a8", "w4a4", "w3a16")  # weights and inputs as in experiments/nano_*.yaml
SEEDS = (7, 8, 9)  # of the scenes to calibrate on; figures are medians over these
CALIBRATED, IMAGES, CLIPS = 32, ("scenes:1001", 48), ("scenes:2002", 4)  # held out
FRESH = ("scenes:4004", 48)  # the configs were chosen on the first 32 of IMAGES


def rows(quant: QuantConfig) -> dict[str, QuantConfig]:
    """{name: config}, each with one technique more than the one before."""
    bare = replace(quant.wgts, target_bits=None, kernel_gptq=None, low_rank=None, ridge=0.0, bias_correction=False)
    ipts = replace(quant.ipts, target_bits=None)
    at = replace(quant, wgts=bare, ipts=ipts, smooth=SmoothSection(), rotation=RotationConfig())
    found = {"RTN": at}
    for name, change in {
        "+ GPTQ": lambda q: replace(q, wgts=replace(q.wgts, kernel_gptq=GptqConfig())),
        "+ bias correction": lambda q: replace(q, wgts=replace(q.wgts, bias_correction=True)),
        "+ smoothing": lambda q: replace(q, smooth=SmoothSection(SmoothConfig(strategy="GridSearch"))),
        "+ bits by layer": lambda q: replace(q, wgts=replace(q.wgts, target_bits=float(q.wgts.dtype[-1]))),
        "+ bits of inputs by layer": lambda q: replace(q, ipts=quant.ipts),
        "+ rotation": lambda q: replace(q, rotation=RotationConfig(["hadamard"])),
        "+ low rank 8": lambda q: replace(q, wgts=replace(q.wgts, low_rank=LowRankConfig(rank=8, num_iters=10))),
    }.items():
        if (after := change(at)) != at:
            found[name] = at = after
    if quant.wgts.dtype[-1] == "8":  # no layer can have more, and there is nothing left for the others to save
        return dict(list(found.items())[:4])
    if quant not in found.values():
        found["as configured"] = quant
    return found


def main() -> None:
    model, asked = build("nano"), sys.argv[1:]
    told, fresh = "--kept" in asked, "fresh" in asked
    images = FRESH if fresh else IMAGES
    grids = [name for name in asked if name not in ("--kept", "fresh")] or GRIDS
    jax.config.update("jax_compilation_cache_dir", str(Path("cache/sam2/compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    full = materialize_params(load_checkpoint("demo", model).params)
    runs = Runs(Path(__file__).with_name("runs.jsonl"))

    def known(name: str, make: Callable[[], dict], clips: bool) -> dict[str, float] | None:
        """The scores of a run, made if it was not yet and may be; `clips` take the longest."""
        run = f"fresh {name}" if fresh else name
        if run not in runs and (name == "full" or not told):
            runs.add(run, {"scores": measure(model, make(), images, CLIPS if clips and not fresh else None)})
        return runs[run]["scores"] if run in runs else None

    def quantized(config: QuantConfig, seed: int) -> dict:
        size, names = model.variant.image_size, find_images(f"scenes:{seed}", CALIBRATED, 0)
        clips = lambda n: (preprocess(read_image(name), size)[None] for name in names[n:])
        store = Path("cache/sam2/calibration"), names
        needs = ("gram", "tokens")  # of all rows, so that one calibration serves them
        *_, params = quantize_params(
            model, full, config, clips, seed=seed, needs=needs, cache=store
        ).params_by_stage.values()
        return params

    configs = {grid: loader.load(f"experiments/nano_{grid}.yaml", []).quant for grid in grids}
    every = {(grid, name): config for grid in grids for name, config in rows(configs[grid]).items()}
    chief = {row for row, config in every.items() if row[1] == "RTN" or config == configs[row[0]]}
    found = {row: config for row, config in every.items() if not fresh or row in chief}
    reference = known("full", lambda: full, True)
    order = sorted(itertools.product(SEEDS, found), key=lambda run: (run[0] > SEEDS[0]) * (2 - (run[1] in chief)))
    scores = {row: [] for row in found}
    for seed, row in order:  # each row once, then those at the ends of a range of techniques, then the others again
        run = known(f"{' '.join(row)} {seed}", partial(quantized, found[row], seed), seed == SEEDS[0])
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
            ". `python -m experiments.ptq.table fresh > experiments/ptq/fresh.md`"
            if fresh
            else f"; J&F of {CLIPS[1]} clips of {CLIPS[0]}, for the first run. "
            "`python -m experiments.ptq.table > experiments/ptq/table.md`, some two hours of two cores."
        )
    )


if __name__ == "__main__":
    main()

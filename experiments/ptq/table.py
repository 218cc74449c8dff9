"""Measures how much mask quality each quantization technique recovers for the demo model. Each row adds one technique
to the row before; experiments/nano_*.yaml have rows of their own where they are other combinations.

python -m experiments.ptq.table > experiments/ptq/table.md

An interrupted run is continued by the same command: each finished run is a line of runs.jsonl, which also holds a
fingerprint of the weights. Names of grids as arguments make only their rows, so that two processes can share the work.
With --kept nothing is run and the table is printed from runs.jsonl.
With `fresh` only the RTN rows and those of the configs are made, on scenes that were not used to choose the configs:
fresh.md.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.checkpoint import load_checkpoint
from experiments.measured import Runs, measure
from sam2jq import build
from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.config import loader
from sam2jq.config.quant import GptqConfig, LowRankConfig, QuantConfig, RotationConfig, SmoothConfig, SmoothSection
from sam2jq.config.run import CacheConfig
from sam2jq.data import find_images, preprocess, read_image
from sam2jq.ptq.pipeline import quantize_params
from sam2jq.quant.leaves import materialize_params

GRIDS = ("w8a8", "w4a16", "w4a8", "w4a4", "w3a16", "w2a16")  # of experiments/nano_*.yaml
SEEDS = (7, 8, 9)  # of the calibration scenes; the table shows medians over these
CALIBRATED, IMAGES, CLIPS = 32, ("scenes:1001", 48), ("scenes:2002", 4)  # held out
LEFT_OUT = ("+ smoothing", "+ rotation", "+ low rank 8")  # not tried where bits go by masks
FRESH = ("scenes:4004", 48)  # the configs were chosen on the first 32 of IMAGES


def rows(quant: QuantConfig) -> dict[str, QuantConfig]:
    """{name: config} of the rows, each with one technique more than the row before."""
    plain = replace(quant.wgts, target_bits=None, kernel_gptq=None, low_rank=None, ridge=0.0, bias_correction=False)
    plain, ipts = replace(plain, bits_by="outputs"), replace(quant.ipts, target_bits=None)
    config = replace(quant, wgts=plain, ipts=ipts, smooth=SmoothSection(), rotation=RotationConfig(), reconstruct=None)
    configs, target = {"RTN": config}, quant.wgts.target_bits or float(quant.wgts.dtype[-1])
    left_out = LEFT_OUT if quant.wgts.bits_by == "masks" else ()
    for name, change in {
        "+ GPTQ": lambda q: replace(q, wgts=replace(q.wgts, kernel_gptq=GptqConfig())),
        "+ bias correction": lambda q: replace(q, wgts=replace(q.wgts, bias_correction=True)),
        "+ smoothing": lambda q: replace(q, smooth=SmoothSection(SmoothConfig(strategy="GridSearch"))),
        "+ search of ranges": lambda q: replace(q, wgts=replace(q.wgts, kernel_gptq=quant.wgts.kernel_gptq)),
        "+ bits by layer": lambda q: replace(q, wgts=replace(q.wgts, target_bits=target)),
        "+ these by masks": lambda q: replace(q, wgts=quant.wgts),
        "+ reconstruction": lambda q: replace(q, reconstruct=quant.reconstruct),
        "+ bits of inputs by layer": lambda q: replace(q, ipts=quant.ipts),
        "+ rotation": lambda q: replace(q, rotation=RotationConfig(["hadamard"])),
        "+ low rank 8": lambda q: replace(q, wgts=replace(q.wgts, low_rank=LowRankConfig(rank=8, num_iters=10))),
    }.items():
        if name not in left_out and (changed := change(config)) != config:
            configs[name] = config = changed
    if (
        quant.wgts.dtype[-1] == "8"
    ):  # no layer can have more bits, and nothing is lost that other techniques could recover
        return dict(list(configs.items())[:4])
    if quant not in configs.values():
        configs["as configured"] = quant
    return configs


def main() -> None:
    model, arguments = build("nano"), sys.argv[1:]
    print_only, fresh = "--kept" in arguments, "fresh" in arguments
    images = FRESH if fresh else IMAGES
    grids = [name for name in arguments if name not in ("--kept", "fresh")] or GRIDS
    use_compilation_cache(CacheConfig())
    full = materialize_params(load_checkpoint("demo", model).params)
    runs = Runs(Path(__file__).with_name("runs.jsonl"))

    def get_scores(name: str, make: Callable[[], dict], clips: bool) -> dict[str, float] | None:
        """The scores of a run, made if it is missing, None with --kept; clips: whether to score clips too (slow)."""
        run = f"fresh {name}" if fresh else name
        if run not in runs and (name == "full" or not print_only):
            runs.add(run, {"scores": measure(model, make(), images, CLIPS if clips and not fresh else None)})
        return runs[run]["scores"] if run in runs else None

    def quantize(config: QuantConfig, seed: int) -> dict:
        size, names = model.variant.image_size, find_images(f"scenes:{seed}", CALIBRATED, 0)
        clips = lambda n, step=1: (preprocess(read_image(name), size)[None] for name in names[n::step])
        store = Path("cache/sam2/calibration"), names
        needs = ("gram", "tokens")  # the statistics that any row needs, so that all rows share one calibration
        *_, params = quantize_params(
            model, full, config, clips, seed=seed, needs=needs, cache=store
        ).params_by_stage.values()
        return params

    configs = {grid: loader.load(f"experiments/nano_{grid}.yaml", []).quant for grid in grids}
    every = {(grid, name): config for grid in grids for name, config in rows(configs[grid]).items()}
    outer = {row for row, config in every.items() if row[1] == "RTN" or config == configs[row[0]]}
    selected = {row: config for row, config in every.items() if not fresh or row in outer}
    reference = get_scores("full", lambda: full, True)
    order = sorted(itertools.product(SEEDS, selected), key=lambda run: (run[0] > SEEDS[0]) * (2 - (run[1] in outer)))
    scores = {row: [] for row in selected}
    for seed, row in order:  # every row with the first seed, then first and last rows of the grids, then the others
        run = get_scores(f"{' '.join(row)} {seed}", partial(quantize, selected[row], seed), seed == SEEDS[0])
        if run:
            scores[row].append(run)

    columns = ["box", "1 click", "3 clicks", "J&F"][: 3 + (not fresh)]
    cells = " | ".join(f"{reference[c]:.1f}" for c in columns)
    print(f"| weights, inputs | | runs | bits a weight | box mIoU | {' | '.join(columns[1:])} |")
    print(f"|{'---|' * (4 + len(columns))}")
    print(f"| float32 | | | 32 | {cells} |")
    for (grid, name), results in scores.items():
        if results:
            change = [statistics.median(run[c] for run in results if c in run) - reference[c] for c in columns]
            text = " | ".join(f"{x:+.1f}" for x in change)
            print(f"| {grid.upper()} | {name} | {len(results)} | {results[0]['bits']:.2f} | {text} |")
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

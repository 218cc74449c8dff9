"""Measures how much mask quality distillation recovers for the demo model: after rounding to nearest, after
post-training quantization, and while bits are lowered step by step.

python -m experiments.cdpq.table > experiments/cdpq/table.md

An interrupted run is continued by the same command: each finished run is a line of runs.jsonl, which also holds a
fingerprint of the weights. Names of rows as arguments make only these rows, so that two processes can share the work.
With --kept nothing is run and the table is printed from runs.jsonl. curves.png shows the validation losses.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt

from converters.checkpoint import load_checkpoint
from experiments.measured import Runs, measure
from sam2jq import build
from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.cli.distill import quantize_student
from sam2jq.cli.run_folder import stage
from sam2jq.config import loader
from sam2jq.config.distill import DataConfig, DistillConfig, DistillSection, StudentConfig, TrainConfig
from sam2jq.config.quant import InputsConfig, QuantConfig, WeightsConfig
from sam2jq.config.run import CacheConfig, ModelConfig
from sam2jq.data.loader import find_items
from sam2jq.distillation import trainer as cdpq
from sam2jq.distillation.init_student import start
from sam2jq.ptq.run import find_calibration
from sam2jq.quant.algorithms.fake_quant import to_quantized_params
from sam2jq.quant.leaves import materialize_params

SEEDS = (0, 1, 2)  # of the training scenes, scenes:11 and up, and of their order
TRAINED, IMAGES, CLIPS = 128, ("scenes:1001", 48), ("scenes:2002", 4)  # the latter two held out
FOLDER = Path("outputs/cdpq_table")
GROUPS = {"group_shapes": [[1, 64]], "scale_dtype": "bfloat16"}
PTQ = "experiments/nano_w3a16.yaml"  # the best settings found at 3 bits


def grid(dtype: str, inputs: str | None) -> dict:
    """{"wgts": config, "ipts": config} of weights and inputs of these dtypes."""
    return {"wgts": WeightsConfig(dtype=dtype, **GROUPS), "ipts": InputsConfig(dtype=inputs)}


STARTS = {
    "W4A8": grid("sint4", "uint8"),
    "W3A8": grid("sint3", "uint8"),
    "W2A16": grid("uint2", None),
    "to 3.5": grid("sint4", None),
    "to 3": grid("sint4", None),  # the same start as the one before
}
LEFT_OUT = {
    ("to 3.5", "to nearest"),
    ("to 3", "to nearest"),
    ("W4A8", "PTQ"),  # this quantization loses no quality
}
ROWS = [(name, method) for name in STARTS for method in ("to nearest", "PTQ") if (name, method) not in LEFT_OUT]
NANO = ModelConfig("nano")
FIXED = {"confidence_method": "fixed"}
LOWERED = {"impact_threshold": 3.0, "impact_budget": 1000.0, "impact_floor": 0.05, "layer_threshold": 0.3}


def config_of(name: str, seed: int, method: str) -> DistillConfig:
    """The settings of a row. A student that starts close to its teacher gets a lower learning rate."""
    lowered = name.startswith("to ")
    rate = 1e-3 if method == "to nearest" or name == "W2A16" else 1e-4
    data = DataConfig(f"scenes:{11 + seed}", "scenes:21", TRAINED, 4)
    quant = StudentConfig(**STARTS[name], min_bits=2, target_bits=float(name[3:]) if lowered else None)
    settings = DistillSection(**LOWERED if lowered else FIXED, cooldown_epochs=3, cache_teacher=True)
    train = TrainConfig(epochs=5, batch_size=4, learning_rate=rate, checkpoint_every=10**6)
    ptq = ptq_of(**STARTS[name]) if method == "PTQ" else None
    return DistillConfig(NANO, NANO, data, ptq, quant, settings, train, seed=seed)


def ptq_of(wgts: WeightsConfig, ipts: InputsConfig) -> QuantConfig:
    """The best post-training quantization to weights and inputs of these widths."""
    quant, width = loader.load(PTQ, []).quant, float(wgts.dtype[-1])
    mixed = replace(quant.wgts, dtype=wgts.dtype, target_bits=width if width > 2 else None)
    return replace(quant, wgts=mixed, ipts=ipts)


def distill_student(model, full: dict, params: dict, config: DistillConfig, folder: Path) -> tuple[dict, dict]:
    """(params after distillation, {"curve": [[step, validation loss, mean bits] after each epoch]})."""
    find = partial(find_items, seed=config.seed)
    teacher, val = cdpq.Teacher(model, full), find(config.data.val, config.data.val_samples)
    task = cdpq.make_distill_task(model, teacher, find(config.data.train, TRAINED), val, config)
    folder.mkdir(parents=True, exist_ok=True)
    show = lambda row: "val/loss" in row and print(folder.name, row["epoch"], f"{row['val/loss']:.4f}", file=sys.stderr)
    params = to_quantized_params(cdpq.distill(start(params, config), task, config, folder, show))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    curve = [[row["step"], row["val/loss"], row["train/avg_bit_width"]] for row in rows if "val/loss" in row]
    return params, {"curve": curve}


def draw_curves(runs: dict[str, dict], path: Path) -> None:
    """Writes a plot of the validation loss of every run, one color per row of the table."""
    plt.style.use("tableau-colorblind10")
    figure, (fixed, falls) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    bits = falls.twinx()
    for i, (name, method) in enumerate(ROWS):
        lowered = name.startswith("to ")
        label = f"W4A16 PTQ, lowered {name} bits" if lowered else f"{name} {method}"
        for run in filter(None, (runs.get(f"{name} {method} distilled {seed}") for seed in SEEDS)):
            steps, losses, means = zip(*run["curve"])
            style = {"color": f"C{i}", "alpha": 0.8}
            (falls if lowered else fixed).plot(steps, losses, **style, label=label)
            label = None  # one legend entry per row
            if lowered:
                bits.plot(steps, means, "--", **style)
    fixed.set(xlabel="step", ylabel="held-out loss", yscale="log", title="bits stay")
    falls.set(xlabel="step", ylabel="held-out loss", title="bits fall")
    bits.set(ylabel="mean bits a weight (dashed)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    model = build("nano")
    use_compilation_cache(CacheConfig())
    full = materialize_params(load_checkpoint("demo", model).params)

    runs = Runs(Path(__file__).with_name("runs.jsonl"))

    def run(label: str, make: Callable[[], tuple[dict, dict]], clips: bool = True) -> None:
        """Adds the scores of a model to `runs` if they are missing. make() -> (params, other results to store)."""
        if label not in runs:
            params, more = make()
            runs.add(label, {"scores": measure(model, params, IMAGES, CLIPS if clips else None)} | more)

    @cache
    def make_student(name: str, method: str) -> dict:
        if name == "to 3":
            return make_student("to 3.5", method)
        config = config_of(name, 0, method)
        if config.ptq:
            return quantize_student(model, full, config, find_calibration(config.ptq.calib, config.seed), stage)
        return to_quantized_params(start(full, config))

    def distilled(name: str, method: str, seed: int) -> tuple[dict, dict]:
        folder = FOLDER / runs.weights / f"{name} {method} {seed}"
        return distill_student(model, full, make_student(name, method), config_of(name, seed, method), folder)

    selected = [name for name in sys.argv[1:] if name != "--kept"] or STARTS
    rows = [(name, method) for name, method in ROWS if name in selected]
    if "--kept" not in sys.argv:
        run("full", lambda: (full, {}))
        for seed, (name, method) in itertools.product(SEEDS, rows):  # every row once before the second seed
            if name != "to 3":
                run(f"{name} {method}", lambda at=(name, method): (make_student(*at), {}))
            run(f"{name} {method} distilled {seed}", partial(distilled, name, method, seed), clips=seed == 0)

    columns, base = ("box", "1 click", "3 clicks", "J&F"), runs["full"]["scores"]
    print("| weights, inputs | | runs | bits a weight | box mIoU | 1 click | 3 clicks | J&F |")
    print("|---|---|---|---|---|---|---|---|")
    print("| float32 | | | 32 | " + " | ".join(f"{base[c]:.1f}" for c in columns) + " |")

    def print_row(name: str, what: str, labels: Sequence[str]) -> None:
        results, cells = [runs[label]["scores"] for label in labels if label in runs], []
        if not results:
            return
        for column in columns:
            drops = [result[column] - base[column] for result in results if column in result]
            span = f" ({min(drops):+.1f} to {max(drops):+.1f})" if len(drops) > 1 else ""
            cells.append(f"{statistics.median(drops):+.1f}{span}" if drops else "")
        bits = statistics.median(result["bits"] for result in results)
        print(f"| {name} | {what} | {len(results)} | {bits:.2f} | " + " | ".join(cells) + " |")

    for name, method in rows:
        shown, after = ("W4A16", f"lowered {name} bits") if name.startswith("to ") else (name, "distilled")
        if name != "to 3":
            print_row(shown, method, [f"{name} {method}"])
        print_row(shown, f"{method}, {after}", [f"{name} {method} distilled {seed}" for seed in SEEDS])
    draw_curves(runs, Path(__file__).with_name("curves.png"))
    print(
        "\nnano: the first row in percent, the others the change in points. "
        f"Distilled on {TRAINED} drawn scenes without their masks; where there are several runs, on other scenes in "
        f"another order, the median (range). mIoU of {IMAGES[1]} held-out images of {IMAGES[0]}; J&F of {CLIPS[1]} "
        f"clips of {CLIPS[0]}, of the first run. `python -m experiments.cdpq.table > experiments/cdpq/table.md`."
    )


if __name__ == "__main__":
    main()

"""`sam2jq distill`: CDPQ from the command line, on one process or many."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sam2jq import __version__
from sam2jq.cli.main import find_calibration, job_folder, load_model, replay, run_ptq, stage
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.quant import CalibConfig, QuantConfig
from sam2jq.config.run import Config
from sam2jq.data.loader import Item, check_disjoint, find_items, split_of
from sam2jq.distillation import trainer as cdpq
from sam2jq.distillation.history import history
from sam2jq.distillation.init_student import check_pair, collect_input_stats, start
from sam2jq.errors import UserError
from sam2jq.eval.fidelity import STAGE_IMAGES, find_ground_truth, ground_truth_id, layer_figures, measure
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.recipe import layers as all_layers
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.fake_quant import fake_quant_layers, to_quantized_params
from sam2jq.quant.leaves import materialize_params
from sam2jq.report import curves, text
from sam2jq.report.run import layer_rows, merged, save_run
from sam2jq.training.distributed import initialize_distributed, wait_for_processes
from sam2jq.training.metric_logging import metric_logger
from sam2jq.tree import fingerprint, flatten, kernels

COMPARED = 16  # held-out clips whose masks are compared at the end
log = logging.getLogger("sam2jq")


def run(config: DistillConfig, job: str, command: str) -> None:
    """Teacher + student + frames -> <output.root>/<job>/ with package, vanilla checkpoint, curves and page."""
    from converters.exports.package import load_package, save_package
    from converters.exports.vanilla import save_vanilla

    initialize_distributed(config.distributed)
    if jax.process_index():
        log.setLevel(logging.WARNING)
    final, record = Path(config.output.root) / (config.output.job or job), []
    timed = partial(stage, record=record)
    with shared_run_folder(final, loader.dump(config)) as folder:
        with timed("data", f"{config.data.train}, {config.data.val}"):
            train, val = find_clips(config)
            seen = find_student_calibration(config, val)
        load = partial(load_model, cache=config.cache.root, image_size=config.data.image_size)
        (teaching, teacher), (model, checkpoint) = load(config.teacher), load(config.student)
        check_pair(teaching, model)
        known = cdpq.Teacher(teaching, materialize_params(teacher.params))
        full = known.params if teaching == model else materialize_params(checkpoint.params)
        params = quantize_student(model, checkpoint.params, config, seen, timed) if config.ptq else checkpoint.params
        begin = start(params, config, collect_input_stats(model, params, train, config.distill, stage))
        with timed("teach", f"{len(val)} held-out clips"):
            task = cdpq.make_distill_task(model, known, train, val, config)
        what = f"{len(train)} clips, {config.train.epochs} epochs, {len(fake_quant_layers(begin))} layers learn"
        watched = (
            metric_logger(config, folder),
            progress(task.steps_per_epoch * config.train.epochs, config.train.batch_size),
        )
        with timed("distill", what), watched[0] as track, watched[1] as show:
            best = cdpq.distill(begin, task, config, folder, lambda row: (track(row), show(row)))
        if jax.process_index():
            return
        names, asked = [item.frames[0] for item in val[:COMPARED]], measure_config(config, len(val))
        ground_truth, params_by_stage = (
            find_ground_truth(asked),
            {"start": to_quantized_params(begin), "distill": to_quantized_params(best)},
        )
        variants = {"full precision": full} | {
            name: materialize_weights(tree) for name, tree in params_by_stage.items()
        }
        results, errors, gallery = measure(model, variants, params_by_stage, names, ground_truth, asked, timed)
        layers = layer_figures(full, params_by_stage["distill"], {})
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = history(rows)
        with timed("write", "package.pt, vanilla.pt, curves.png"):
            config_as = loader.to_dict(config) | {"model": loader.to_dict(config.student)}
            metadata = {
                "model": loader.to_dict(config.student) | {"image_size": model.variant.image_size},
                "names": checkpoint.names,
                "checkpoint": fingerprint(full),
                "random_weights": checkpoint.random,
                "config": config_as,
                "results": results,
                "history": metrics,
                "versions": {"sam2jq": __version__} | {name: version(name) for name in ("jax", "flax", "torch")},
            }
            errors_of = {layer: row["relative_error"] for layer, row in layers.items()}
            save_package(folder / "package.pt", params_by_stage["distill"], errors_of, metadata)
            save_vanilla(folder / "vanilla.pt", params_by_stage["distill"], checkpoint.random)
            curves.plot_history(metrics).savefig(folder / "curves.png", dpi=120)
            summary = load_package(folder / "package.pt").summary()
        metrics = summary | {
            "layers": layer_rows(summary["layers"], layers, {}),
            "unquantized": [layer for layer in all_layers(full) if layer not in layers],
            "stages": [row | errors.get(row["name"], {}) for row in merged(record)],
            "stage_images": min(STAGE_IMAGES, len(names)),
            "images_id": fingerprint({}, names),
            "truth_id": ground_truth_id(ground_truth),
            "asked": config_as,
            "command": command,
            "history": metrics,
        }
        save_run(folder, metrics, gallery)
        log.info("\n%s", text.totals(summary))
    log.info("\nwritten     %s (all layers: sam2jq inspect %s; curves: %s)", final, final, final / "curves.png")
    log.info("report      %s", final / "report.html")


def find_student_calibration(config: DistillConfig, val: list[Item]) -> tuple[list[Item], list[str]] | None:
    """What `ptq` calibrates on, as `find_calibration` gives it. ValueError: held-out clips, or several processes."""
    if config.ptq is None:
        return None
    if jax.process_count() > 1:
        raise UserError("ptq runs in one process: run quantize first, and give its package as student.checkpoint")
    found = find_calibration(config.ptq.calib, config.seed)
    check_disjoint(found[0], val, "ptq.calib.path")
    return found


def quantize_student(model: SAM2, params: dict, config: DistillConfig, seen: tuple, on_stage: Callable) -> dict:
    """`params` quantized as `ptq` says, calibrated on what was `seen`.

    ValueError: they are quantized already; and all that quantize raises.
    """
    if any(not isinstance(kernel, jax.Array | np.ndarray) for kernel in kernels(flatten(params)).values()):
        raise UserError(f"ptq: {config.student.checkpoint} is quantized already: leave ptq out")
    return run_ptq(model, params, replay(config.ptq), seen, config, on_stage).params


def measure_config(config: DistillConfig, held_out: int) -> Config:
    """The settings under which `quantize` would measure the student; images are those of validation."""
    calib = CalibConfig(config.data.val, held_out)
    quant = QuantConfig(calib, config.quant.wgts, config.quant.ipts)
    return Config(config.student, quant=quant, measure=config.measure, seed=config.seed)


@contextmanager
def shared_run_folder(final: Path, resumes: str) -> Iterator[Path]:
    """`job_folder` of process 0, for all processes."""
    if jax.process_index() == 0:
        with job_folder(final, resumes) as folder:
            wait_for_processes("folder")
            yield folder
    else:
        wait_for_processes("folder")
        yield final.with_name(f".{final.name}.partial")


def find_clips(config: DistillConfig) -> tuple[list[Item], list[Item]]:
    """The clips to learn from and to validate on. ValueError: they overlap, or do not fill a batch."""
    data, batch = config.data, config.train.batch_size
    find = partial(find_items, seed=config.seed, frames=data.frames, stride=data.stride)
    train = find(split_of(data.train, "sav_train"), data.train_samples)
    val = find(split_of(data.val, "sav_val"), data.val_samples)
    check_disjoint(train, val)
    for key, items in {"data.train": train, "data.val": val}.items():
        if len(items) < batch:
            raise UserError(
                f"{key} holds {len(items)} clips, which do not fill a batch of {batch}: give more data, or lower "
                "train.batch_size"
            )
    if batch % jax.device_count():
        raise UserError(f"train.batch_size {batch} cannot be split evenly over {jax.device_count()} devices")
    return train, val


@contextmanager
def progress(steps: int, batch: int) -> Iterator[Callable[[dict], None]]:
    """A function that shows a row's loss and bits on a line with images/s and the time left."""
    if jax.process_index():
        yield lambda row: None
        return
    with tqdm(total=steps * batch, unit="image", leave=False, disable=None) as bar:

        def show(row: dict) -> None:
            bar.update(row["step"] * batch - bar.n)
            if "train/loss" in row:
                bar.set_postfix(loss=f"{row['train/loss']:.4g}")
            else:
                lowered = (
                    f", {row['quant/updated_layers']} of {row['quant/candidates']} layers" if "decisions" in row else ""
                )
                log.info(
                    "epoch %-5d validation loss %.4g, %.2f bits%s",
                    row["epoch"], row["val/loss"], row["train/avg_bit_width"], f"{lowered} lowered" * bool(lowered),
                )  # fmt: skip

        yield show

"""`sam2jq distill`: CDPQ, in one process or several."""

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sam2jq.api import replay_bits
from sam2jq.cli.arguments import add_config, command_line
from sam2jq.cli.finish import MeasuredRun, finish_run, run_metadata
from sam2jq.cli.loading import (
    configure_jax,
    load_checkpoint_of,
    require_memory,
    resolved,
    with_image_size,
)
from sam2jq.cli.processes import joined_processes, shared_job_folder
from sam2jq.cli.run_folder import job_path, stage
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.quant import CalibConfig, QuantConfig
from sam2jq.config.run import Config
from sam2jq.data.loader import Item, check_disjoint, find_items, split_of
from sam2jq.distillation import trainer as cdpq
from sam2jq.distillation.history import history
from sam2jq.distillation.init_student import check_pair, collect_input_stats, start
from sam2jq.errors import UserError, section
from sam2jq.eval.fidelity import find_ground_truth, ground_truth_id, layer_errors, measure
from sam2jq.models.precision import float_dtype
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.recipe import rounding_name
from sam2jq.ptq.run import CalibrationImages, find_calibration, run_ptq
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.fake_quant import fake_quant_layers, to_quantized_params
from sam2jq.quant.leaves import materialize_params
from sam2jq.report import text
from sam2jq.training.metric_logging import metric_logger
from sam2jq.tree import fingerprint, flatten, kernels

SCHEMA = DistillConfig
COMPARED = 16  # held-out clips whose first frames are measured at the end
Splits = tuple[list[Item], list[Item], CalibrationImages | None]  # train, val, ptq's calibration
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, ", such as --train.epochs 5")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Distills a teacher into a quantized student and writes <output.root>/<job>/."""
    config = loader.load(args.config, flags, DistillConfig)
    if config.ptq:
        with section("ptq"):
            rounding_name(config.ptq.wgts)
    key, device = device_setting(config)
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # training runs on all devices of jax's first platform
    final = job_path(config.output, args.config, "distill")
    with joined_processes(config.distributed, device):
        configure_jax(device, config.cache, key)
        with shared_job_folder(final, loader.dump(config), resumable=True) as folder:
            distill(config, folder, command_line(args, flags))
    log.info("\nwritten     %s (all layers: sam2jq inspect %s; curves: %s)", final, final, final / "curves.png")
    log.info("report      %s", final / "report.html")


def device_setting(config: DistillConfig) -> tuple[str, str]:
    """(key, device) of the one device that teacher and student share. Raises UserError if they name two."""
    named = {f"{key}.device": getattr(config, key).device for key in ("teacher", "student")}
    chosen = {key: device for key, device in named.items() if device != "auto"}
    if len(set(chosen.values())) > 1:
        both = " and ".join(f"{key} {device}" for key, device in chosen.items())
        raise UserError(f"{both}: teacher and student run on one device: give both the same, or set only one")
    return next(iter(chosen.items()), ("teacher.device", "auto"))


def distill(config: DistillConfig, folder: Path, command: str) -> None:
    """Loads both models, trains the student, measures it, and in process 0 writes the files of a run."""
    record = []
    timed = partial(stage, record=record)
    with timed("data", f"{config.data.train}, {config.data.val}"):
        train, val = find_clips(config)
        splits = train, val, find_student_calibration(config, val)
    (teacher_model, teacher_source), (model, source) = load_pair(config)
    check_pair(teacher_model, model)
    teacher = cdpq.Teacher(teacher_model, materialize_params(teacher_source.params), float_dtype(config.teacher.dtype))
    full = teacher.params if teacher_model == model else materialize_params(source.params)
    begin, best = train_student(config, folder, teacher, model, source.params, splits, timed)
    params_by_stage = {"start": to_quantized_params(begin), "distill": to_quantized_params(best)}
    measure_and_write(config, folder, command, model, source, full, params_by_stage, val, timed)


def load_pair(config: DistillConfig):
    """((SAM2, Checkpoint) of the teacher, that of the student).

    Both have the image size of the config; where it says nothing, that of the one file that holds its size.
    """
    sides = {"teacher": config.teacher, "student": config.student}
    size = config.data.image_size or config.teacher.image_size or config.student.image_size
    pair = [load_checkpoint_of(side, size) for side in sides.values()]
    for name, (_, checkpoint) in zip(sides, pair):
        require_memory(checkpoint, f"the {name}, which also tracks objects")
    known = [checkpoint.image_size for _, checkpoint in pair if checkpoint.image_size]
    if size is None and len(known) == 1:
        pair = [(with_image_size(model, known[0]), checkpoint) for model, checkpoint in pair]
    return pair


def train_student(
    config: DistillConfig, folder: Path, teacher, model: SAM2, params: dict, splits: Splits, on_stage: Callable
) -> tuple[dict, dict]:
    """The student's params tree with fake-quantized weights before training, and the best one of training."""
    train, val, images = splits
    if images is not None:
        params = quantize_student(model, params, config, images, on_stage)
    begin = start(params, config, collect_input_stats(model, params, train, config.distill, stage))
    with on_stage("teach", f"the teacher's outputs on {len(val)} held-out clips"):
        task = cdpq.make_distill_task(model, teacher, train, val, config)
    steps = task.steps_per_epoch * config.train.epochs
    what = f"{len(train)} clips, {config.train.epochs} epochs, {len(fake_quant_layers(begin))} quantized layers"
    with (
        on_stage("distill", what),
        metric_logger(config, folder) as send,
        progress(steps, config.train.batch_size) as show,
    ):
        best = cdpq.distill(begin, task, config, folder, lambda row: (send(row), show(row)))
    return begin, best


def measure_and_write(
    config: DistillConfig,
    folder: Path,
    command: str,
    model: SAM2,
    source,
    full: dict,
    params_by_stage: dict[str, dict],
    val: list[Item],
    timed: partial,
) -> None:
    """Compares the student before and after training with full precision; process 0 writes package, curves and page."""
    names, asked = [item.frames[0] for item in val[:COMPARED]], measure_config(config, len(val))
    ground_truth = find_ground_truth(asked)
    variants = {"full precision": full} | {name: materialize_weights(tree) for name, tree in params_by_stage.items()}
    results, errors, gallery = measure(model, variants, params_by_stage, names, ground_truth, asked, timed)
    if jax.process_index():
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = loader.to_dict(config) | {"model": loader.to_dict(resolved(config.student, model))}
    size, past = model.variant.image_size, history(rows)
    measured = MeasuredRun(
        run_metadata(settings["model"], size, source, full, settings, results, history=past),
        params_by_stage["distill"],
        full,
        layer_errors(full, params_by_stage["distill"], {}),
        errors,
        gallery,
        timed.keywords["record"],
        names,
        images_id=fingerprint({}, names),
        truth_id=ground_truth_id(ground_truth),
        asked=settings,
        command=command,
    )
    metrics = finish_run(folder, measured, exports(params_by_stage["distill"], source, past, settings["model"]), timed)
    log.info("\n%s", text.totals(metrics.to_dict()))


def exports(params: dict, source, past: dict, about: dict) -> dict[str, Callable[[Path], None]]:
    """{file name: function that writes it into a folder}, of the files beside the package."""
    from converters.exports.vanilla import save_vanilla
    from sam2jq.report import curves  # here, since it imports matplotlib, which takes half a second

    return {
        "vanilla.pt": lambda folder: save_vanilla(folder / "vanilla.pt", params, source.random, about),
        "curves.png": lambda folder: curves.plot_history(past).savefig(folder / "curves.png", dpi=120),
    }


def find_student_calibration(config: DistillConfig, val: list[Item]) -> CalibrationImages | None:
    """The clips that `ptq` calibrates on; None without `ptq`.

    Raises UserError if they share frames with `val`, or if there are several processes.
    """
    if config.ptq is None:
        return None
    if jax.process_count() > 1:
        raise UserError("ptq runs in one process: run quantize first, and give its package as student.checkpoint")
    images = find_calibration(config.ptq.calib, config.seed)
    check_disjoint(images.items, val, "ptq.calib.path")
    return images


def quantize_student(
    model: SAM2, params: dict, config: DistillConfig, images: CalibrationImages, on_stage: Callable
) -> dict:
    """Returns `params` quantized as `config.ptq` says, calibrated on `images`.

    Raises UserError if `params` are quantized already, and whatever quantize raises, with keys under ptq.
    """
    if any(not isinstance(kernel, jax.Array | np.ndarray) for kernel in kernels(flatten(params)).values()):
        raise UserError(f"ptq: {config.student.checkpoint} is quantized already: leave ptq out")
    where = {"key": "ptq", "seed": config.seed, "cache_root": config.cache.root}
    return run_ptq(model, params, replay_bits(config.ptq), images, **where, on_stage=on_stage).params


def measure_config(config: DistillConfig, held_out: int) -> Config:
    """The settings with which `quantize` would measure the student; its images are those of validation."""
    calib = CalibConfig(config.data.val, held_out)
    quant = QuantConfig(calib, config.quant.wgts, config.quant.ipts)
    return Config(config.student, quant=quant, measure=config.measure, seed=config.seed)


def find_clips(config: DistillConfig) -> tuple[list[Item], list[Item]]:
    """The clips to train and to validate on.

    Raises UserError if they share frames, or are too few for a batch, or a batch does not fit the devices.
    """
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
    """A function that shows a row of metrics.jsonl: on a progress bar, or at the end of an epoch as a log line."""
    if jax.process_index():
        yield lambda row: None
        return
    with tqdm(total=steps * batch, unit="image", leave=False, disable=None) as bar:

        def show(row: dict) -> None:
            bar.update(row["step"] * batch - bar.n)
            if "train/loss" in row:
                bar.set_postfix(loss=f"{row['train/loss']:.4g}")
            else:
                log.info("epoch %-5d %s", row["epoch"], epoch_summary(row))

        yield show


def epoch_summary(row: dict) -> str:
    """The validation loss and bits of a row, and how many layers lost a bit, if any were tried."""
    summary = f"validation loss {row['val/loss']:.4g}, {row['train/avg_bit_width']:.2f} bits"
    if "decisions" not in row:
        return summary
    return f"{summary}, {row['quant/updated_layers']} of {row['quant/candidates']} layers lowered"

"""Confidence-driven progressive quantization (CDPQ): a student learns from its teacher while its layers lose bits.

The train step and the evaluation of bits are compiled once each, because bits are arrays, not constants.

Letters: L fake-quantized layers, n bit assignments, B examples a batch.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from sam2jq.config.distill import DistillConfig, TrainConfig
from sam2jq.data.loader import Item, order
from sam2jq.distillation.bit_trials import average_bits, evaluate_bits, layer_sizes, lower_bits, make_bits_evaluator
from sam2jq.distillation.losses import PARTS, distillation_loss
from sam2jq.distillation.schedule import Schedule, init_schedule, observe
from sam2jq.distillation.target_cache import CODE, Teacher, make_target_batches
from sam2jq.distillation.targets import DistillBatch
from sam2jq.errors import UserError
from sam2jq.files import code_fingerprint
from sam2jq.models.precision import float_dtype
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.fake_quant import (
    bits_of,
    fake_quant_layers,
    stop_gradient_where,
    trainable_mask,
    with_bits,
)
from sam2jq.training.ema import averaged_params, ema
from sam2jq.training.loop import Hooks, fit
from sam2jq.training.metric_logging import Row, open_metrics_file
from sam2jq.training.state import TrainState, init_state
from sam2jq.training.step import make_train_step
from sam2jq.tree import fingerprint

Array = jax.Array


class DistillState(NamedTuple):
    """What a killed run is resumed from.

    best: the student with the lowest validation loss at the lowest mean bits; stale: epochs since. These four are in
    host memory, where to look at them waits for no step.
    """

    train: TrainState
    schedule: Schedule
    best: dict
    best_loss: np.ndarray
    best_bits: np.ndarray
    stale: np.ndarray


class DistillTask(NamedTuple):
    """What a student learns.

    loss: as `distillation_loss` makes it; batches(n): iterator over the batches of steps n + 1, n + 2, ..., this
    process' share of each; val_batches: held-out batches, all of each in every process.
    """

    loss: Callable
    batches: Callable[[int], Iterator[DistillBatch]]
    val_batches: Sequence[DistillBatch]
    steps_per_epoch: int


class Run(NamedTuple):
    """The constants of one call of `distill`. names, sizes: of the L layers, sizes in weights [L]."""

    task: DistillTask
    config: DistillConfig
    bits_evaluator: Callable
    names: list[str]
    sizes: np.ndarray


def make_distill_task(
    model: SAM2, teacher: Teacher, train: Sequence[Item], val: Sequence[Item], config: DistillConfig
) -> DistillTask:
    """The task of learning from `teacher` on the clips `train`, validated on the clips `val`."""
    settings, batch_size, seed = config.distill, config.train.batch_size, config.seed
    key = settings.prompts, settings.objects, config.data.frames, config.data.stride, seed, teacher.dtype
    name = fingerprint(teacher.params, code_fingerprint(*CODE), teacher.model, key)
    cache = Path(config.cache.root) / "targets" / name
    cache = cache if settings.cache_teacher else None
    make_batches = make_target_batches(teacher, settings, seed, cache)
    train_batches, val_batches = make_batches(train), make_batches(val)
    val_indices = np.arange(len(val) // batch_size * batch_size).reshape(-1, batch_size)
    weights = {part: getattr(settings, part) for part in PARTS}
    student = model.clone(remat=config.train.remat)
    return DistillTask(
        distillation_loss(student, weights, float_dtype(config.student.dtype), settings.layers > 0),
        lambda first: train_batches(order(len(train), batch_size, seed, first)),
        [multihost_utils.process_allgather(batch, tiled=True) for batch in val_batches(iter(val_indices))],
        len(train) // batch_size,
    )


def make_optimizer(config: TrainConfig, steps: int, trainable: dict) -> optax.GradientTransformation:
    """AdamW with clipped gradients for a run of `steps` steps. trainable: a tree of bool; other leaves stay fixed."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup_steps, updates // 2)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, updates)
    else:
        rate = optax.linear_schedule(0, config.learning_rate, warmup)
    adamw = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(rate, weight_decay=config.weight_decay)
    )
    chain = optax.chain(
        optax.flatten(adamw),  # one long vector: hundreds of arrays would make a third of the step's compile time
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda is_trainable: not is_trainable, trainable)),
        *[ema(config.ema)] * (config.ema > 0),
    )
    return optax.MultiSteps(chain, config.accumulate) if config.accumulate > 1 else chain


def distill(
    student: dict,
    task: DistillTask,
    config: DistillConfig,
    folder: Path,
    log_fn: Callable[[Row], None] = lambda row: None,
) -> dict:
    """The student with the lowest validation loss at the lowest mean bits. `student` is fake-quantized.

    folder: gets checkpoints/, from which a killed run is resumed and ends at the same bits, and metrics.jsonl, each row
    of which is also passed to `log_fn`. Raises UserError if a loss is not finite; it names the step and the layer.
    """
    train = config.train
    last_step = task.steps_per_epoch * train.epochs
    loss, optimizer = make_student_loss(student, task.loss, config, last_step)
    step = make_train_step(loss, optimizer, train.parallel)
    run = Run(task, config, make_bits_evaluator(task.loss), fake_quant_layers(student), layer_sizes(student))
    state = fit(
        partial(step_and_observe, step),
        init_distill_state(student, optimizer, config),
        task.batches,
        last_step,
        folder / "checkpoints",
        make_hooks(run, folder, log_fn),
    )
    return state.best


def make_student_loss(
    student: dict, loss: Callable, config: DistillConfig, last_step: int
) -> tuple[Callable, optax.GradientTransformation]:
    """`loss` without gradients of what stays fixed in `student`, and the optimizer of the rest."""
    trainable = trainable_mask(student, config.quant.learn_clipping)
    frozen = jax.tree.map(operator.not_, trainable)
    trained_loss = lambda params, batch, key: loss(stop_gradient_where(params, frozen), batch)
    return trained_loss, make_optimizer(config.train, last_step, trainable)


def init_distill_state(student: dict, optimizer: optax.GradientTransformation, config: DistillConfig) -> DistillState:
    """The state before the first step. The student is copied, because the train step donates its arrays."""
    host = jax.device_get(student)
    return DistillState(
        init_state(jax.device_put(host), optimizer, config.seed),
        init_schedule(bits_of(student), config.distill.window),
        host,
        np.array(np.inf, np.float32),
        np.array(np.inf, np.float32),
        np.array(0, np.int32),
    )


def step_and_observe(step: Callable, state: DistillState, batch: DistillBatch) -> tuple[DistillState, dict[str, Array]]:
    """`state` after one step, and its metrics: the loss, its parts, and "layers" [L]."""
    train, metrics = step(state.train, batch)
    layers = metrics["layers"]
    metrics = metrics["parts"] | {"loss": metrics["loss"], "layers": layers}
    return state._replace(train=train, schedule=observe(state.schedule, layers)), metrics


def make_hooks(run: Run, folder: Path, log_fn: Callable[[Row], None]) -> Hooks:
    """Hooks that write metrics.jsonl, and that validate and lower bits at the end of each epoch."""
    train, steps_per_epoch = run.config.train, run.task.steps_per_epoch
    pending, log = [], None
    is_save_step = lambda step: step % steps_per_epoch == 0 or step % train.checkpoint_every == 0

    def on_start(first: int, state: DistillState) -> DistillState:
        nonlocal log
        log = open_metrics_file(folder / "metrics.jsonl", first or -1, log_fn)
        if first == 0:  # The rounded student is the first candidate for the best one.
            state, row = validate(run, state)
            log({"step": 0, "epoch": 0} | row | bits_row(run, state.schedule.bits))
        return state

    def after_step(step: int, state: DistillState, metrics: dict) -> DistillState:
        epoch, rest = divmod(step, steps_per_epoch)
        pending.append(metrics)
        if is_save_step(step) or step % train.log_interval == 0:
            log({"step": step, "epoch": epoch} | mean_metrics(pending, step, run.names, folder))
            pending.clear()
        if rest == 0:
            state, row = end_epoch(run, state, epoch)
            log({"step": step, "epoch": epoch} | row)
        return state

    return Hooks(after_step, on_start, is_save_step, lambda state: state.stale >= (train.patience or np.inf))


def mean_metrics(rows: list[dict[str, Array]], last_step: int, names: Sequence[str], folder: Path) -> Row:
    """The means of the metrics of consecutive steps up to `last_step`. Raises UserError if a loss is not finite."""
    rows = jax.device_get(rows)
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        if not np.isfinite(row["loss"]):
            wrong = np.flatnonzero(~np.isfinite(row["layers"]))
            where = f"layer {names[wrong[0]]}" if len(wrong) else "no layer"
            raise UserError(
                f"the loss is {row['loss']} at step {step}, first in {where}: lower train.learning_rate; "
                f"{resume_hint(folder)}"
            )
    return {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}


def resume_hint(folder: Path) -> str:
    """Where the same command would start after a failure: at the latest checkpoint, if there is one."""
    if any((folder / "checkpoints").glob("[0-9]*")):
        return "the last good checkpoint is kept, and the same command goes on from it"
    return "there is no checkpoint yet, so the same command starts over"


def student_params(state: TrainState) -> dict:
    """The params that are validated and written: the moving average if the optimizer keeps one, at the current bits."""
    return with_bits(averaged_params(state.opt_state, state.params), bits_of(state.params))


def validate(run: Run, state: DistillState) -> tuple[DistillState, Row]:
    """`state` with the current student as the best one if it is better, and the validation losses.

    Better is fewer mean bits, and a lower loss at the same mean bits.
    """
    params, bits = student_params(state.train), np.asarray(state.schedule.bits)
    (loss,), parts = evaluate_bits(run.bits_evaluator, params, bits[None], run.task.val_batches)
    mean = average_bits(bits, run.sizes)
    if (round(mean, 6), loss) < (round(float(state.best_bits), 6), float(state.best_loss)):
        best = jax.device_get(params)
        state = state._replace(best=best, best_loss=np.float32(loss), best_bits=np.float32(mean), stale=np.int32(0))
    else:
        state = state._replace(stale=state.stale + 1)
    return state, {"val/loss": float(loss)} | {f"val/{name}": float(value) for name, value in parts.items()}


def end_epoch(run: Run, state: DistillState, epoch: int) -> tuple[DistillState, Row]:
    """`state` after validation and, before the cooldown epochs, after lowering bits; and the row of the log."""
    state, row = validate(run, state)
    settings, last_epoch = run.config.distill, run.config.train.epochs - run.config.distill.cooldown_epochs
    if settings.confidence_method in ("baseline", "variance") and epoch <= last_epoch:
        evaluate = lambda bits: evaluate_bits(
            run.bits_evaluator, student_params(state.train), bits, run.task.val_batches
        )[0]
        schedule, decisions = lower_bits(
            state.schedule, run.names, run.sizes, row["val/loss"], evaluate, settings, run.config.quant
        )
        params = with_bits(state.train.params, schedule.bits)
        state = state._replace(schedule=schedule, train=state.train._replace(params=params))
        row |= decisions_row(decisions)
    return state, row | bits_row(run, state.schedule.bits)


def bits_row(run: Run, bits: Array) -> Row:
    """The bits of all layers as metrics.jsonl holds them."""
    bits = np.asarray(bits)
    return {
        "train/avg_bit_width": average_bits(bits, run.sizes),
        "bits": dict(zip(run.names, bits.astype(int).tolist())),
    }


def decisions_row(decisions: Sequence) -> Row:
    """The decisions of one epoch as metrics.jsonl holds them."""
    accepted = sum(decision.accepted for decision in decisions)
    return {
        "quant/candidates": len(decisions),
        "quant/updated_layers": accepted,
        "quant/accept_rate": accepted / max(len(decisions), 1),
        "quant/mean_increase": float(np.mean([decision.impact for decision in decisions])) if decisions else 0.0,
        "decisions": [decision._asdict() for decision in decisions],
    }

"""Confidence-driven progressive quantization: a student learns from its teacher while its layers lose bits.

One step, one validation and one trial of a candidate are each a program that is compiled once: bits are data.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sam2jq.config.distill import DistillConfig, DistillLossConfig, TrainConfig
from sam2jq.data.loader import Item, order, prefetched, read_item
from sam2jq.distillation.schedule import (
    Decision,
    Schedule,
    candidates,
    confident_layers,
    init_schedule,
    observe,
    reduce_bits,
)
from sam2jq.distillation.targets import PARTS, DistillBatch, distillation_loss, make_targets
from sam2jq.errors import UserError
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.calibration import fingerprint
from sam2jq.quant.algorithms.fake_quant import (
    FakeQuant,
    base_weight,
    bits_of,
    fake_quant_layers,
    stop_gradient_where,
    trainable_mask,
    with_bits,
)
from sam2jq.training.step import EmaState, TrainState, aot_compile, devices, ema, init_state, make_train_step
from sam2jq.tree import flatten, kernels, under

Array = jax.Array
Row = dict[str, object]  # of metrics.jsonl


class Progress(NamedTuple):
    """All that a killed run goes on from. best: the student that validated best at the lowest mean bits, in the host's
    memory; stale: epochs since."""

    train: TrainState
    schedule: Schedule
    best: dict
    best_loss: Array
    best_bits: Array
    stale: Array


class Teacher(NamedTuple):
    model: SAM2
    params: dict
    dtype: str = "float32"  # of the teacher's activations


def make_optimizer(config: TrainConfig, steps: int, marks: dict) -> optax.GradientTransformation:
    """AdamW on what `marks` says learns, with clipped gradients; `steps` of it are taken."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup_steps, updates // 2)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, updates)
    else:
        rate = optax.linear_schedule(0, config.learning_rate, warmup)
    chain = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, weight_decay=config.weight_decay),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda mark: not mark, marks)),
        *[ema(config.ema)] * (config.ema > 0),
    )
    return optax.MultiSteps(chain, config.accumulate) if config.accumulate > 1 else chain


def student_of(state: TrainState) -> dict:
    """The params to validate and to write: the average where there is one, at the bits of now."""
    found = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, EmaState))
    average = next((node.average for node in found if isinstance(node, EmaState)), state.params)
    return with_bits(average, bits_of(state.params))


def make_trials(loss: Callable) -> Callable:
    """A compiled (params, bits [n, L], lessons [B, ...]) -> losses [n] of as many assignments as there are devices, one
    on each."""
    data_sharding, replicated = devices()

    def trials(params: dict, bits: Array, batch: DistillBatch) -> tuple[Array, dict]:
        return jax.vmap(lambda one: loss(with_bits(params, one), batch))(bits)

    return aot_compile(jax.jit(trials, in_shardings=(replicated, data_sharding, replicated), out_shardings=replicated))


def try_bits(
    trials: Callable, params: dict, bits: np.ndarray, batch: Sequence[DistillBatch]
) -> tuple[np.ndarray, dict]:
    """The mean losses [n] over the batches `batch` of assignments bits [n, L], and the mean parts of the first."""
    data_sharding, replicated = devices()
    count = jax.device_count()
    padded = np.concatenate([bits, np.repeat(bits[-1:], -len(bits) % count, 0)])
    params, totals, parts = jax.device_put(params, replicated), [], []
    for i in range(0, len(padded), count):
        some = jax.device_put(padded[i : i + count], data_sharding)
        found = [trials(params, some, batch) for batch in batch]
        totals.append(np.mean([np.asarray(total) for total, _ in found], 0))
        parts = parts or [{name: float(value[0]) for name, value in metrics["parts"].items()} for _, metrics in found]
    return np.concatenate(totals)[: len(bits)], {name: np.mean([p[name] for p in parts]) for name in parts[0]}


def make_target_batches(
    teacher: Teacher, items: Sequence[Item], config: DistillLossConfig, seed: int, kept: Path | None
) -> Callable[[Iterator[np.ndarray]], Iterator[DistillBatch]]:
    """A function that yields the teacher's lessons on each batch of indices into `items`, this process' share of it.

    An item is asked the same questions whenever it comes. kept: a folder for what was answered, one file an item.
    """
    data_sharding, replicated = devices()
    size, params = teacher.model.variant.image_size, jax.device_put(teacher.params, replicated)

    def one(params: dict, frames: Array, mark: Array) -> DistillBatch:
        key = jax.random.fold_in(jax.random.key(seed), mark)
        ask = {"asked": config.prompts, "followed": config.objects}
        batch = make_targets(teacher.model, params, frames.astype(teacher.dtype), key, **ask)
        return batch._replace(frames=frames)  # the student takes frames in its own dtype

    frame = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    structure = jax.tree.structure(jax.eval_shape(one, params, frame, jnp.uint32(0))) if kept else None
    run = aot_compile(
        jax.jit(
            jax.vmap(one, (None, 0, 0)),
            in_shardings=(replicated, data_sharding, data_sharding),
            out_shardings=data_sharding,
        )
    )
    put = partial(jax.make_array_from_process_local_data, data_sharding)
    mark = lambda item: fingerprint({}, item.name, *map(modified, item.frames))

    def load(path: Path) -> DistillBatch:
        with np.load(path) as file:
            return structure.unflatten([file[str(i)] for i in range(len(file.files))])

    def read(which: np.ndarray):
        """The lessons where all are kept, else the frames [B, T, S, S, 3] to make them of."""
        files = [kept / f"{mark(items[i])}.npz" for i in which] if kept else []
        if files and all(map(Path.is_file, files)):
            return which, files, jax.tree.map(lambda *leaves: np.stack(leaves), *map(load, files))
        return which, files, np.stack([read_item(items[i], size) for i in which])

    def batches(indices: Iterator[np.ndarray]) -> Iterator[DistillBatch]:
        mine = (np.split(which, jax.process_count())[jax.process_index()] for which in indices)
        for which, files, found in prefetched(read, mine):
            if isinstance(found, np.ndarray):
                marks = np.array([zlib.crc32(items[i].name.encode()) for i in which], np.uint32)
                found = jax.tree.map(to_local, run(params, put(found), put(marks)))
                for i, file in enumerate(files):
                    keep(file, jax.tree.map(lambda leaf, i=i: leaf[i], found))
            yield found

    return batches


def modified(name: str) -> object:
    """What tells a file from one that takes its place."""
    return name if name.startswith("scenes:") else (os.path.getsize(name), os.path.getmtime(name))


def keep(path: Path, lesson: DistillBatch) -> None:
    """Writes a lesson, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(lesson))})


def to_local(x: Array) -> np.ndarray:
    """The rows of a split array that lie on this process' devices."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


class DistillTask(NamedTuple):
    """What a student learns from.

    loss: as `distillation_loss` makes it; batches(first): lessons of the steps after the first so many; exam: batches
    of held-out lessons, whole in every process; epoch: steps.
    """

    loss: Callable
    batches: Callable[[int], Iterator[DistillBatch]]
    val_batches: Sequence[DistillBatch]
    steps_per_epoch: int


def make_distill_task(
    model: SAM2, teacher: Teacher, train: Sequence[Item], val: Sequence[Item], config: DistillConfig
) -> DistillTask:
    """The lessons of a teacher on items that share no frame."""
    ask, batch, seed = config.distill, config.train.batch_size, config.seed
    about = ask.prompts, ask.objects, config.data.frames, config.data.stride, seed
    kept = Path(config.cache.root) / "lessons" / fingerprint(teacher.params, teacher.model, teacher.dtype, about)
    taught = partial(make_target_batches, teacher, config=ask, seed=seed, kept=kept if ask.cache_teacher else None)
    learned, held_out = taught(train), taught(val)
    replicated = np.arange(len(val) // batch * batch).reshape(-1, batch)
    learner = model.clone(remat=config.train.remat)
    return DistillTask(
        distillation_loss(learner, {part: getattr(ask, part) for part in PARTS}, config.student.dtype, ask.layers > 0),
        lambda first: learned(order(len(train), batch, seed, first)),
        [multihost_utils.process_allgather(batch, tiled=True) for batch in held_out(iter(replicated))],
        len(train) // batch,
    )


def distill(
    student: dict,
    task: DistillTask,
    config: DistillConfig,
    folder: Path,
    log_fn: Callable[[Row], None] = lambda row: None,
) -> dict:
    """The params that validated best at the lowest mean bits, of a `student` as fake_quant.student makes it.

    folder: holds checkpoints, from which a killed run goes on to the very same end, and metrics.jsonl, whose rows
    tell(row) gets too. ValueError: a loss is not finite; the step and the layer are named.
    """
    train, names = config.train, fake_quant_layers(student)
    marks = trainable_mask(student, config.quant.learn_clipping)
    optimizer = make_optimizer(train, task.steps_per_epoch * train.epochs, marks)
    loss = lambda params, *batch: task.loss(stop_gradient_where(params, marks), *batch)
    step = make_train_step(loss, optimizer, train.parallel)
    trials, sizes = make_trials(task.loss), weights_of(student)
    finish = partial(end_epoch, trials, task.val_batches, config, names, sizes)
    state = Progress(
        init_state(jax.tree.map(jnp.copy, student), optimizer, config.seed),  # the step takes its arrays for itself
        init_schedule(bits_of(student), config.distill.window),
        jax.device_get(student),
        jnp.float32(jnp.inf),
        jnp.float32(jnp.inf),
        jnp.int32(0),
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(jax.device_get(state)))
        first, rows = int(state.train.step), []
        log = open_log(folder / "metrics.jsonl", first or -1, log_fn)
        if first == 0:  # what rounding alone does; the end is never worse, unless it has fewer bits
            state, row = validate(trials, task.val_batches, sizes, state)
            log({"step": 0, "epoch": 0} | row | bits_row(np.asarray(state.schedule.bits), names, sizes))
        numbers = range(first + 1, task.steps_per_epoch * train.epochs + 1)
        for number, batch in zip(numbers, task.batches(first)):
            state, row = train_and_observe(step, state, batch, names)
            rows.append(row)
            place = {"step": number, "epoch": number // task.steps_per_epoch}
            ends, saves = number % task.steps_per_epoch == 0, number % train.checkpoint_every == 0
            if ends or saves or number % train.log_interval == 0:
                log(place | summary(rows, number, names))
                rows = []
            if ends:
                state, row = finish(state, number // task.steps_per_epoch)
                log(place | row)
            if ends or saves:
                manager.save(number, args=ocp.args.StandardSave(jax.device_get(state)))
            if state.stale >= (train.patience or np.inf):
                break
    return state.best


def train_and_observe(
    step: Callable, state: Progress, batch: DistillBatch, names: Sequence[str]
) -> tuple[Progress, dict[str, Array]]:
    """`state` after a step, and what is known of it; a layer that the teacher has no like of goes by the features."""
    train, metrics = step(state.train, batch)
    losses = jnp.stack([metrics["layers"].get(name, metrics["parts"]["features"]) for name in names])
    metrics = metrics["parts"] | {"loss": metrics["loss"], "layers": losses}
    return state._replace(train=train, schedule=observe(state.schedule, losses)), metrics


def weights_of(student: dict) -> np.ndarray:
    """[L]: how many weights each of the `learning` layers has."""
    parts = map(base_weight, kernels(flatten(student)).values())
    return np.array([part.kernel.size for part in parts if isinstance(part, FakeQuant)])


def summary(rows: list[dict[str, Array]], number: int, names: Sequence[str]) -> Row:
    """The means over the last steps, of which `number` is the last. ValueError: a loss is not finite."""
    rows = jax.device_get(rows)
    for at, row in enumerate(rows, number - len(rows) + 1):
        if not np.isfinite(row["loss"]):
            wrong = np.flatnonzero(~np.isfinite(row["layers"]))
            where = f"layer {names[wrong[0]]}" if len(wrong) else "no layer"
            raise UserError(
                f"the loss is {row['loss']} at step {at}, first in {where}: lower train.learning_rate; the last good "
                "checkpoint is kept, and the same command goes on from it"
            )
    return {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}


def average(bits: Array, sizes: np.ndarray) -> float:
    """Mean bits a weight."""
    return float((np.asarray(bits) * sizes).sum() / sizes.sum())


def validate(
    trials: Callable, val_batches: Sequence[DistillBatch], sizes: np.ndarray, state: Progress
) -> tuple[Progress, Row]:
    """`state`, whose best is the student of now unless one before had fewer bits, or did better; and how it did."""
    now, bits = student_of(state.train), np.asarray(state.schedule.bits)
    (loss,), parts = try_bits(trials, now, bits[None], val_batches)
    mean = average(bits, sizes)
    if (round(mean, 6), loss) < (round(float(state.best_bits), 6), float(state.best_loss)):
        best = jax.device_get(now)
        state = state._replace(best=best, best_loss=jnp.float32(loss), best_bits=jnp.float32(mean), stale=jnp.int32(0))
    else:
        state = state._replace(stale=state.stale + 1)
    return state, {"val/loss": float(loss)} | {f"val/{name}": float(value) for name, value in parts.items()}


def end_epoch(
    trials: Callable,
    val_batches: Sequence[DistillBatch],
    config: DistillConfig,
    names: Sequence[str],
    sizes: np.ndarray,
    state: Progress,
    epoch: int,
) -> tuple[Progress, Row]:
    """`state` after validation and, but for the last epochs, with a bit less for the layers that bear it; and why."""
    state, row = validate(trials, val_batches, sizes, state)
    now, before, bits = student_of(state.train), row["val/loss"], np.asarray(state.schedule.bits)
    ask, roots = config.distill, config.quant.target_roots
    if ask.confidence_method in ("baseline", "variance") and epoch <= config.train.epochs - ask.cooldown_epochs:
        sure = confident_layers(state.schedule, ask.confidence_method, ask.layer_threshold, ask.variance_threshold)
        sure &= np.array([not roots or any(under(name, root) for root in roots) for name in names])
        tried = candidates(state.schedule, sure, config.quant.min_bits, ask.candidates)
        less = bits - np.eye(len(bits), dtype=bits.dtype)[tried]
        after, _ = try_bits(trials, now, less, val_batches) if len(tried) else (np.zeros(0), {})
        schedule, decisions = reduce_bits(
            state.schedule, names, sizes, tried, (after - before) / max(before, ask.impact_floor),
            threshold=ask.impact_threshold, budget=ask.impact_budget, target=config.quant.target_bits,
        )  # fmt: skip
        params = with_bits(state.train.params, schedule.bits)
        state = state._replace(schedule=schedule, train=state.train._replace(params=params))
        row |= decisions_row(decisions)
        bits = np.asarray(schedule.bits)
    return state, row | bits_row(bits, names, sizes)


def bits_row(bits: np.ndarray, names: Sequence[str], sizes: np.ndarray) -> Row:
    return {"train/avg_bit_width": average(bits, sizes), "bits": dict(zip(names, bits.astype(int).tolist()))}


def decisions_row(decisions: Sequence[Decision]) -> Row:
    """A round of the controller in the words of its log."""
    accepted = sum(decision.accepted for decision in decisions)
    return {
        "quant/candidates": len(decisions),
        "quant/updated_layers": accepted,
        "quant/accept_rate": accepted / max(len(decisions), 1),
        "quant/mean_increase": float(np.mean([decision.impact for decision in decisions])) if decisions else 0.0,
        "decisions": [decision._asdict() for decision in decisions],
    }


def open_log(path: Path, step: int, log_fn: Callable[[Row], None]) -> Callable[[Row], None]:
    """A function that appends a row; rows after `step`, which a killed run had written, are taken out first."""
    if jax.process_index():
        return lambda row: None
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # it may have been killed in the middle of one
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= step))

    def log(row: Row) -> None:
        with path.open("a") as file:
            print(json.dumps(row), file=file)
        log_fn(row)

    return log

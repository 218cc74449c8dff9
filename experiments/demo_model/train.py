"""Trains nano, the demo model, on drawn scenes: `make demo-model`. A killed run is resumed by the same command.

A mask decoder trained from random weights first learns one mask for all prompts and may stay at that optimum. Therefore
the trunk is trained first, through a shortcut in place of the decoder's transformer; then the decoder, on features that
separate objects by then. Both use images of half the side, where a step costs a quarter. Then correction clicks are
trained at full size, then clips with a frozen trunk, and these two twice more, for longer.

Letters: B scenes or clips, T frames, S side of the image in pixels, O objects, P prompts, C channels.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from init_decoder import init_decoder
from labelled_scenes import Batch, each_object, generate_batches, sample_objects

from converters.checkpoint import save_checkpoint
from sam2jq import SAM2, build, init_params
from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.config.run import CacheConfig
from sam2jq.data import prompts
from sam2jq.data.images import normalize
from sam2jq.data.synthetic.scenes import MAX_OBJECTS
from sam2jq.models.decoder import Decoded
from sam2jq.models.variants import MEMORIES, POINTERS
from sam2jq.predictors.memory_bank import (
    FrameInfo,
    FrameOutput,
    MemoryBank,
    condition_on_memory,
    memorize,
    track_objects_in_frame,
    update_memory_bank,
)
from sam2jq.predictors.prompts import LOGIT_LIMIT
from sam2jq.training.loop import Hooks, fit, log_mean_metrics
from sam2jq.training.losses import balanced_dice, focal_dice, mask_loss, soft_iou
from sam2jq.training.state import init_state
from sam2jq.training.step import make_train_step

Array = jax.Array
SAVE_EVERY = 50  # steps between checkpoints and rows of the log


class Phase(NamedTuple):
    """The settings of one phase of the training.

    `prompts` a frame pass `rounds` times through the decoder, each time with one more click; with 0 rounds the shortcut
    is trained instead. `objects` of each clip are tracked from its first frame; if there are any, the image encoder
    stays fixed.
    """

    scenes: int  # the seed of its scenes; quantization is calibrated on those of seeds 7 to 9
    size: int
    steps: int
    clips: int
    frames: int
    prompts: int
    rounds: int
    objects: int
    peak: float  # learning rate after warmup
    end: float  # learning rate at the last step
    guide: float  # weight of the square distance between mask tokens and the shortcut's tokens
    shape: Callable = balanced_dice


PHASES = {
    "trunk": Phase(1, 128, 1200, 16, 1, 16, 0, 0, 1e-3, 1e-3, 0),
    "decoder": Phase(2, 128, 400, 16, 1, 16, 1, 0, 1e-3, 1e-3, 4),
    "masks": Phase(3, 128, 3600, 16, 1, 8, 1, 0, 1e-3, 2e-4, 0, focal_dice),
    "full": Phase(4, 256, 700, 6, 1, 8, 3, 0, 6e-4, 0, 0, focal_dice),
    "clips": Phase(5, 256, 500, 2, 5, 4, 1, 4, 8e-4, 0, 0, focal_dice),
    "full2": Phase(6, 256, 4200, 6, 1, 8, 3, 0, 1e-3, 0, 0, focal_dice),
    "clips2": Phase(10, 256, 800, 2, 8, 2, 3, 4, 8e-4, 0, 0, focal_dice),
    "full3": Phase(14, 256, 4800, 12, 1, 4, 3, 0, 1e-3, 0, 0, focal_dice),
    "clips3": Phase(15, 256, 1200, 2, 8, 2, 3, 4, 8e-4, 0, 0, focal_dice),
}


def loss(model: SAM2, phase: Phase, params: dict, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """The mean loss of the prompts plus that of the tracked objects, and the metrics."""
    images = normalize(batch.images.astype(jnp.float32) / 255)
    if phase.objects:
        params = {name: jax.lax.stop_gradient(part) if is_frozen(name) else part for name, part in params.items()}
    maps = model.apply({"params": params}, images.reshape(-1, *images.shape[2:]), method="encode_image")
    prompt_keys, clip_keys = (
        jax.random.split(k, n) for k, n in zip(jax.random.split(key), (len(maps[0]), phase.clips))
    )
    labels = batch.labels.reshape(-1, *batch.labels.shape[2:])
    prompted = functools.partial(prompt_loss if phase.rounds else trunk_loss, model, phase, params)
    losses, metrics = jax.vmap(prompted)(maps, labels, prompt_keys)
    total = losses.mean()
    if phase.objects:
        clips = [level.reshape(phase.clips, phase.frames, *level.shape[1:]) for level in maps]
        tracked, more = jax.vmap(functools.partial(clip_loss, model, phase, params))(clips, batch.labels, clip_keys)
        total, metrics = total + tracked.mean(), metrics | more
    return total, jax.tree.map(jnp.mean, metrics)


def is_frozen(name: str) -> bool:
    """Whether a part of the params stays fixed while clips are trained."""
    return name.startswith("image_encoder")


def shortcut(sam: SAM2, maps: list[Array], coverage: Array) -> tuple[Array, Array]:
    """Tokens [P, C] and mask logits [P, S / 4, S / 4] without the transformer: an object's token is its mean feature.

    It trains the trunk, the upscaling and the hypernetwork for the decoder. Its tokens are targets of the decoder's
    mask tokens.
    """
    fine, middle, coarse = sam.add_no_memory_embed(maps)
    coarse = coarse + sam.sam_prompt_encoder(None, None)[1]
    coarse = jax.nn.standardize(coarse, epsilon=1e-5)  # like the output of the transformer's last layer norm
    side = coarse.shape[1]
    share = coverage.reshape(len(coverage), side, 4, side, 4).sum((2, 4))
    tokens = jnp.einsum("phw,hwc->pc", share, coarse[0]) / (share.sum((1, 2))[:, None] + 1e-3)
    tokens = jax.nn.standardize(tokens, epsilon=1e-5)
    return tokens, sam.sam_mask_decoder.predict_masks(jnp.repeat(tokens[:, None], 4, 1), coarse, middle, fine)[:, 0]


def trunk_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """The loss [] of the shortcut on one frame, and its metrics."""
    coverage = sample_objects(labels, phase.prompts, key).coverage
    maps = [level[None] for level in maps]
    _, logits = model.apply({"params": params}, maps, coverage, method=shortcut)
    return phase.shape(logits, coverage).mean(), {"iou": soft_iou(logits, coverage).mean()}


def prompt_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """The loss [] of clicks and boxes on one frame, and its metrics; each round adds a correction click."""
    half, apply = phase.prompts // 2, functools.partial(model.apply, {"params": params})
    pick, click, box, *keys = jax.random.split(key, 3 + 2 * phase.rounds)
    masks, coverage = sample_objects(labels, half, pick)
    maps = [level[None] for level in maps]
    guides = apply(maps, coverage, method=shortcut) if phase.guide else None
    maps = apply(maps, method="add_no_memory_embed")
    starts = {
        "click": (prompts.random_points(click, prompts.inside(coverage), phase.size), jnp.ones((half, 1), jnp.int32)),
        "box": (prompts.jitter_boxes(box, prompts.boxes(masks), phase.size), jnp.tile(jnp.array([[2, 3]]), (half, 1))),
    }
    total, metrics = 0.0, {}
    for name, (points, point_labels) in starts.items():
        mask_input = None
        for i in range(phase.rounds):
            out = apply(maps, (points, point_labels), mask_input, method="decode_all_masks")
            total += mask_loss(out.masks[:, :1], out.ious[:, :1], coverage, phase.shape).mean()
            if i == 0:
                total += mask_loss(out.masks[:, 1:], out.ious[:, 1:], coverage, phase.shape).mean()
                if guides:
                    total += phase.guide * jnp.square(out.tokens - jax.lax.stop_gradient(guides[0])[:, None]).mean()
            chosen = best_mask(out) if i == 0 and name == "click" else out.masks[:, 0]  # as in the predictor
            logits = jax.lax.stop_gradient(chosen)
            metrics[f"{name}{i}"] = soft_iou(logits, coverage).mean()
            metrics[f"influence_{name}{i}"] = logits.std(0).mean() / logits.std((1, 2)).mean()
            point, point_label = prompts.sample_correction_clicks(keys.pop(), logits, coverage, phase.size)
            points = jnp.concatenate([points, point], 1)
            point_labels = jnp.concatenate([point_labels, point_label], 1)
            mask_input = jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)[..., None]
    shortcut_loss = phase.shape(guides[1], coverage).mean() if guides else 0.0
    return total / (2 * phase.rounds) + shortcut_loss, metrics


def best_mask(out: Decoded) -> Array:
    """Logits [O, h, w] of the mask with the highest estimated IoU, of the three for an ambiguous prompt."""
    masks, ious = out.masks[:, -3:], out.ious[:, -3:]  # the first of four is for unambiguous prompts
    return jnp.take_along_axis(masks, ious.argmax(-1)[:, None, None, None], 1)[:, 0]


def clip_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """The loss [] of tracking objects through one clip, and its metrics; half the prompts are masks, half clicks."""
    pick, key = jax.random.split(key)
    order = jnp.arange(phase.objects) + jax.random.randint(pick, (), 0, MAX_OBJECTS)
    which = order % jnp.maximum(labels[0].max(), 1)
    masks, coverage = jax.tree.map(lambda leaf: leaf[:, which], jax.vmap(each_object)(labels))  # [T, O, ...]
    is_visible = masks.any((2, 3))
    half, apply = phase.objects // 2, functools.partial(model.apply, {"params": params})

    def prompt_first_frame(sam: SAM2) -> tuple[FrameOutput, Array]:
        *fine, coarse = [level[:1] for level in maps]
        coarse = jnp.broadcast_to(coarse, (half, *coarse.shape[1:]))
        given = sam.object_from_mask([*fine, coarse], masks[0, :half, ..., None].astype(coarse.dtype))
        points = prompts.random_points(key, prompts.inside(coverage[0, half:]), phase.size)
        clicks = points, jnp.ones((phase.objects - half, 1), jnp.int32)
        decoded = sam.decode_masks(sam.add_no_memory_embed([*fine, coarse[:1]]), clicks, multimask=True)
        prompted = [memorize(sam, coarse, out) for out in (given, sam.select_best_mask(decoded))]
        return jax.tree.map(lambda *both: jnp.concatenate(both), *prompted), decoded

    def step(bank: MemoryBank, frame):
        index, level, target, is_present = frame
        now = FrameInfo(index, 1, phase.frames - 1.0)
        track = lambda sam, maps: track_objects_in_frame(sam, maps, condition_on_memory(sam, maps[-1], bank, now))
        tracked, decoded = apply([m[None] for m in level], method=track)
        return update_memory_bank(bank, tracked, jnp.ones(phase.objects, bool)), tracking_loss(
            phase, decoded, target, is_present
        )

    prompted, decoded = apply(method=prompt_first_frame)
    bank = empty_bank(prompted, min(phase.frames, MEMORIES) - 1)
    frames = jnp.arange(1, phase.frames), [level[1:] for level in maps], coverage[1:], is_visible[1:]
    # unrolled: on a CPU convolutions take several times as long inside a loop
    _, (losses, ious, calls) = jax.lax.scan(step, bank, frames, unroll=True)
    first, *_ = tracking_loss(phase, decoded, coverage[0, half:], is_visible[0, half:])
    metrics = {"track": ious.sum() / is_visible[1:].sum(), "presence": calls.mean()}
    return losses.mean() + first / phase.frames, metrics


def tracking_loss(phase: Phase, decoded: Decoded, coverage: Array, is_visible: Array) -> tuple[Array, Array, Array]:
    """The loss [] of O objects, the IoU [O] of their best masks (0 if absent), and whether each score is right [O]."""
    shape = jnp.where(is_visible, mask_loss(decoded.masks, decoded.ious, coverage, phase.shape), 0.0).mean()
    score = decoded.object_scores[:, 0]
    presence = optax.sigmoid_binary_cross_entropy(score, is_visible.astype(jnp.float32)).mean()
    return (
        shape + presence,
        jnp.where(is_visible, soft_iou(best_mask(decoded), coverage), 0.0),
        (score > 0) == is_visible,
    )


def empty_bank(prompted: FrameOutput, slots: int) -> MemoryBank:
    """The memory bank after frame 0, with room for the memories of `slots` frames."""
    objects, grid, width = len(prompted.mask), prompted.memory.shape[1:], prompted.pointer.shape[-1]
    return MemoryBank(
        jnp.zeros((objects, 1), jnp.int32),
        prompted.memory[:, None],
        prompted.pointer[:, None],
        jnp.zeros((objects, POINTERS), bool),
        jnp.zeros((objects, slots, *grid), prompted.memory.dtype),
        jnp.zeros((objects, POINTERS, width)),
    )


def make_optimizer(phase: Phase) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) for the matrices, which needs half as many steps as AdamW here, and Adam for the rest."""
    rate = optax.warmup_cosine_decay_schedule(0, phase.peak, 50, phase.steps, phase.end)
    matrix = optax.contrib.MuonDimensionNumbers()
    matrices = lambda params: jax.tree.map_with_path(
        lambda path, leaf: matrix if path[-1].key == "kernel" and leaf.ndim == 2 else None, params
    )
    muon = optax.contrib.muon(rate, weight_decay=0.01, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
    frozen = optax.masked(optax.set_to_zero(), lambda params: {name: is_frozen(name) for name in params})
    return optax.chain(optax.clip_by_global_norm(1.0), muon, *[frozen] * bool(phase.objects))


def train(out: Path, seed: int, phases: dict[str, Phase] = PHASES) -> dict:
    """The trained params; `out` gets checkpoints and log.jsonl."""
    params = init_params(build("nano"), seed)
    for name, phase in phases.items():
        if name == "decoder":
            params = init_decoder(build("nano"), params)
        params = train_phase(name, phase, params, out, seed)
    return params


def train_phase(name: str, phase: Phase, params: dict, out: Path, seed: int) -> dict:
    """The params after one phase, whose checkpoints are in out/name."""
    optimizer, begin = make_optimizer(phase), time.time()
    step = make_train_step(functools.partial(loss, build("nano", image_size=phase.size), phase), optimizer)
    first_seed = (seed << 40) + (phase.scenes << 32)
    batches = lambda n: generate_batches(phase.clips, phase.frames, phase.size, first_seed + n * phase.clips)

    def log(number: int, metrics: dict[str, float]) -> None:
        row = {"phase": name, "step": number, "seconds": round(time.time() - begin, 1)}
        with (out / "log.jsonl").open("a") as file:
            print(json.dumps(row | {key: round(value, 4) for key, value in metrics.items()}), file=file)

    hooks = Hooks(
        after_step=log_mean_metrics(SAVE_EVERY, phase.steps, log),
        is_save_step=lambda number: number % SAVE_EVERY == 0 or number == phase.steps,
    )
    return fit(step, init_state(params, optimizer, seed), batches, phase.steps, out / name, hooks).params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo_model"), help="folder of checkpoints and log")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache(CacheConfig(str(args.out)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), train(args.out, args.seed))  # half the bytes
    save_checkpoint(args.out / "nano.safetensors", params)  # to be put into sam2jq/assets


if __name__ == "__main__":
    main()

"""Trains nano, the demo model, on drawn scenes: `make demo-model`. Goes on from where it was killed.

A mask decoder trained from nothing first learns one mask for every prompt, and may stay there. So the trunk learns
first, through a short cut on which no prompt gets lost; then the decoder, on features that tell objects apart by then;
both on images of half the side, where a step costs a quarter; then corrections at full size; then clips, for which the
trunk stays as it is; and these two twice more, for longer.

Letters: B scenes or clips, T frames, S the image's side, O objects, P prompts.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from converters.checkpoint import save_checkpoint
from sam2jq import SAM2, build, init_params
from sam2jq.data import prompts
from sam2jq.data.images import normalize
from sam2jq.data.synthetic.scenes import MAX_OBJECTS, build_world, pointable, render
from sam2jq.models.decoder import Decoded
from sam2jq.models.sam2 import MEMORIES, POINTERS
from sam2jq.predictors.image import LOGIT_LIMIT
from sam2jq.predictors.memory_bank import (
    FrameInfo,
    FrameOutput,
    MemoryBank,
    memorize,
    track_objects_in_frame,
    update_memory_bank,
)
from sam2jq.training.losses import balanced_dice, focal_dice, mask_loss, soft_iou
from sam2jq.training.step import fit, init_state, make_train_step
from sam2jq.tree import flatten, unflatten

Array = jax.Array
SMALL = 0.2  # deviation of features beside the position code's 0.7
SLIVER = 0.005  # of the image: an object that shows less of itself is not prompted


class Phase(NamedTuple):
    """`prompts` a frame go through `rounds` passes of the decoder, each with one more click; 0: the short cut.

    `objects` of each clip are tracked from its first frame; where there are any, the image encoder rests.
    """

    scenes: int  # the seed of its drawn scenes; 7 to 9 are what quantization is calibrated on
    size: int
    steps: int
    clips: int
    frames: int
    prompts: int
    rounds: int
    objects: int
    peak: float  # learning rate, and what it falls to
    end: float
    guide: float  # weight of the distance of the mask tokens from the short cut's
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


class Batch(NamedTuple):
    images: np.ndarray  # uint8 [B, T, S, S, 3]
    labels: np.ndarray  # uint8 [B, T, S, S]: the number of the object seen there, or 0


def draw(seed: int, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the clip of a seed, of every frame or only of every second, third or fourth."""
    world = build_world(seed)
    images, owners = zip(*[render(world, t * (1 + seed % 4), size) for t in range(frames)])
    number = np.zeros(MAX_OBJECTS + 1, np.uint8)
    listed = pointable(owners[0])
    number[listed] = np.arange(1, len(listed) + 1)
    return np.stack(images), number[np.stack(owners)]


def drawn(phase: Phase, first: int, ahead: int = 8):
    """Yields batches of seeds first, first + 1, ..., drawn ahead by another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        for seed in itertools.count(first, phase.clips):
            seeds = range(seed, seed + phase.clips)
            pending.append(pool.map(draw, seeds, [phase.frames] * phase.clips, [phase.size] * phase.clips))
            if len(pending) > ahead:
                yield Batch(*map(np.stack, zip(*pending.popleft())))


class Targets(NamedTuple):
    masks: Array  # bool [P, S, S]
    coverage: Array  # [P, S / 4, S / 4]: how much of each cell is object


def each_object(labels: Array) -> Targets:
    """All MAX_OBJECTS objects of labels [S, S], there or not."""
    masks = labels == jnp.arange(1, MAX_OBJECTS + 1)[:, None, None]
    side = labels.shape[0] // 4
    return Targets(masks, masks.reshape(MAX_OBJECTS, side, 4, side, 4).mean((2, 4), dtype=jnp.float32))


def seen_objects(labels: Array, count: int, key: Array) -> Targets:
    """`count` targets on labels [S, S], in random order, each object that is there as often as any other."""
    targets = each_object(labels)
    there = targets.masks.mean((1, 2)) > SLIVER
    order = jnp.argsort(jnp.where(there, jax.random.uniform(key, there.shape), 1))
    which = order[jnp.arange(count) % jnp.maximum(there.sum(), 1)]
    return jax.tree.map(lambda leaf: leaf[which], targets)


def loss(model: SAM2, phase: Phase, params: dict, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """The mean over prompts, plus the mean over tracked objects; and what to watch."""
    images = normalize(batch.images.astype(jnp.float32) / 255)
    if phase.objects:
        params = {name: jax.lax.stop_gradient(part) if resting(name) else part for name, part in params.items()}
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
        followed, more = jax.vmap(functools.partial(clip_loss, model, phase, params))(clips, batch.labels, clip_keys)
        total, metrics = total + followed.mean(), metrics | more
    return total, jax.tree.map(jnp.mean, metrics)


def resting(name: str) -> bool:
    """Whether a part of the params stays as it is while clips are learned."""
    return name.startswith("image_encoder")


def short_cut(sam: SAM2, maps: list[Array], coverage: Array) -> tuple[Array, Array]:
    """Tokens [P, C] and mask logits [P, S / 4, S / 4] without the transformer: an object's mean feature is its token.

    What it teaches the trunk, the upscaling and the hypernetwork is what the decoder needs of them; and its tokens
    are what the decoder's mask tokens are to become.
    """
    fine, middle, coarse = sam.add_no_memory_embed(maps)
    coarse = coarse + sam.sam_prompt_encoder(None, None)[1]
    coarse = jax.nn.standardize(coarse, epsilon=1e-5)  # as the transformer's last layer leaves it
    side = coarse.shape[1]
    share = coverage.reshape(len(coverage), side, 4, side, 4).sum((2, 4))
    tokens = jnp.einsum("phw,hwc->pc", share, coarse[0]) / (share.sum((1, 2))[:, None] + 1e-3)
    tokens = jax.nn.standardize(tokens, epsilon=1e-5)
    return tokens, sam.sam_mask_decoder.draw(jnp.repeat(tokens[:, None], 4, 1), coarse, middle, fine)[:, 0]


def trunk_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """Of the short cut."""
    coverage = seen_objects(labels, phase.prompts, key).coverage
    maps = [level[None] for level in maps]
    _, logits = model.apply({"params": params}, maps, coverage, method=short_cut)
    return phase.shape(logits, coverage).mean(), {"iou": soft_iou(logits, coverage).mean()}


def prompt_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """Half of the prompts are clicks, half are boxes; each round adds a click where the last mask was wrong."""
    half, apply = phase.prompts // 2, functools.partial(model.apply, {"params": params})
    pick, click, box, *keys = jax.random.split(key, 3 + 2 * phase.rounds)
    masks, coverage = seen_objects(labels, half, pick)
    maps = [level[None] for level in maps]
    guides = apply(maps, coverage, method=short_cut) if phase.guide else None
    maps = apply(maps, method="add_no_memory_embed")
    starts = {
        "click": (prompts.random_points(click, prompts.inside(coverage), phase.size), jnp.ones((half, 1), jnp.int32)),
        "box": (prompts.jitter_boxes(box, prompts.boxes(masks), phase.size), jnp.tile(jnp.array([[2, 3]]), (half, 1))),
    }
    total, metrics = 0.0, {}
    for name, (points, kinds) in starts.items():
        mask_input = None
        for i in range(phase.rounds):
            out = apply(maps, (points, kinds), mask_input, method="decode_all_masks")
            total += mask_loss(out.masks[:, :1], out.ious[:, :1], coverage, phase.shape).mean()
            if i == 0:
                total += mask_loss(out.masks[:, 1:], out.ious[:, 1:], coverage, phase.shape).mean()
                if guides:
                    total += phase.guide * jnp.square(out.tokens - jax.lax.stop_gradient(guides[0])[:, None]).mean()
            goes_on = best_mask(out) if i == 0 and name == "click" else out.masks[:, 0]  # as the predictor does
            logits = jax.lax.stop_gradient(goes_on)
            metrics[f"{name}{i}"] = soft_iou(logits, coverage).mean()
            metrics[f"influence_{name}{i}"] = logits.std(0).mean() / logits.std((1, 2)).mean()
            point, kind = prompts.sample_correction_clicks(keys.pop(), logits, coverage, phase.size)
            points, kinds = jnp.concatenate([points, point], 1), jnp.concatenate([kinds, kind], 1)
            mask_input = jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)[..., None]
    drawn = phase.shape(guides[1], coverage).mean() if guides else 0.0
    return total / (2 * phase.rounds) + drawn, metrics


def best_mask(out: Decoded) -> Array:
    """Logits [O, h, w] of the mask with the highest estimated IoU, of the three for a prompt of many meanings."""
    masks, ious = out.masks[:, -3:], out.ious[:, -3:]  # the first of four is the one for prompts that are clear
    return jnp.take_along_axis(masks, ious.argmax(-1)[:, None, None, None], 1)[:, 0]


def clip_loss(model: SAM2, phase: Phase, params: dict, maps: list[Array], labels: Array, key: Array):
    """Of one clip's objects, half given by their masks in frame 0 and half by a click, in all other frames."""
    pick, key = jax.random.split(key)
    order = jnp.arange(phase.objects) + jax.random.randint(pick, (), 0, MAX_OBJECTS)
    which = order % jnp.maximum(labels[0].max(), 1)
    masks, coverage = jax.tree.map(lambda leaf: leaf[:, which], jax.vmap(each_object)(labels))  # [T, O, ...]
    there = masks.any((2, 3))
    half, apply = phase.objects // 2, functools.partial(model.apply, {"params": params})

    def begin(sam: SAM2) -> tuple[FrameOutput, Array]:
        *fine, coarse = [level[:1] for level in maps]
        coarse = jnp.broadcast_to(coarse, (half, *coarse.shape[1:]))
        given = sam.object_from_mask([*fine, coarse], masks[0, :half, ..., None].astype(coarse.dtype))
        points = prompts.random_points(key, prompts.inside(coverage[0, half:]), phase.size)
        clicks = points, jnp.ones((phase.objects - half, 1), jnp.int32)
        decoded = sam.decode_masks(sam.add_no_memory_embed([*fine, coarse[:1]]), clicks, multimask=True)
        prompted = [memorize(sam, coarse, out) for out in (given, sam.select_best_mask(decoded))]
        return jax.tree.map(lambda *both: jnp.concatenate(both), *prompted), decoded

    def step(bank: MemoryBank, frame):
        index, level, wanted, is_there = frame
        now = FrameInfo(index, 1, phase.frames - 1.0)
        seen, decoded = apply([m[None] for m in level], bank, now, method=track_objects_in_frame)
        return update_memory_bank(bank, seen, jnp.ones(phase.objects, bool)), tracking_loss(
            phase, decoded, wanted, is_there
        )

    prompted, decoded = apply(method=begin)
    bank = empty_bank(prompted, min(phase.frames, MEMORIES) - 1)
    frames = jnp.arange(1, phase.frames), [level[1:] for level in maps], coverage[1:], there[1:]
    # unrolled: on a CPU convolutions take several times as long inside a loop
    _, (losses, ious, calls) = jax.lax.scan(step, bank, frames, unroll=True)
    first, *_ = tracking_loss(phase, decoded, coverage[0, half:], there[0, half:])
    metrics = {"track": ious.sum() / there[1:].sum(), "presence": calls.mean()}
    return losses.mean() + first / phase.frames, metrics


def tracking_loss(phase: Phase, decoded: Decoded, coverage: Array, there: Array) -> tuple[Array, Array, Array]:
    """The loss of O objects [], the IoU [O] of their best masks, 0 of absent ones, and who was rightly called there."""
    shape = jnp.where(there, mask_loss(decoded.masks, decoded.ious, coverage, phase.shape), 0.0).mean()
    score = decoded.object_scores[:, 0]
    called = optax.sigmoid_binary_cross_entropy(score, there.astype(jnp.float32)).mean()
    return shape + called, jnp.where(there, soft_iou(best_mask(decoded), coverage), 0.0), (score > 0) == there


def empty_bank(prompted: FrameOutput, slots: int) -> MemoryBank:
    """What is remembered after frame 0, with places for the memories of `slots` frames."""
    objects, grid, width = len(prompted.mask), prompted.memory.shape[1:], prompted.pointer.shape[-1]
    return MemoryBank(
        jnp.zeros((objects, 1), jnp.int32),
        prompted.memory[:, None],
        prompted.pointer[:, None],
        jnp.zeros((objects, POINTERS), bool),
        jnp.zeros((objects, slots, *grid), prompted.memory.dtype),
        jnp.zeros((objects, POINTERS, width)),
    )


def start_decoder(model: SAM2, params: dict) -> dict:
    """`params` with a decoder that looks where a point is, and answers with what the short cut draws of what it sees.

    1. The first self-attention passes tokens on as they are, evenly mixed: every token then holds the point's place.
    2. q and k of the cross-attentions pick out pairs of slow waves of the position code, so that each head looks at
       the point's surroundings; v and its way out are a projection on half the channels and back.
    3. Features are small against the position code, all other ways into a token are weak, objects count as there.
    """
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    rng, width = np.random.default_rng(0), model.variant.features
    decoder = "sam_mask_decoder/transformer"
    waves = flat["sam_prompt_encoder/pe_layer.positional_encoding_gaussian_matrix"].T  # [width / 2, 2]
    slow = np.argsort(np.hypot(*waves.T))[:8]
    look = np.zeros((width, width // 2), np.float32)
    for head, wave in enumerate(slow):
        across = slow[np.argmin(np.abs(waves[slow] @ waves[wave]) / np.hypot(*waves[slow].T))]
        for column, row in enumerate((wave, wave + width // 2, across, across + width // 2)):
            look[row, 4 * head + column] = 1
    part = np.linalg.qr(rng.standard_normal((width, width // 2)))[0].astype(np.float32)

    for name, sharp, gain in [
        ("layers.0/cross_attn_token_to_image", 30, 15),
        ("layers.1/cross_attn_token_to_image", 30, 2),
        ("final_attn_token_to_image", 30, 0.2),
        ("layers.0/cross_attn_image_to_token", 4, 0.2),
        ("layers.1/cross_attn_image_to_token", 4, 0.2),
    ]:
        at = f"{decoder}/{name}"
        flat[f"{at}/q_proj/kernel"], flat[f"{at}/k_proj/kernel"] = sharp**0.5 * look, sharp**0.5 * look
        flat[f"{at}/v_proj/kernel"], flat[f"{at}/out_proj/kernel"] = gain * part, part.T.copy()
    mix = f"{decoder}/layers.0/self_attn"
    flat[f"{mix}/v_proj/kernel"] = flat[f"{mix}/out_proj/kernel"] = np.eye(width, dtype=np.float32)
    flat[f"{mix}/q_proj/kernel"] *= 0.1
    for weak in ("layers.1/self_attn/out_proj", "layers.0/mlp/layers.1", "layers.1/mlp/layers.1"):
        flat[f"{decoder}/{weak}/kernel"] *= 0.1
    flat[f"{decoder}/layers.0/norm4/scale"] *= SMALL

    images, _ = zip(*[draw(seed, 1, 128) for seed in range(8)])
    images = normalize(np.concatenate(images).astype(np.float32) / 255)
    coarse = build("nano", image_size=128).apply({"params": params}, images, method="encode_image")[-1]
    for name in (
        "image_encoder.neck/convs.0.conv/",
        "image_encoder.neck/convs.1.conv/",
        "no_mem_embed",
        "no_mask_embed.weight",
    ):
        for path in [path for path in flat if name in path]:
            flat[path] = flat[path] * SMALL / np.std(coarse)
    for path in [path for path in flat if "output_hypernetworks_mlps.0" in path]:
        for i in range(1, 4):
            flat[path.replace("mlps.0", f"mlps.{i}")] = flat[path].copy()
    flat["sam_mask_decoder/pred_obj_score_head/layers.2/bias"] += 3
    return unflatten(jax.tree.map(jnp.array, flat))


def make_optimizer(phase: Phase) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) for the matrices, which learns in half of AdamW's steps here, and Adam for the rest."""
    rate = optax.warmup_cosine_decay_schedule(0, phase.peak, 50, phase.steps, phase.end)
    matrix = optax.contrib.MuonDimensionNumbers()
    matrices = lambda params: jax.tree.map_with_path(
        lambda path, leaf: matrix if path[-1].key == "kernel" and leaf.ndim == 2 else None, params
    )
    muon = optax.contrib.muon(rate, weight_decay=0.01, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
    rest = optax.masked(optax.set_to_zero(), lambda params: {name: resting(name) for name in params})
    return optax.chain(optax.clip_by_global_norm(1.0), muon, *[rest] * bool(phase.objects))


def train(out: Path, seed: int, phases: dict[str, Phase] = PHASES) -> dict:
    """The trained params; checkpoints and a log of metrics go to `out`."""
    params = init_params(build("nano"), seed)
    for name, phase in phases.items():
        if name == "decoder":
            params = start_decoder(build("nano"), params)
        optimizer = make_optimizer(phase)
        step = make_train_step(functools.partial(loss, build("nano", image_size=phase.size), phase), optimizer)
        first = (seed << 40) + (phase.scenes << 32)
        batches = lambda n, phase=phase, first=first: drawn(phase, first + n * phase.clips)
        begin = time.time()
        for state, metrics in fit(
            step, init_state(params, optimizer, seed), batches, phase.steps, out / name, every=50
        ):
            row = {"phase": name, "step": int(state.step), "seconds": round(time.time() - begin, 1)}
            with (out / "log.jsonl").open("a") as log:
                print(json.dumps(row | {key: round(value, 4) for key, value in metrics.items()}), file=log)
        params = state.params
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo_model"), help="folder of checkpoints and log")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((args.out / "compiled").absolute()))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), train(args.out, args.seed))  # half the bytes
    save_checkpoint(args.out / "nano.safetensors", params)  # to be put into sam2jq/assets


if __name__ == "__main__":
    main()

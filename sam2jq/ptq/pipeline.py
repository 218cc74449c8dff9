"""Post-training quantization of a params tree: calibrate, then apply the recipe's transforms one after the other."""

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.config.quant import QuantConfig
from sam2jq.models.sam2 import FLOW, SAM2, TRUNK_LINEAR, trunk_of
from sam2jq.ptq.calibration import collect, fingerprint
from sam2jq.ptq.recipe import (
    activation_specs,
    build_transforms,
    choose_bits,
    choose_input_bits,
    choose_unsigned,
    rotation_spec,
    smoothing,
    weight_specs,
)
from sam2jq.quant.algorithms.rotate import draw_signs, fold_heads
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.transform import Stats
from sam2jq.tree import flatten, kernels, layer_name, unflatten

Clips = Callable[[int], Iterable[np.ndarray]]
FOLDED, UNROUNDED = "fold", "unrounded"


class Quantized(NamedTuple):
    """reached: {stage: the params tree after it}, UNROUNDED before any weight is; the last is the quantized model. The
    tree at FOLDED, where there is one, computes what the model did, with other weights: those to compare with.

    stats: {layer: Stats}, empty where nothing needed them. config: with the bits that were chosen for a target.
    """

    params_by_stage: dict[str, dict]
    stats: dict[str, Stats]
    config: QuantConfig


def quantize_params(
    model: SAM2,
    params: dict,
    config: QuantConfig,
    clips: Clips,
    *,
    seed: int = 0,
    needs: Iterable[str] = (),
    cache: tuple[Path, object] | None = None,
    on_stage: Callable = lambda name, what: nullcontext(),
) -> Quantized:
    """`params`, plain arrays, through every stage of `config`.

    clips, needs: as `collect` takes them; needs beside those of the stages. cache: a folder for statistics, and what
    tells these clips from others. watch(stage, what it does): a context in which each stage runs.
    ValueError: names the key or the layer.
    """
    weights = {layer_name(path): kernel for path, kernel in kernels(flatten(params)).items()}
    shapes = {layer: w.shape for layer, w in weights.items()}
    allowed = config.ipts.allow_unsigned
    wanted = set(needs) | ({"gram"} if config.wgts.mixed else set()) | ({"range"} if allowed else set())
    wanted |= {"tokens"} if config.ipts.mixed else set()
    build_transforms(config, shapes, TRUNK_LINEAR, seed)  # what cannot be is an error before any work
    params_by_stage = {}
    if config.rotation.fold_heads:
        with on_stage(FOLDED, describe(config, FOLDED)):
            params = params_by_stage[FOLDED] = fold_rotations(model, params, config, seed)
    at, stats = params, {}
    # sequentially one program, compiled once, looks at all layers; else only at those that are quantized
    looked_at = None if config.calib.sequential else frozenset(weight_specs(config.wgts, shapes))
    groups = in_order(weights) if config.calib.sequential else [list(weights)]
    for number, group in enumerate(groups):
        part = f", {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        asked, steps = config, build_transforms(config, shapes, TRUNK_LINEAR, seed, group)
        if demands := frozenset(wanted.union(*(step.needs for step in steps.values()))):
            with on_stage("calibrate", f"what enters each layer{part}"):
                seen = calibrated(model, materialize_params(at), clips, demands, cache, looked_at)
            stats |= {layer: seen[layer] for layer in group if layer in seen}
        if config.wgts.mixed:
            with on_stage("bits", describe(config, "bits")):
                config = replace(config, wgts=choose_bits(config.wgts, flatten(params), seen))
        if allowed:
            rounded = activation_specs(config.ipts, weight_specs(config.wgts, shapes))
            config = choose_unsigned(config, {k: seen[k] for k in group if k in rounded}, TRUNK_LINEAR)
        if config.ipts.mixed:
            with on_stage("input bits", describe(config, "input bits")):
                config = choose_input_bits(config, flatten(params), seen)
        if config != asked:
            steps = build_transforms(config, shapes, TRUNK_LINEAR, seed, group)
        for name, step in steps.items():
            if name == "weights":
                merge(params_by_stage, UNROUNDED, params, at, group)
            with on_stage(name, describe(config, name) + part):
                at = step.apply(at, stats)
            merge(params_by_stage, name, params, at, group)
    return Quantized(params_by_stage, stats, config)


def fold_rotations(model: SAM2, params: dict, config: QuantConfig, seed: int) -> dict:
    """`params` of the same model, the values of whose trunk's attentions come in the rotated form that proj takes."""
    flat = flatten(params)
    for i, block in enumerate(trunk_of(model.variant).blocks()):
        layer = f"image_encoder.trunk/blocks.{i}/attn"
        paths = [f"{layer}/{name}" for name in ("qkv/kernel", "qkv/bias", "proj/kernel")]
        signs = draw_signs(rotation_spec(config, f"{layer}/proj", seed), block.features)
        flat |= zip(paths, fold_heads(*(flat[path] for path in paths), heads=block.heads, signs=signs))
    return unflatten(flat)


def merge(params_by_stage: dict[str, dict], name: str, params: dict, at: dict, group: list[str]) -> None:
    """Brings the layers of `group` in reached[name], where all start as in `params`, to where they are now."""
    now = {path: leaf for path, leaf in flatten(at).items() if layer_name(path) in group}
    params_by_stage[name] = unflatten(flatten(params_by_stage.get(name, params)) | now)


def calibrated(
    model: SAM2, params: dict, clips: Clips, needs: frozenset[str], cache, layers: frozenset[str] | None
) -> dict[str, Stats]:
    """What `collect` finds, kept in the cache's folder, where a killed run goes on."""
    if cache is None:
        return collect(model, params, clips, needs, layers=layers)
    folder, mark = cache
    name = fingerprint(params, model, sorted(needs), layers and sorted(layers), mark)
    return collect(model, params, clips, needs, folder / f"{name}.npz", layers)


def smoothed_by(done: Quantized, full: dict) -> dict[str, tuple[float, float] | None]:
    """{layer: (alpha, beta)} that smoothing took, None where groups of inputs have their own; {} without that stage."""
    names = list(done.params_by_stage)
    if "smooth" not in names:
        return {}
    at = names.index("smooth")
    before = done.params_by_stage[names[at - 1]] if at else full
    return smoothing(done.config, before, done.params_by_stage["smooth"], done.stats)


def in_order(layers: Iterable[str]) -> list[list[str]]:
    """`layers` in groups as the data runs through them: each block of the trunk, then each component after it."""
    rank = lambda layer: next(i for i, pattern in enumerate(FLOW) if pattern.match(layer))
    blocks = lambda layer: [int(n) for n in re.findall(r"trunk\.blocks\.(\d+)", layer)]
    groups: dict[tuple, list[str]] = {}
    for layer in layers:
        groups.setdefault((rank(layer), *blocks(layer)), []).append(layer)
    return [groups[key] for key in sorted(groups)]


def describe(config: QuantConfig, name: str) -> str:
    """What a stage does, in a few words."""
    match name:
        case "bits":
            target = config.wgts.target_bits
            goal = f"{config.wgts.target_mb} MB" if target is None else f"{target} bits a weight"
            return f"{goal}, for each layer by what its outputs lose"
        case "input bits":
            return f"{config.ipts.target_bits} bits an input, for each layer by what its outputs lose"
        case "weights":
            method = "GPTQ" if config.wgts.kernel_gptq else "to nearest"
            return f"{config.wgts.dtype} {config.wgts.group_shapes}, {method}"
        case "inputs":
            unsigned = f", {len(config.ipts.unsigned)} unsigned" if config.ipts.unsigned else ""
            return f"{config.ipts.dtype} {config.ipts.group_shapes}{', static' * config.ipts.static}{unsigned}"
        case "outputs":
            return f"{config.opts.dtype} {config.opts.group_shapes}"
        case "smooth":
            return f"{config.smooth.proj.strategy}, alpha {config.smooth.proj.alpha}, beta {config.smooth.proj.beta}"
        case "low rank":
            return f"rank {config.wgts.low_rank.rank}, {config.wgts.low_rank.num_iters} rounds"
        case "fold":
            return "values come in the rotated form that attn.proj takes"
        case "rotation":
            return "Hadamard" + ", random signs" * config.rotation.random
        case _:
            return f"strength {config.wgts.ridge}"

"""Post-training quantization of a params tree: calibrate, then apply a chain of transforms, stage by stage."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sam2jq.config.quant import QuantConfig
from sam2jq.files import code_fingerprint
from sam2jq.models.sam2 import FLOW, SAM2, TRUNK_LINEAR, trunk_of
from sam2jq.ptq.bit_targets import choose_bits, choose_input_bits, choose_unsigned
from sam2jq.ptq.calibration import Clips, collect
from sam2jq.ptq.recipe import activation_specs, build_transforms, weight_specs
from sam2jq.ptq.reconstruction import RECONSTRUCT, TRUNK, OnStage, reconstruct_trunk
from sam2jq.ptq.sensitivity import mask_changes
from sam2jq.ptq.stats_cache import CODE
from sam2jq.quant.algorithms.rotate import draw_signs, fold_heads, layer_seed
from sam2jq.quant.algorithms.smooth import Smoothed, recover_alpha_beta
from sam2jq.quant.leaves import materialize_params, unwrap
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import NamedChain, Transform, map_base_weight, named_chain
from sam2jq.tree import fingerprint, flatten, kernels, layer_name, under, unflatten

FOLDED, UNROUNDED = "fold", "unrounded"
Cache = tuple[Path, object]  # a folder for statistics, and a key that tells these clips from others


class Quantized(NamedTuple):
    """A quantized model and how it was made.

    params_by_stage: {stage: params after it}; UNROUNDED is the state before any weight is rounded, and the last is the
    quantized model. FOLDED, if it is there, computes the same as the original params with other weights, so weights are
    compared with those. stats: {layer: Stats}, empty if nothing needed them. config: the recipe, with the bits that
    were chosen for a target; None for a transform.
    """

    params_by_stage: dict[str, dict]
    stats: dict[str, Stats]
    config: QuantConfig | None = None

    @property
    def params(self) -> dict:
        """The quantized params."""
        return list(self.params_by_stage.values())[-1]


def no_stage(name: str, what: str) -> AbstractContextManager:
    """A context that does nothing, for runs that log no stages."""
    return nullcontext([])


def transform_params(
    model: SAM2,
    params: dict,
    transform: Transform | NamedChain,
    clips: Clips,
    *,
    cache: Cache | None = None,
    on_stage: OnStage = no_stage,
) -> Quantized:
    """`params` after `transform`, calibrated on `clips` if the transform needs statistics.

    Raises UserError that names the layer.
    """
    stages = transform if isinstance(transform, NamedChain) else named_chain(("transform", transform))
    stats = {}
    if stages.needs:
        with on_stage("calibrate", "statistics of the inputs of every layer"):
            stats = calibrated(model, materialize_params(params), clips, stages.needs, cache, None)
    return Quantized(dict(stages.steps(params, stats)) or {"transform": params}, stats)  # a chain may be empty


def quantize_params(
    model: SAM2,
    params: dict,
    config: QuantConfig,
    clips: Clips,
    *,
    seed: int = 0,
    needs: Iterable[str] = (),
    cache: Cache | None = None,
    on_stage: OnStage = no_stage,
) -> Quantized:
    """`params`, plain arrays, after every stage of the recipe `config`, calibrated on `clips`.

    needs: statistics to collect beside those that the stages need. cache: where statistics are kept. on_stage(name,
    what it does): a context in which each stage runs. Raises UserError that names the key or the layer.
    """
    weights = {layer_name(path): kernel for path, kernel in kernels(flatten(params)).items()}
    shapes = {layer: w.shape for layer, w in weights.items()}
    needs = frozenset(needs) | target_needs(config)
    build_transforms(config, shapes, TRUNK_LINEAR, seed)  # impossible settings are errors before any work
    by_stage = {}
    if config.rotation.fold_heads:
        with on_stage(FOLDED, describe(config, FOLDED)):
            params = by_stage[FOLDED] = fold_rotations(model, params, config, seed)
    current, stats, allow_unsigned = params, {}, config.ipts.allow_unsigned
    # sequentially, one program collects all layers and is compiled once; else only quantized layers are collected
    collected = None if config.calib.sequential else frozenset(weight_specs(config.wgts, shapes))
    groups = groups_of(config, weights)
    for number, group in enumerate(groups):
        part = f", {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        stages, found = build_transforms(config, shapes, TRUNK_LINEAR, seed, group), {}
        if needs | stages.needs:
            with on_stage("calibrate", f"statistics of the inputs of every layer{part}"):
                plain = materialize_params(current)
                found = calibrated(model, plain, clips, needs | stages.needs, cache, collected)
            stats |= {layer: found[layer] for layer in group if layer in found}
        changes = None
        if config.wgts.mixed and config.wgts.bits_by == "masks":
            with on_stage("masks", "how much each layer changes them when it is rounded"):
                changes = changes_of_masks(model, params, config, found, clips, seed, cache=cache)
        chosen = choose_targets(config, flatten(params), found, changes, group if allow_unsigned else [], on_stage)
        if chosen != config:
            config = chosen
            stages = build_transforms(config, shapes, TRUNK_LINEAR, seed, group)
        for name, transform in stages.stages:
            if name == "weights":
                merge(by_stage, UNROUNDED, params, current, group)
            with on_stage(name, (describe(config, name) or transform.description) + part):
                current = transform.apply(current, stats)
            merge(by_stage, name, params, current, group)
        if config.reconstruct:
            transform = reconstruct_trunk(
                model, params, clips, config.reconstruct, layers=group, kept=cache, on_stage=on_stage
            )
            current = transform.apply(current, stats)
            norms = {layer_name(path) for path in flatten(current) if path.startswith(TRUNK)} - weights.keys()
            merge(by_stage, RECONSTRUCT, params, current, [*group, *norms])
    return Quantized(by_stage, stats, config)


def groups_of(config: QuantConfig, layers: Iterable[str]) -> list[list[str]]:
    """`layers` in groups that are calibrated and quantized one after the other."""
    if config.calib.sequential:
        return in_order(layers)
    if not config.reconstruct:
        return [list(layers)]
    in_trunk = [layer for layer in layers if under(layer, TRUNK)]
    return [in_trunk, [layer for layer in layers if not under(layer, TRUNK)]]


def target_needs(config: QuantConfig) -> frozenset[str]:
    """The statistics that the choice of bits and of unsigned inputs needs."""
    ipts = config.ipts
    needs = {"gram": config.wgts.mixed, "range": ipts.allow_unsigned, "tokens": ipts.mixed}
    return frozenset(name for name, is_needed in needs.items() if is_needed)


def choose_targets(
    config: QuantConfig,
    flat: dict,
    stats: dict[str, Stats],
    changes: dict[str, float] | None,
    unsigned: Iterable[str],
    on_stage: OnStage,
) -> QuantConfig:
    """`config` with the settings that calibration decides: bits for a target, and inputs that are unsigned.

    flat: {path: array} of the params; changes: of the masks, as `choose_bits` takes them; unsigned: the layers whose
    inputs may become unsigned.
    """
    if config.wgts.mixed:
        with on_stage("bits", describe(config, "bits")):
            config = replace(config, wgts=choose_bits(config.wgts, flat, stats, changes))
    if unsigned:
        rounded = activation_specs(config.ipts, weight_specs(config.wgts, map(layer_name, kernels(flat))))
        candidates = {layer: stats[layer] for layer in unsigned if layer in rounded}
        config = choose_unsigned(config, candidates, TRUNK_LINEAR)
    if config.ipts.mixed:
        with on_stage("input bits", describe(config, "input bits")):
            config = choose_input_bits(config, flat, stats)
    return config


def changes_of_masks(
    model: SAM2, params: dict, config: QuantConfig, stats: dict[str, Stats], clips: Clips, seed: int, **settings
) -> dict[str, float]:
    """`mask_changes` when each layer is rounded to the bits of the config without targets; settings: its `cache`."""
    wgts = replace(config.wgts, target_bits=None, target_mb=None)
    plain = flatten(params)
    shapes = {layer_name(path): kernel.shape for path, kernel in kernels(plain).items()}
    stages = build_transforms(replace(config, wgts=wgts), shapes, TRUNK_LINEAR, seed)
    rounded = kernels(flatten(materialize_params(stages.apply(params, stats))))
    layers = weight_specs(wgts, shapes)
    changes = {layer_name(path): w - plain[path] for path, w in rounded.items() if layer_name(path) in layers}
    return mask_changes(model, params, changes, clips, **settings)


def fold_rotations(model: SAM2, params: dict, config: QuantConfig, seed: int) -> dict:
    """`params` of the same model, where the values of the trunk's attentions are made in the rotated form."""
    flat = flatten(params)
    for i, block in enumerate(trunk_of(model.variant).blocks()):
        layer = f"image_encoder.trunk/blocks.{i}/attn"
        paths = [f"{layer}/{name}" for name in ("qkv/kernel", "qkv/bias", "proj/kernel")]
        signs = None
        if config.rotation.random:
            signs = draw_signs(layer_seed(seed, f"{layer}/proj"), block.features)
        flat |= zip(paths, fold_heads(*(flat[path] for path in paths), heads=block.heads, signs=signs))
    return unflatten(flat)


def merge(by_stage: dict[str, dict], name: str, params: dict, current: dict, group: list[str]) -> None:
    """Sets the layers of `group` in by_stage[name] to their state in `current`; other layers start as in `params`."""
    now = {path: leaf for path, leaf in flatten(current).items() if layer_name(path) in group}
    by_stage[name] = unflatten(flatten(by_stage.get(name, params)) | now)


def calibrated(
    model: SAM2, params: dict, clips: Clips, needs: frozenset[str], cache: Cache | None, layers: frozenset[str] | None
) -> dict[str, Stats]:
    """The statistics of `collect`, read from and written to the cache's folder if there is one."""
    if cache is None:
        return collect(model, params, clips, needs, layers=layers)
    folder, key = cache
    name = fingerprint(params, code_fingerprint(*CODE), model, sorted(needs), layers and sorted(layers), key)
    return collect(model, params, clips, needs, folder / f"{name}.npz", layers)


def smoothing_exponents(done: Quantized, full: dict) -> dict[str, tuple[float, float] | None]:
    """{layer: (alpha, beta)} of smoothing, None where groups of inputs have different ones; {} without that stage."""
    names = list(done.params_by_stage)
    if "smooth" not in names:
        return {}
    at = names.index("smooth")
    before = flatten(done.params_by_stage[names[at - 1]] if at else full)
    exponents = {}
    for path, leaf in kernels(flatten(done.params_by_stage["smooth"])).items():
        smoothed = unwrap(leaf)[1].get(Smoothed)
        if smoothed is not None:
            layer = layer_name(path)
            w, stats = base_with_stats(before[path], done.stats[layer])
            exponents[layer] = recover_alpha_beta(w, stats, done.config.smooth.proj, smoothed.scale)
    return exponents


def base_with_stats(leaf, stats: Stats) -> tuple[object, Stats]:
    """The innermost kernel of a leaf and the statistics of that kernel's own inputs."""
    found = []
    map_base_weight(leaf, stats, lambda w, inner_stats: found.append((w, inner_stats)) or w)
    return found[0]


def in_order(layers: Iterable[str]) -> list[list[str]]:
    """`layers` in groups in the order of the forward pass: each block of the trunk, then each component after it."""
    rank = lambda layer: next(i for i, pattern in enumerate(FLOW) if pattern.match(layer))
    blocks = lambda layer: [int(n) for n in re.findall(r"trunk\.blocks\.(\d+)", layer)]
    groups: dict[tuple, list[str]] = {}
    for layer in layers:
        groups.setdefault((rank(layer), *blocks(layer)), []).append(layer)
    return [groups[key] for key in sorted(groups)]


def describe(config: QuantConfig, name: str) -> str:
    """What a stage does, in a few words; "" where the transform's own description says it."""
    match name:
        case "bits":
            target = config.wgts.target_bits
            goal = f"{config.wgts.target_mb} MB" if target is None else f"{target} bits a weight"
            return f"{goal}, by {'output errors' if config.wgts.bits_by == 'outputs' else 'changes of the masks'}"
        case "input bits":
            return f"{config.ipts.target_bits} bits an input, by each layer's output error"
        case "inputs":
            unsigned = f", {len(config.ipts.unsigned)} unsigned" if config.ipts.unsigned else ""
            return f"{config.ipts.dtype} {config.ipts.group_shapes}{', static' * config.ipts.static}{unsigned}"
        case "outputs":
            return f"{config.opts.dtype} {config.opts.group_shapes}"
        case "fold":
            return "values are made in the rotated form for attn.proj"
        case _:
            return ""

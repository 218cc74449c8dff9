"""The `quant` section of a config as transforms of a params tree."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from functools import partial

import jax
import numpy as np

from sam2jq.config.quant import GptqConfig, InputsConfig, LowRankConfig, QuantConfig, SmoothProjConfig, WeightsConfig
from sam2jq.errors import UserError
from sam2jq.quant.algorithms.activations import OutQuantized, is_nonnegative, quantize_inputs
from sam2jq.quant.algorithms.bit_allocation import WIDTHS, assign_bits, error_by_width, input_error_by_width
from sam2jq.quant.algorithms.gptq import GptqSpec, gptq
from sam2jq.quant.algorithms.lowrank import LowRankSpec, low_rank
from sam2jq.quant.algorithms.recalibrate import bias_shift, ridge
from sam2jq.quant.algorithms.rotate import RotationSpec, rotate
from sam2jq.quant.algorithms.smooth import Smoothed, SmoothSpec, recover_alpha_beta, smooth
from sam2jq.quant.leaves import materialize
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Stats, Transform, each_layer, map_base_weight
from sam2jq.tree import flatten, kernels, layer_name, suggest, under, unflatten


def build_transforms(
    config: QuantConfig,
    shapes: Mapping[str, tuple[int, ...]],
    linear: re.Pattern,
    seed: int,
    group: Iterable[str] | None = None,
) -> dict[str, Transform]:
    """{stage: Transform}, in the order they are applied, of all layers or of those in `group`.

    shapes: of all layers' kernels; linear: the names of the layers that may be rotated and have a branch of low rank.
    ValueError: a prefix that names no layer, or a rank above a layer's size.
    """
    weights = weight_specs(config.wgts, shapes)
    inputs, outputs = (activation_specs(of, weights) for of in (config.ipts, config.opts))
    if group is not None:
        chosen = lambda specs: {layer: spec for layer, spec in specs.items() if layer in group}
        weights, inputs, outputs = map(chosen, (weights, inputs, outputs))
    trunk = [layer for layer in weights if linear.fullmatch(layer)]
    found = {}
    if config.rotation.transforms:
        rotated = [layer for layer in trunk if not (config.rotation.fold_heads and layer.endswith("attn.proj"))]
        found["rotation"] = each_layer(rotate, {layer: rotation_spec(config, layer, seed) for layer in rotated})
    if config.wgts.ridge:
        found["ridge"] = each_layer(ridge, dict.fromkeys(weights, config.wgts.ridge), frozenset({"gram"}))
    if proj := config.smooth.proj:
        dense = [layer for layer in weights if len(shapes[layer]) == 2]
        specs = {layer: smooth_spec(proj, weights[layer], inputs.get(layer)) for layer in dense}
        found["smooth"] = each_layer(smooth, specs, frozenset({"gram", "tokens"}))
    if branch := config.wgts.low_rank:
        for layer in trunk:
            if branch.rank > min(shapes[layer]):
                raise UserError(
                    f"quant.wgts.low_rank: rank {branch.rank} is over what {layer} {list(shapes[layer])} allows, "
                    f"{min(shapes[layer])}: lower it, or skip the layer"
                )
        specs = {layer: low_rank_spec(branch, weights[layer], inputs.get(layer)) for layer in trunk}
        found["low rank"] = each_layer(low_rank, specs, frozenset({"gram", "tokens"}))
    found["weights"] = rounding(config.wgts, weights)
    if inputs:
        fn = partial(quantize_inputs, static=config.ipts.static, integer=config.integer)
        found["inputs"] = each_layer(fn, inputs, frozenset({"tokens"} if config.ipts.static else ()))
    if outputs:
        found["outputs"] = rounding_outputs(outputs)
    return found


def rotation_spec(config: QuantConfig, layer: str, seed: int) -> RotationSpec:
    """The rotation of a layer, with signs of its own."""
    return RotationSpec(config.rotation.random, (seed + zlib.crc32(layer.encode())) % 2**32)


def choose_bits(config: WeightsConfig, flat: Mapping[str, object], stats: Mapping[str, Stats]) -> WeightsConfig:
    """`config` with the bits of every layer instead of a target; flat: path -> array.

    ValueError: the target is out of reach.
    """
    paths = {layer_name(path): path for path in kernels(flat)}
    specs = weight_specs(config, paths)
    sizes = {layer: flat[paths[layer]].size for layer in specs}
    errors = lambda layer: error_by_width(flat[paths[layer]], stats[layer].gram, specs[layer])
    if config.target_bits is not None:
        budget = config.target_bits * sum(sizes.values())
    else:
        plain = 32 * sum(leaf.size for path, leaf in flat.items() if path not in {paths[layer] for layer in specs})
        budget = (
            8e6 * config.target_mb - plain - sum(grid_bits(flat[paths[k]].shape, spec) for k, spec in specs.items())
        )
    chosen = allocate_bits(budget, sizes, specs, config.bits, errors)
    return replace(config, bits=config.bits | chosen, target_bits=None, target_mb=None)


def choose_input_bits(config: QuantConfig, flat: Mapping[str, object], stats: Mapping[str, Stats]) -> QuantConfig:
    """`config` with the bits of every layer's inputs instead of a target, their mean over all multiplications.

    ValueError: the target is out of reach.
    """
    paths = {layer_name(path): path for path in kernels(flat)}
    specs = activation_specs(config.ipts, weight_specs(config.wgts, paths))
    work = {layer: multiplications(layer, flat[paths[layer]].shape, stats[layer]) for layer in specs}
    errors = lambda layer: input_error_by_width(flat[paths[layer]], stats[layer].tokens, specs[layer])
    chosen = allocate_bits(config.ipts.target_bits * sum(work.values()), work, specs, config.ipts.bits, errors)
    return replace(config, ipts=replace(config.ipts, bits=config.ipts.bits | chosen, target_bits=None))


def multiplications(layer: str, shape: tuple[int, ...], stats: Stats) -> float:
    """How many a layer with a kernel of this shape took in calibration."""
    return float(stats.count) * math.prod(shape[:-1]) * (1 if depthwise(layer) else shape[-1])


def depthwise(layer: str) -> bool:
    """Whether each channel is convolved alone: `Stats` then count a token for each, and have one mean for all."""
    return layer.endswith("dwconv")


def allocate_bits(
    budget: float,
    costs: Mapping[str, float],
    specs: Mapping[str, QuantSpec],
    fixed: Mapping[str, int],
    errors: Callable[[str], jax.Array],
) -> dict[str, int]:
    """{layer: bits} of those layers in `specs` that no prefix in `fixed` names, for what the others leave of `budget`.

    errors(layer): for each of WIDTHS. ValueError: they are not finite, or the budget is out of reach.
    """
    free = [layer for layer in specs if not any(under(layer, prefix) for prefix in fixed)]
    budget -= sum(specs[layer].bits * costs[layer] for layer in specs if layer not in free)
    table = {}
    for layer in free:
        row = np.asarray(errors(layer))
        if not np.isfinite(row).all():
            raise UserError(f"{layer}: the weight or its inputs hold NaN or infinity: look at the checkpoint and the "
                             "calibration images")  # fmt: skip
        table[layer] = dict(zip(WIDTHS, row.tolist()))
    return assign_bits(table, {layer: costs[layer] for layer in free}, budget)


def choose_unsigned(config: QuantConfig, stats: Mapping[str, Stats], linear: re.Pattern) -> QuantConfig:
    """`config` with the names of those layers in `stats` whose inputs are one-sided, instead of leave to find them.

    linear: as for `stages`; a rotation leaves no input one-sided.
    """
    rotated = lambda layer: config.rotation.transforms and linear.fullmatch(layer)
    found = [layer for layer, seen in stats.items() if not rotated(layer) and is_nonnegative(seen)]
    return replace(config, ipts=replace(config.ipts, unsigned=config.ipts.unsigned + found, allow_unsigned=False))


def grid_bits(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """What the scales, 16 or 32 bits each, and zero points, 8, of a kernel take in a package."""
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    groups = 1 if spec.per_tensor else outputs * math.ceil(inputs / (spec.group_size or inputs))
    return groups * ((16 if spec.scales == "bfloat16" else 32) + (0 if spec.symmetric else 8))


def rounding(config: WeightsConfig, specs: Mapping[str, QuantSpec]) -> Transform:
    """The transform that brings the weights onto their grids."""
    if config.kernel_gptq is None:
        rounded = Transform(frozenset(), lambda params, _: round_weights(params, specs))
    else:
        settings = vars(config.kernel_gptq)
        rounded = each_layer(gptq, {k: GptqSpec(spec, **settings) for k, spec in specs.items()}, frozenset({"gram"}))
    return corrected(rounded, specs) if config.bias_correction else rounded


def rounding_outputs(specs: Mapping[str, QuantSpec]) -> Transform:
    """The transform that rounds what leaves each layer: round all that its kernel is by then."""

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        leaves = {path: leaf for path, leaf in kernels(flatten(params)).items() if layer_name(path) in specs}
        around = {path: OutQuantized(leaf, specs[layer_name(path)]) for path, leaf in leaves.items()}
        return unflatten(flatten(params) | around)

    return Transform(frozenset(), apply)


def onto(parse_spec: QuantSpec, config: WeightsConfig, layers: Iterable[str]) -> Transform:
    """GPTQ of `layers` onto one grid, with the settings of the config or its defaults."""
    settings = replace(config, kernel_gptq=config.kernel_gptq or GptqConfig())
    return rounding(settings, dict.fromkeys(layers, parse_spec))


def corrected(transform: Transform, layers: Iterable[str]) -> Transform:
    """`transform`, and then what it did to the mean output of each layer taken out of the layer's bias."""

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        after = transform.apply(params, stats)
        old, new = flatten(params), flatten(after)
        for path in kernels(new):
            bias, layer = path.replace("kernel", "bias"), layer_name(path)
            if layer in layers and not depthwise(layer):
                new[bias] = new[bias] + bias_shift(materialize(old[path]), materialize(new[path]), stats[layer])
        return unflatten(new)

    return Transform(transform.needs | {"range"}, apply)


def smooth_spec(config: SmoothProjConfig, weights: QuantSpec, inputs: QuantSpec | None) -> SmoothSpec:
    spans = tuple(map(tuple, config.spans))
    return SmoothSpec(**vars(config) | {"spans": spans, "weights": weights, "inputs": inputs})


def smoothing(config: QuantConfig, before: dict, after: dict, stats: Mapping[str, Stats]) -> dict:
    """{layer: (alpha, beta) that smoothing it took, or None where groups of inputs have their own}.

    before, after: the params trees on either side of the stage.
    """
    old, found = flatten(before), {}
    specs = weight_specs(config.wgts, map(layer_name, kernels(old)))
    inputs = activation_specs(config.ipts, specs)
    for path, leaf in flatten(after).items():
        while is_dataclass(leaf) and not isinstance(leaf, Smoothed):
            leaf = getattr(leaf, "inner", None)
        if isinstance(leaf, Smoothed):
            layer, scale = layer_name(path), leaf.scale
            spec = smooth_spec(config.smooth.proj, specs[layer], inputs.get(layer))

            def note(w, stats, layer=layer, spec=spec, scale=scale):
                found[layer] = recover_alpha_beta(w, stats, spec, scale)
                return w

            map_base_weight(old[path], stats[layer], note)
    return found


def low_rank_spec(config: LowRankConfig, weights: QuantSpec, inputs: QuantSpec | None) -> LowRankSpec:
    settings = {name: value for name, value in vars(config).items() if name != "exclusive"}
    return LowRankSpec(**settings, weights=weights, inputs=inputs)


def weight_specs(config: WeightsConfig, layers: Iterable[str]) -> dict[str, QuantSpec]:
    """{layer: spec} of every layer to quantize: those not skipped, each with the bits of its longest prefix.

    ValueError: a prefix that names no layer.
    """
    layers = list(layers)
    check_prefixes("quant.wgts.skips and bits", (*config.skips, *config.bits), layers)

    base = parse_spec(config.dtype, config.group_shapes, config.scale_dtype)
    return {layer: layer_spec(base, config.bits, layer) for layer in kept(layers, config.skips)}


def activation_specs(config: InputsConfig, layers: Iterable[str]) -> dict[str, QuantSpec]:
    """{layer: spec} of every layer whose inputs, or outputs, are rounded: of `layers` those not skipped, each with the
    bits of its longest prefix."""
    layers = list(layers)
    named = (*config.skips, *config.unsigned, *config.bits)
    check_prefixes(f"{config.key}.skips, unsigned and bits", named, layers)
    if config.dtype is None:
        return {}
    base = parse_spec(config.dtype, config.group_shapes)
    is_nonnegative = lambda layer: any(under(layer, prefix) for prefix in config.unsigned)
    of = lambda layer: replace(base, symmetric=False) if is_nonnegative(layer) else base
    return {layer: layer_spec(of(layer), config.bits, layer) for layer in kept(layers, config.skips)}


def layer_spec(spec: QuantSpec, bits: Mapping[str, int], layer: str) -> QuantSpec:
    """`spec` with the bits of the longest prefix of `layer` in `bits`, if there is one."""
    prefix = max((p for p in bits if under(layer, p)), key=len, default=None)
    return spec if prefix is None else replace(spec, bits=bits[prefix])


def parse_spec(dtype: str, group_shapes: list[list[int]], scales: str = "float32") -> QuantSpec:
    """The spec that a config writes as sint4 and [[1, 64]]."""
    [[rows, size]] = group_shapes
    layout = {"group_size": size if size > 0 else None, "per_tensor": rows == -1, "scales": scales}
    bits = int(dtype[-1])
    if dtype == "nvfp4":
        return QuantSpec(bits, codes="float", **layout | {"scales": "e4m3"})
    if dtype.startswith("fp"):
        return QuantSpec(bits, codes="float", **layout)
    return QuantSpec(bits, symmetric=dtype[0] == "s", **layout)


def kept(layers: list[str], skips: Iterable[str]) -> list[str]:
    return [layer for layer in layers if not any(under(layer, prefix) for prefix in skips)]


def check_prefixes(key: str, prefixes: Iterable[str], layers: list[str]) -> None:
    """ValueError if one of the dotted `prefixes` names none of `layers`."""
    idle = [prefix for prefix in prefixes if not any(under(layer, prefix) for layer in layers)]
    if idle:
        meant = suggest(idle[0], {".".join(layer.split(".")[: i + 1]) for layer in layers for i in range(9)})
        raise UserError(
            f"{key}: no layer under {', '.join(idle)}{meant}; layers are named as in the checkpoint, e.g. {layers[0]}"
        )


def layers(params: dict) -> list[str]:
    """The names of all layers that can be quantized: every Dense, Conv and ConvTranspose."""
    return [layer_name(path) for path in kernels(flatten(params))]


def round_weights(params: dict, specs: Mapping[str, QuantSpec]) -> dict:
    """`params` with the kernel of each layer in `specs`, or what is innermost in its leaf, rounded to nearest."""
    flat = flatten(params)
    chosen = {path: kernel for path, kernel in kernels(flat).items() if layer_name(path) in specs}
    rounded = _quantize_all(list(chosen.values()), tuple(specs[layer_name(path)] for path in chosen))
    return unflatten(flat | dict(zip(chosen, rounded)))


@partial(jax.jit, static_argnames="specs")
def _quantize_all(weights: list, specs: tuple[QuantSpec, ...]) -> list:
    """One program for all layers: compiling a hundred small ones takes ten times as long."""
    return [map_base_weight(w, None, lambda w, _, spec=spec: quantize(w, spec)) for w, spec in zip(weights, specs)]

"""A recipe, the section `quant` of a config, as a chain of transforms of a params tree."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from sam2jq.config.quant import QuantConfig, WeightsConfig
from sam2jq.errors import ConfigError, one_of, suggest
from sam2jq.quant.algorithms.activations import InputsConfig, quantize_activations, quantize_outputs
from sam2jq.quant.algorithms.bias_correction import bias_correction
from sam2jq.quant.algorithms.gptq import gptq
from sam2jq.quant.algorithms.lowrank import low_rank
from sam2jq.quant.algorithms.ridge import ridge
from sam2jq.quant.algorithms.rotate import rotate
from sam2jq.quant.algorithms.rtn import rtn
from sam2jq.quant.algorithms.smooth import smooth
from sam2jq.quant.spec import QuantSpec, parse_spec
from sam2jq.quant.transform import NamedChain, Transform, named_chain
from sam2jq.tree import flatten, kernels, layer_name, under

# The rounding algorithms by the names in `wgts.rounding`: functions of {layer: spec}, and of the algorithm's own
# section if it has one, that return a Transform
ROUNDING: dict[str, Callable[..., Transform]] = {
    "nearest": rtn,
    "gptq": gptq,
}


def build_transforms(
    config: QuantConfig,
    shapes: Mapping[str, tuple[int, ...]],
    linear: re.Pattern,
    seed: int,
    layers: Iterable[str] | None = None,
) -> NamedChain:
    """The transforms of a recipe in the order they are applied, for all layers or for `layers`.

    shapes: {layer: shape of its kernel} of all layers. linear: matches the layers that may be rotated and get a
    low-rank branch. Raises ConfigError for a prefix that names no layer, or a rank above a layer's size.
    """
    weights = weight_specs(config.wgts, shapes)
    inputs = activation_specs(config.ipts, weights, "ipts")
    outputs = activation_specs(config.opts, weights, "opts")
    if layers is not None:
        chosen = frozenset(layers)
        weights, inputs, outputs = ({k: s for k, s in of.items() if k in chosen} for of in (weights, inputs, outputs))
    trunk = {layer: spec for layer, spec in weights.items() if linear.fullmatch(layer)}
    stages = []
    if config.rotation.transforms:
        rotated = [layer for layer in trunk if not (config.rotation.fold_heads and layer.endswith("attn.proj"))]
        stages.append(("rotation", rotate(random=config.rotation.random, seed=seed, layers=rotated)))
    if config.wgts.ridge:
        stages.append(("ridge", ridge(config.wgts.ridge, layers=list(weights))))
    if config.smooth.proj:
        dense = {layer: spec for layer, spec in weights.items() if len(shapes[layer]) == 2}
        stages.append(("smooth", smooth(dense, inputs, config.smooth.proj)))
    if config.wgts.low_rank:
        check_rank(config.wgts.low_rank.rank, {layer: shapes[layer] for layer in trunk})
        stages.append(("low rank", low_rank(trunk, inputs, config.wgts.low_rank)))
    stages.append(("weights", rounding(config.wgts, weights)))
    if inputs:
        stages.append(("inputs", quantize_activations(inputs, static=config.ipts.static, integer=config.integer)))
    if outputs:
        stages.append(("outputs", quantize_outputs(outputs)))
    return named_chain(*stages)


def rounding(config: WeightsConfig, specs: Mapping[str, QuantSpec]) -> Transform:
    """The transform that rounds the weights of the layers in `specs`, with bias correction if the config has it.

    Raises ConfigError if there is no rounding algorithm of that name.
    """
    name = rounding_name(config)
    own_section = {"gptq": config.kernel_gptq}.get(name)
    transform = ROUNDING[name](specs) if own_section is None else ROUNDING[name](specs, own_section)
    transform = transform._replace(description=transform.description or name)
    transform = bias_correction(transform, specs) if config.bias_correction else transform
    return transform._replace(description=f"{config.dtype} {config.group_shapes}, {transform.description}")


def rounding_name(config: WeightsConfig) -> str:
    """The key of ROUNDING that the config asks for. Raises ConfigError if there is none of that name."""
    name = config.rounding or ("nearest" if config.kernel_gptq is None else "gptq")
    one_of("wgts.rounding", name, ROUNDING)
    return name


def gptq_onto(grid: QuantSpec, config: WeightsConfig, layers: Iterable[str]) -> Transform:
    """GPTQ of `layers` onto one grid, with the GPTQ settings and the bias correction of the config."""
    return rounding(replace(config, rounding="gptq"), dict.fromkeys(layers, grid))


def check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError if `rank` is above the smaller side of one of the kernels `shapes`."""
    for layer, shape in shapes.items():
        if rank > min(shape):
            raise ConfigError(
                f"wgts.low_rank: rank {rank} is over {min(shape)}, the most for {layer} {list(shape)}: lower it, or "
                "skip the layer"
            )


def weight_specs(config: WeightsConfig, layers: Iterable[str]) -> dict[str, QuantSpec]:
    """{layer: spec} of every layer to quantize: those not skipped, each with the bits of its longest prefix.

    Raises ConfigError for a prefix that names no layer.
    """
    layers = list(layers)
    check_prefixes("wgts.skips and bits", (*config.skips, *config.bits), layers)
    base = parse_spec(config.dtype, config.group_shapes, config.scale_dtype)
    return {layer: layer_spec(base, config.bits, layer) for layer in without(layers, config.skips)}


def activation_specs(config: InputsConfig, layers: Iterable[str], key: str = "ipts") -> dict[str, QuantSpec]:
    """{layer: spec} of every layer whose inputs, or outputs, are rounded: those of `layers` that are not skipped.

    Each has the bits of its longest prefix. key: the section's name, for errors. Raises ConfigError for a prefix that
    names no layer.
    """
    layers = list(layers)
    check_prefixes(f"{key}.skips, unsigned and bits", (*config.skips, *config.unsigned, *config.bits), layers)
    if config.dtype is None:
        return {}
    signed = parse_spec(config.dtype, config.group_shapes)
    is_unsigned = lambda layer: any(under(layer, prefix) for prefix in config.unsigned)
    base = lambda layer: replace(signed, symmetric=False) if is_unsigned(layer) else signed
    return {layer: layer_spec(base(layer), config.bits, layer) for layer in without(layers, config.skips)}


def layer_spec(spec: QuantSpec, bits: Mapping[str, int], layer: str) -> QuantSpec:
    """`spec` with the bits of the longest prefix of `layer` in `bits`, if there is one."""
    prefix = max((p for p in bits if under(layer, p)), key=len, default=None)
    return spec if prefix is None else replace(spec, bits=bits[prefix])


def without(layers: list[str], skips: Iterable[str]) -> list[str]:
    """`layers` without those under a prefix in `skips`."""
    return [layer for layer in layers if not any(under(layer, prefix) for prefix in skips)]


def check_prefixes(key: str, prefixes: Iterable[str], layers: list[str]) -> None:
    """Raises ConfigError if one of the dotted `prefixes`, from the setting `key`, names none of `layers`."""
    unused = [prefix for prefix in prefixes if not any(under(layer, prefix) for layer in layers)]
    if unused:
        near = suggest(unused[0], {".".join(layer.split(".")[: i + 1]) for layer in layers for i in range(9)})
        raise ConfigError(
            f"{key}: no layer under {', '.join(unused)}{near}; layers are named as in the checkpoint, e.g. {layers[0]}"
        )


def layers(params: dict) -> list[str]:
    """The names of all layers that can be quantized: every Dense, Conv and ConvTranspose."""
    return [layer_name(path) for path in kernels(flatten(params))]

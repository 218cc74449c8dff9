"""Settings that calibration decides: bits by layer for a target, and which inputs can be unsigned."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np

from sam2jq.config.quant import QuantConfig, WeightsConfig
from sam2jq.errors import UserError
from sam2jq.ptq.recipe import activation_specs, weight_specs
from sam2jq.quant.algorithms.activations import is_nonnegative
from sam2jq.quant.algorithms.bias_correction import is_depthwise
from sam2jq.quant.algorithms.bit_allocation import WIDTHS, assign_bits, error_by_width, input_error_by_width
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.tree import kernels, layer_name, under


def choose_bits(
    config: WeightsConfig,
    flat: Mapping[str, object],
    stats: Mapping[str, Stats],
    changes: Mapping[str, float] | None = None,
) -> WeightsConfig:
    """`config` with the bits of every layer in place of a target; flat: {path: array} of the params.

    Bits are chosen by the output error of each layer, or by changes {layer: squared change of the masks if the layer is
    rounded to the bits of the config}, which falls with the square of the grid's step. Raises UserError if the target
    is out of reach.
    """
    paths = {layer_name(path): path for path in kernels(flat)}
    specs = weight_specs(config, paths)
    sizes = {layer: flat[paths[layer]].size for layer in specs}
    if changes is None:
        errors = lambda layer: error_by_width(flat[paths[layer]], stats[layer].gram, specs[layer])
    else:
        steps = lambda bits: 2.0 ** np.asarray(bits) - 1
        errors = lambda layer: changes[layer] * (steps(specs[layer].bits) / steps(WIDTHS)) ** 2
    if config.target_bits is not None:
        budget = config.target_bits * sum(sizes.values())
    else:
        quantized = {paths[layer] for layer in specs}
        unquantized_bits = 32 * sum(leaf.size for path, leaf in flat.items() if path not in quantized)
        scale_bits = sum(grid_bits(flat[paths[layer]].shape, spec) for layer, spec in specs.items())
        budget = 8e6 * config.target_mb - unquantized_bits - scale_bits
    chosen = allocate_bits(budget, sizes, specs, config.bits, errors)
    return replace(config, bits=config.bits | chosen, target_bits=None, target_mb=None)


def choose_input_bits(config: QuantConfig, flat: Mapping[str, object], stats: Mapping[str, Stats]) -> QuantConfig:
    """`config` with the bits of every layer's inputs in place of a target for their mean over all multiplications.

    Raises UserError if the target is out of reach.
    """
    paths = {layer_name(path): path for path in kernels(flat)}
    specs = activation_specs(config.ipts, weight_specs(config.wgts, paths))
    costs = {layer: multiplications(layer, flat[paths[layer]].shape, stats[layer]) for layer in specs}
    errors = lambda layer: input_error_by_width(flat[paths[layer]], stats[layer].tokens, specs[layer])
    chosen = allocate_bits(config.ipts.target_bits * sum(costs.values()), costs, specs, config.ipts.bits, errors)
    return replace(config, ipts=replace(config.ipts, bits=config.ipts.bits | chosen, target_bits=None))


def choose_unsigned(config: QuantConfig, stats: Mapping[str, Stats], linear: re.Pattern) -> QuantConfig:
    """`config` with the layers of `stats` whose inputs are nonnegative in `ipts.unsigned`, and allow_unsigned off.

    linear: as for `build_transforms`; rotated inputs are never nonnegative.
    """
    is_rotated = lambda layer: config.rotation.transforms and linear.fullmatch(layer)
    found = [layer for layer, inputs in stats.items() if not is_rotated(layer) and is_nonnegative(inputs)]
    return replace(config, ipts=replace(config.ipts, unsigned=config.ipts.unsigned + found, allow_unsigned=False))


def allocate_bits(
    budget: float,
    costs: Mapping[str, float],
    specs: Mapping[str, QuantSpec],
    fixed: Mapping[str, int],
    errors: Callable[[str], jax.Array],
) -> dict[str, int]:
    """{layer: bits} of the layers in `specs` that no prefix in `fixed` names, within what the others leave of `budget`.

    costs: {layer: cost of one bit}. errors(layer): the error at each of WIDTHS. Raises UserError if errors are not
    finite, or the budget is out of reach.
    """
    free = [layer for layer in specs if not any(under(layer, prefix) for prefix in fixed)]
    budget -= sum(specs[layer].bits * costs[layer] for layer in specs if layer not in free)
    table = {}
    for layer in free:
        row = np.asarray(errors(layer))
        if not np.isfinite(row).all():
            raise UserError(
                f"{layer}: the weight or its inputs hold NaN or infinity: look at the checkpoint and the calibration "
                "images"
            )
        table[layer] = dict(zip(WIDTHS, row.tolist()))
    return assign_bits(table, {layer: costs[layer] for layer in free}, budget)


def multiplications(layer: str, shape: tuple[int, ...], stats: Stats) -> float:
    """The number of multiplications in calibration of a layer with a kernel of this shape."""
    return float(stats.count) * math.prod(shape[:-1]) * (1 if is_depthwise(layer) else shape[-1])


def grid_bits(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """The bits of a kernel's scales, 16 or 32 each, and zero points, 8 each, in a package."""
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    groups = 1 if spec.per_tensor else outputs * math.ceil(inputs / (spec.group_size or inputs))
    return groups * ((16 if spec.scales == "bfloat16" else 32) + (0 if spec.symmetric else 8))

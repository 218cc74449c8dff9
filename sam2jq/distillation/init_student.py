"""The student before training: its layers on their grids, and the bits they start with."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np

from sam2jq.config.distill import DistillConfig, DistillLossConfig
from sam2jq.data.loader import Item, read_item
from sam2jq.distillation.schedule import bit_search
from sam2jq.errors import UserError, section
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.calibration import collect
from sam2jq.ptq.recipe import activation_specs, check_prefixes, weight_specs
from sam2jq.quant.algorithms.activations import quantize_inputs
from sam2jq.quant.algorithms.bit_allocation import WIDTHS, error_by_width
from sam2jq.quant.algorithms.fake_quant import init_fake_quant
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import base_weight, materialize_params
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import each_layer
from sam2jq.tree import flatten, kernels, layer_name, unflatten

LOOKED_AT = 32  # clips that tell the ladder what enters a layer


def collect_input_stats(
    model: SAM2,
    params: dict,
    clips: list[Item],
    config: DistillLossConfig,
    on_stage: Callable = lambda name, what: nullcontext(),
) -> dict[str, Stats]:
    """{layer: Stats} of the first of `clips` where the ladder goes by outputs, else nothing."""
    if (config.confidence_method, config.confidence_on) != ("ladder", "output"):
        return {}
    size = model.variant.image_size
    with on_stage("calibrate", f"what enters each layer, {len(clips[:LOOKED_AT])} clips"):
        frames = lambda n: (read_item(clip, size) for clip in clips[n:LOOKED_AT])
        return collect(model, materialize_params(params), frames, {"gram"})


def errors_by_width(
    params: dict, specs: dict[str, QuantSpec], widths: list[int], stats: dict[str, Stats]
) -> dict[str, dict[int, float]]:
    """{layer: {bits: error}} of rounding to nearest: |x w_hat - x w| / |x w| for the inputs x of layers in `stats`,
    |w_hat - w| / |w| of others."""
    plain, errors = flatten(materialize_params(params)), {layer: {} for layer in specs}
    if stats:
        for path, w in kernels(plain).items():
            if spec := specs.get(layer := layer_name(path)):
                lost = np.sqrt(error_by_width(w, stats[layer].gram, spec)).tolist()
                errors[layer] = dict(zip(WIDTHS, lost))
        return errors
    for bits in widths:
        at = {layer: replace(spec, bits=bits) for layer, spec in specs.items()}
        rounded = flatten(materialize_params(round_weights(unflatten(plain), at)))
        for path in kernels(plain):
            if layer_name(path) in specs:
                errors[layer_name(path)][bits] = relative_error(rounded[path], plain[path])
    return errors


def check_pair(teacher: SAM2, model: SAM2) -> None:
    """ValueError unless a student can learn from a teacher: sizes may differ, what the decoder gets may not."""
    theirs, own = teacher.variant, model.variant
    for name in ("image_size", "features", "memory_features"):
        if getattr(theirs, name) != getattr(own, name):
            raise UserError(
                f"teacher and student: {name} is {getattr(theirs, name)} and {getattr(own, name)}: a student learns "
                "from a teacher of the same, such as nano from nano, tiny from small, base-plus from large"
            )


@section("quant")
def start(params: dict, config: DistillConfig, stats: dict[str, Stats] | None = None) -> dict:
    """The student: layers of the checkpoint that are quantized keep their grids, the others start on the config's.

    stats: as `collect_input_stats` finds them, for a ladder that goes by outputs.
    """
    quant, flat = config.quant, kernels(flatten(params))
    wgts = quant.wgts
    if quant.initial_bits is not None:
        wgts = replace(wgts, dtype=f"{wgts.dtype[:-1]}{quant.initial_bits}")
    layers = [layer_name(path) for path in flat]
    specs = weight_specs(wgts, layers)
    check_prefixes("target_roots", quant.target_roots, layers)
    if config.distill.confidence_method == "ladder":
        rungs = [bits for bits in config.distill.bit_candidates if bits >= quant.min_bits]
        chosen = bit_search(
            errors_by_width(params, specs, rungs, stats or {}), rungs, config.distill.confidence_threshold
        )
        specs = {layer: replace(spec, bits=chosen[layer]) for layer, spec in specs.items()}
    made = init_fake_quant(params, specs)
    if quant.ipts.dtype is None:
        return made
    bare = [layer for path, layer in zip(flat, layers) if not isinstance(base_weight(flat[path]), QTensor)]
    inputs = {layer: spec for layer, spec in activation_specs(quant.ipts, specs).items() if layer in bare}
    return each_layer(partial(quantize_inputs, static=quant.ipts.static), inputs).apply(made, {})

"""The student before training: its layers on their grids, and the bits they start with."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np

from sam2jq.config.distill import DistillConfig, DistillLossConfig, StudentConfig
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

CALIBRATION_CLIPS = 32  # clips whose layer inputs the method "ladder" calibrates on


def collect_input_stats(
    model: SAM2,
    params: dict,
    clips: list[Item],
    config: DistillLossConfig,
    on_stage: Callable = lambda name, what: nullcontext(),
) -> dict[str, Stats]:
    """{layer: Stats} with the Gram matrices of the layers' inputs on the first of `clips`.

    It is empty unless confidence_method is "ladder" and confidence_on is "output".
    """
    if (config.confidence_method, config.confidence_on) != ("ladder", "output"):
        return {}
    size, clips = model.variant.image_size, clips[:CALIBRATION_CLIPS]
    with on_stage("calibrate", f"inputs of each layer, {len(clips)} clips"):
        frames = lambda n, step=1: (read_item(clip, size) for clip in clips[n::step])
        return collect(model, materialize_params(params), frames, {"gram"})


def errors_by_width(
    params: dict, specs: dict[str, QuantSpec], widths: list[int], stats: dict[str, Stats]
) -> dict[str, dict[int, float]]:
    """{layer: {bits: relative error of rounding the layer to nearest}} for the layers in `specs`.

    The error is that of the outputs, |x w_hat - x w| / |x w|, where `stats` holds Gram matrices of the inputs x, and
    |w_hat - w| / |w| where `stats` is empty.
    """
    arrays, errors = flatten(materialize_params(params)), {layer: {} for layer in specs}
    if stats:
        for path, w in kernels(arrays).items():
            if spec := specs.get(layer := layer_name(path)):
                output_errors = np.sqrt(error_by_width(w, stats[layer].gram, spec)).tolist()
                errors[layer] = dict(zip(WIDTHS, output_errors))
        return errors
    for bits in widths:
        specs_at_bits = {layer: replace(spec, bits=bits) for layer, spec in specs.items()}
        rounded = flatten(materialize_params(round_weights(unflatten(arrays), specs_at_bits)))
        for path in kernels(arrays):
            if layer_name(path) in specs:
                errors[layer_name(path)][bits] = relative_error(rounded[path], arrays[path])
    return errors


def check_pair(teacher: SAM2, student: SAM2) -> None:
    """Raises UserError unless both models have the same image size and widths of feature maps and memories."""
    for name in ("image_size", "features", "memory_features"):
        sizes = [getattr(model.variant, name) for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"teacher and student: {name} is {sizes[0]} and {sizes[1]}: a student learns "
                "from a teacher of the same, such as nano from nano, tiny from small, base-plus from large"
            )


@section("quant")
def start(params: dict, config: DistillConfig, stats: dict[str, Stats] | None = None) -> dict:
    """The fake-quantized student: quantized layers of `params` keep their grids, the others get the config's.

    stats: from `collect_input_stats`, for confidence_on "output". Raises UserError if a layer prefix in the config
    matches no layer, or if no width is accurate enough for a layer.
    """
    quant, flat = config.quant, kernels(flatten(params))
    layers = [layer_name(path) for path in flat]
    specs = initial_specs(quant, layers)
    check_prefixes("target_roots", quant.target_roots, layers)
    if config.distill.confidence_method == "ladder":
        widths = [bits for bits in config.distill.bit_candidates if bits >= quant.min_bits]
        errors = errors_by_width(params, specs, widths, stats or {})
        chosen = bit_search(errors, widths, config.distill.confidence_threshold)
        specs = {layer: replace(spec, bits=chosen[layer]) for layer, spec in specs.items()}
    student = init_fake_quant(params, specs)
    if quant.ipts.dtype is None:
        return student
    plain = {layer for path, layer in zip(flat, layers) if not isinstance(base_weight(flat[path]), QTensor)}
    inputs = {layer: spec for layer, spec in activation_specs(quant.ipts, specs).items() if layer in plain}
    return each_layer(partial(quantize_inputs, static=quant.ipts.static), inputs).apply(student, {})


def initial_specs(quant: StudentConfig, layers: list[str]) -> dict[str, QuantSpec]:
    """{layer: QuantSpec} for the layers that `quant.wgts` does not skip, at `quant.initial_bits` where it is set."""
    wgts = quant.wgts
    if quant.initial_bits is not None:
        wgts = replace(wgts, dtype=f"{wgts.dtype[:-1]}{quant.initial_bits}")
    return weight_specs(wgts, layers)

"""Bias correction: the shift that quantization causes in a layer's mean output is subtracted from its bias.

The first-order form of arXiv 1906.04721, section 4.2, with the mean input of calibration.
"""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from sam2jq.quant.leaves import materialize
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform
from sam2jq.tree import bias_path, flatten, kernels, layer_name, unflatten


def bias_correction(transform: Transform, layers: Iterable[str] | None = None) -> Transform:
    """A Transform that applies `transform` and corrects the biases beside the kernels that it changed.

    layers: restricts the correction to these. Depthwise convolutions are left out, since their statistics are one mean
    for all channels.
    """
    layers = None if layers is None else frozenset(layers)

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        before, after = flatten(params), flatten(transform.apply(params, stats))
        for path in kernels(after):
            layer = layer_name(path)
            is_chosen = after[path] is not before[path] if layers is None else layer in layers
            if is_chosen and not is_depthwise(layer):
                bias = np.asarray(after[bias_path(path)])
                after[bias_path(path)] = jax.device_put(bias + bias_shift(before[path], after[path], stats[layer]))
        return unflatten(after)

    return Transform(transform.needs | {"range"}, apply, f"{transform.description}, bias correction")


def is_depthwise(layer: str) -> bool:
    """Whether `layer` is a depthwise convolution: its `Stats` count one token per channel and hold one mean for all."""
    return layer.endswith("dwconv")


def bias_shift(before, after, stats: Stats) -> np.ndarray:
    """[N]: E[x] @ (before - after). Added to the bias, it keeps the mean output when `after` replaces `before`.

    Both are kernels or weight leaves. For a grouped Conv, E[x] is the mean of all groups.
    """
    before, after = (np.asarray(materialize(jax.device_get(leaf))) for leaf in (before, after))  # compiles nothing
    return np.asarray(stats.mean) @ (before - after).reshape(len(stats.mean), -1)

"""Leaves that a format cannot hold, in the nearest form that it can: `sam2jq export --nearest`."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from sam2jq.errors import few
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.leaves import base_weight, materialize, unwrap
from sam2jq.quant.qtensor import QTensor, quantize
from sam2jq.tree import flatten, kernels, layer_name, unflatten

log = logging.getLogger("sam2jq")


def round_again(params: dict, why_refused: Callable[[object], str], nearest_leaf: Callable) -> dict:
    """`params` with nearest_leaf(leaf) for each leaf that is `why_refused`; logs which layers change in what."""
    flat = flatten(params)
    refused = {path: leaf for path, leaf in kernels(flat).items() if why_refused(leaf)}
    changed = {path: nearest_leaf(leaf) for path, leaf in refused.items()}
    again = [path for path, leaf in changed.items() if base_weight(leaf) is not base_weight(refused[path])]
    unrounded = [path for path, leaf in changed.items() if rounds(refused[path]) - rounds(leaf)]
    for paths, what in (again, "weights rounded again, to nearest"), (unrounded, "inputs and outputs not rounded"):
        if paths:
            log.warning("nearest     %s: %s", what, few(list(map(layer_name, paths)), 3))
    return unflatten(flat | changed)


def rounds(leaf) -> set[type]:
    """Which of the leaves that round inputs and outputs are around a weight."""
    return {ActQuantized, OutQuantized} & unwrap(leaf)[1].keys()


def without(leaf, classes: Iterable[type]):
    """`leaf` without the leaves of `classes` around its weight."""
    classes = set(classes)
    if not hasattr(leaf, "inner"):
        return leaf
    inner = without(leaf.inner, classes)
    return inner if type(leaf) in classes else replace(leaf, inner=inner)


def bare(leaf):
    """The equivalent weight of a leaf without leaves around it, rounded to nearest in whole numbers of as many bits and
    in the same groups, if it was rounded at all."""
    weight = base_weight(leaf)
    if weight is leaf and (not isinstance(weight, QTensor) or weight.spec.codes == "int"):
        return leaf
    if not isinstance(weight, QTensor):
        return materialize(leaf)
    return quantize(materialize(leaf), replace(weight.spec, codes="int", scales="float32"))

"""Rounding to nearest (RTN), the baseline: each weight goes to the nearest point of the grid that spans its group."""

from collections.abc import Mapping
from functools import partial

import jax

from sam2jq.quant.leaves import base_weight
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import Transform, check_unrounded, map_base_weight, specs_by_layer
from sam2jq.tree import flatten, kernels, layer_name, unflatten


def rtn(weights: QuantSpec | Mapping[str, QuantSpec], *, match: str = ".*") -> Transform:
    """A Transform that rounds kernels to nearest by `weights`, one spec or {layer: spec}; it needs no statistics.

    match: with one spec, the regular expression of the layers' names.
    """
    apply = lambda params, stats: round_weights(params, specs_by_layer(params, weights, match))
    return Transform(frozenset(), apply, "to nearest")


def round_weights(params: dict, specs: Mapping[str, QuantSpec]) -> dict:
    """`params` with the kernel of each layer in `specs`, or the innermost kernel of its leaf, rounded to nearest.

    Raises UserError if one is rounded already, or is no layer of `params`.
    """
    flat = flatten(params)
    specs = specs_by_layer(params, specs)
    chosen = {path: kernel for path, kernel in kernels(flat).items() if layer_name(path) in specs}
    for path, kernel in chosen.items():
        check_unrounded(base_weight(kernel), layer_name(path))
    rounded = _quantize_all(list(chosen.values()), tuple(specs[layer_name(path)] for path in chosen))
    return unflatten(flat | dict(zip(chosen, rounded)))


@partial(jax.jit, static_argnames="specs")
def _quantize_all(weights: list, specs: tuple[QuantSpec, ...]) -> list:
    """One program for all layers: compiling a hundred small ones takes ten times as long."""
    return [map_base_weight(w, None, lambda w, _, spec=spec: quantize(w, spec)) for w, spec in zip(weights, specs)]

"""Transforms: quantization steps as pure functions of a params tree, which compose as in optax.

    w4 = QuantSpec(bits=4, group_size=64)
    transform = chain(smooth(weights=w4), low_rank(weights=w4), gptq(w4))
    params = transform.apply(params, stats)  # stats: {layer: Stats} of calibration, with all of transform.needs

A layer is named as its torch module, such as "image_encoder.trunk.blocks.0.attn.qkv".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce, singledispatch
from typing import NamedTuple

import jax
import numpy as np

from sam2jq.errors import UserError, suggest
from sam2jq.quant.leaves import unwrap
from sam2jq.quant.stats import Stats
from sam2jq.tree import flatten, kernels, layer_name, unflatten

Array = jax.Array
LeafFn = Callable[[object, Stats | None], object]  # (kernel, statistics of its inputs) -> kernel or weight leaf


class Transform(NamedTuple):
    """A pure function of a params tree and the statistics of its layers' inputs.

    apply(params, {layer: Stats}) returns new params; it never changes its arguments. `needs` says which statistics it
    reads: "range" (always collected with the others), "gram", "tokens". `description` is for logs.
    """

    needs: frozenset[str]
    apply: Callable[[dict, Mapping[str, Stats]], dict]
    description: str = ""


class NamedChain(NamedTuple):
    """Transforms with their names, applied left to right. It has `needs` and `apply`, so it is used as a Transform."""

    stages: tuple[tuple[str, Transform], ...]

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that any of the stages needs."""
        return frozenset().union(*(transform.needs for _, transform in self.stages))

    @property
    def description(self) -> str:
        """The names of the stages."""
        return ", ".join(name for name, _ in self.stages)

    def apply(self, params: dict, stats: Mapping[str, Stats]) -> dict:
        """`params` after all stages."""
        return chain(*(transform for _, transform in self.stages)).apply(params, stats)

    def steps(self, params: dict, stats: Mapping[str, Stats]) -> Iterator[tuple[str, dict]]:
        """Yields (name, params after the stage) for each stage."""
        for name, transform in self.stages:
            params = transform.apply(params, stats)
            yield name, params


def chain(*transforms: Transform | NamedChain) -> Transform:
    """A Transform that applies `transforms` left to right. Raises UserError if one of them is no transform."""
    for transform in transforms:
        check_transform(transform)

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        return reduce(lambda params, transform: transform.apply(params, stats), transforms, params)

    needs = frozenset().union(*(transform.needs for transform in transforms))
    return Transform(needs, apply, ", ".join(transform.description for transform in transforms))


def check_transform(transform: object) -> None:
    """Raises UserError unless `transform` is a Transform or a NamedChain."""
    if not isinstance(transform, Transform | NamedChain):
        raise UserError(f"expected a transform, as sam2jq.gptq(...) returns it, got {transform!r:.80}")


def named_chain(*stages: tuple[str, Transform]) -> NamedChain:
    """A NamedChain of (name, transform) pairs, applied left to right.

    Raises UserError if two stages have one name, or if one holds no transform.
    """
    for _, transform in stages:
        check_transform(transform)
    names = [name for name, _ in stages]
    if len(set(names)) < len(names):
        raise UserError(f"stages of a chain need different names, got {', '.join(names)}")
    return NamedChain(stages)


def each_layer(
    fn: Callable,
    specs: object,
    needs: frozenset[str] | set[str] = frozenset(),
    *,
    match: str = ".*",
    dense_only: bool = False,
    description: str = "",
) -> Transform:
    """A Transform that replaces the kernel of every chosen layer by fn(kernel, stats, spec).

    specs: {layer: spec} for exactly these layers, or one spec for all layers whose name matches the regular expression
    `match` (with `dense_only` those with a kernel [in, out]). Without `needs`, `stats` may be None. Inside a weight
    leaf, fn gets the innermost kernel and the statistics of that kernel's own inputs.

    `apply` raises UserError if no layer matches, if statistics are missing, or with the layer's name what fn raises.
    """

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        flat = flatten(params)
        paths = {layer_name(path): path for path in kernels(flat)}
        chosen = specs_by_layer(params, specs, match, dense_only)
        missing = [layer for layer in chosen if needs and layer not in stats]
        if missing:
            raise UserError(f"calibration has no statistics of {', '.join(missing[:10])}: these layers never ran")
        for layer, spec in chosen.items():
            leaf_fn = lambda w, stats, spec=spec: fn(w, stats, spec)
            try:
                flat[paths[layer]] = map_base_weight(flat[paths[layer]], stats.get(layer), leaf_fn)
            except UserError as error:
                raise UserError(f"layer {layer}: {error}") from error
        return unflatten(flat)

    return Transform(frozenset(needs), apply, description)


def specs_by_layer(params: dict, specs: object, match: str = ".*", dense_only: bool = False) -> Mapping[str, object]:
    """{layer: spec}: `specs` itself if it is a mapping, else that one spec for every layer that `match_layers` finds.

    Raises UserError if a layer is not in `params`, or if none matches.
    """
    if not isinstance(specs, Mapping):
        return dict.fromkeys(match_layers(params, match, dense_only), specs)
    known = {layer_name(path) for path in kernels(flatten(params))}
    unknown = [layer for layer in specs if layer not in known]
    if unknown:
        raise UserError(f"the params have no layer {', '.join(unknown[:10])}{suggest(unknown[0], known)}")
    return specs


def check_unrounded(w: object, layer: str = "") -> None:
    """Raises UserError, which names `layer`, if `w` is not an array, because an earlier transform rounded it."""
    if not isinstance(w, jax.Array | np.ndarray):
        where = f"layer {layer}: " if layer else ""
        raise UserError(f"{where}the weight is rounded already, it is a {type(w).__name__}: round each layer once")


def match_layers(params: dict, match: str, dense_only: bool = False) -> list[str]:
    """The layers of `params` whose name matches the regular expression `match`, with `dense_only` the Dense ones.

    Raises UserError if there is none.
    """
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise UserError(f"match {match!r} is not a regular expression: {error}") from error
    layers = {layer_name(path): leaf for path, leaf in kernels(flatten(params)).items()}
    is_dense = lambda leaf: jax.tree.leaves(unwrap(leaf)[0])[0].ndim == 2
    found = [k for k, leaf in layers.items() if pattern.fullmatch(k) and (is_dense(leaf) or not dense_only)]
    if not found:
        raise UserError(f"match {match!r} fits no layer; layers are named like {', '.join(list(layers)[:3])}")
    return found


def pair_specs(weights: object, inputs: object) -> object:
    """(weights, inputs), or where `weights` is a mapping {layer: (weight spec, input spec or None)}."""
    if not isinstance(weights, Mapping):
        return weights, inputs
    input_of = inputs.get if isinstance(inputs, Mapping) else lambda layer: inputs
    return {layer: (spec, input_of(layer)) for layer, spec in weights.items()}


@singledispatch
def map_base_weight(w, stats: Stats | None, fn: LeafFn):
    """`w` with its innermost kernel k replaced by fn(k, statistics of k's inputs); leaves around k stay as they are.

    Each weight leaf registers how the statistics change on the way through it.
    """
    return fn(w, stats)

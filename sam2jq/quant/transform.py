"""Quantization as functions of a params tree: what a transform is, what it is told, and how several make one.

Letters: K inputs of an output, the kernel's axes but for the last, flattened; T sampled tokens; N outputs.
"""

from collections.abc import Callable, Mapping
from functools import reduce, singledispatch
from typing import NamedTuple

import jax

from sam2jq.errors import UserError
from sam2jq.tree import flatten, layer_name, unflatten

Array = jax.Array


class Stats(NamedTuple):
    """What the inputs x [tokens, K] of a layer were like; fields that nothing needed are None.

    The tokens of a Conv are the patches under its kernel, those of a grouped one of all groups together.
    """

    mean: Array  # [K]
    low: Array  # [K]
    high: Array  # [K]
    gram: Array | None = None  # [K, K]: x^T x / tokens
    tokens: Array | None = None  # [T, K], drawn evenly from all
    count: Array | None = None  # [], tokens seen

    def scaled(self, factor: Array) -> "Stats":
        """The statistics of x * factor, for factors [K] > 0."""
        both = None if self.gram is None else self.gram * factor[:, None] * factor
        tokens = None if self.tokens is None else self.tokens * factor
        return Stats(self.mean * factor, self.low * factor, self.high * factor, both, tokens, self.count)

    def rotated(self, apply_hadamard: Callable[[Array], Array]) -> "Stats":
        """The statistics of turn(x), a linear function of rows [..., K]; its range is that of the tokens."""
        both = None if self.gram is None else apply_hadamard(apply_hadamard(self.gram).T).T
        tokens = None if self.tokens is None else apply_hadamard(self.tokens)
        low, high = (self.low, self.high) if tokens is None else (tokens.min(0), tokens.max(0))
        return Stats(apply_hadamard(self.mean), low, high, both, tokens, self.count)


class Transform(NamedTuple):
    """apply(params, {layer: Stats}) -> params; needs: which of "gram" and "tokens" the Stats must hold beside the
    range, and "range" where that is all."""

    needs: frozenset[str]
    apply: Callable[[dict, Mapping[str, Stats]], dict]


LeafFn = Callable[[object, Stats | None], object]  # of one kernel: w, what enters it -> a leaf


@singledispatch
def map_base_weight(w, stats: Stats | None, fn: LeafFn):
    """`w` with its innermost part p replaced by change(p, what enters p); a leaf around it stays as it is."""
    return fn(w, stats)


def each_layer(fn: Callable, specs: Mapping[str, object], needs: frozenset[str] = frozenset()) -> Transform:
    """The transform that makes change(w, stats, spec) of the kernel of every layer in `specs`.

    Without needs it works without statistics too, and stats may be None.
    """

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        flat = flatten(params)
        paths = {layer_name(path): path for path in flat if path.endswith("/kernel")}
        missing = [layer for layer in specs if needs and layer not in stats]
        if missing:
            raise UserError(f"no statistics of {', '.join(missing)}: calibration never reached them")
        for layer, spec in specs.items():
            leaf_fn = lambda w, stats, spec=spec: fn(w, stats, spec)
            try:
                flat[paths[layer]] = map_base_weight(flat[paths[layer]], stats.get(layer), leaf_fn)
            except UserError as error:
                raise UserError(f"layer {layer}: {error}") from error
        return unflatten(flat)

    return Transform(frozenset(needs), apply)


def chain(*transforms: Transform) -> Transform:
    """Applies `transforms` from left to right."""

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        return reduce(lambda params, transform: transform.apply(params, stats), transforms, params)

    return Transform(frozenset().union(*(t.needs for t in transforms)), apply)

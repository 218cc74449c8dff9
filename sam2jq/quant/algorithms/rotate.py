"""Rotation: a layer's inputs are multiplied by an orthogonal matrix, which spreads outliers, and its weight likewise.

As in QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456) the matrix is R = diag(signs) H / sqrt(n) with a Hadamard
matrix H of size n. The product x R is cheap (hadamard.py), and x W = (x R) (R^T W).

Letters: K inputs, N outputs; for attention C inputs and width D.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import ConfigError, UserError, one_of
from sam2jq.quant.algorithms.hadamard import fast_hadamard
from sam2jq.quant.field_types import check_types
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.transform import Transform, each_layer, map_base_weight, match_layers

Array = jax.Array


@dataclass(frozen=True)
class RotationConfig:
    """How inputs are rotated: the section `quant.rotation`."""

    # [hadamard] rotates the inputs of qkv, attn.proj and both MLP layers of the trunk; [] rotates nothing
    transforms: list[str] = field(default_factory=list)
    # multiply the inputs by random signs first, drawn from the run's seed
    random: bool = False
    # rotate the input of attn.proj head by head, folded into the weights that make the values: no cost at run time
    fold_heads: bool = False

    def __post_init__(self):
        check_types(self)
        for name in self.transforms:
            one_of("transforms", name, ("hadamard",))
        if self.fold_heads and not self.transforms:
            raise ConfigError("fold_heads: set transforms to [hadamard] too")


@weight_leaf()
class Rotated:
    """A rotated kernel: x @ w == (x R) @ inner; signs: float32 [K] of +1 and -1, None if all are 1."""

    inner: object
    signs: Array | None


@materialize.register
def _(w: Rotated) -> Array:
    unrotated = fast_hadamard(materialize(w.inner).T).T  # H is symmetric
    return unrotated if w.signs is None else unrotated * w.signs[:, None]


@apply_kernel.register
def _(w: Rotated, x: Array, product) -> Array:
    return apply_kernel(w.inner, apply_hadamard(x, w.signs), product)


@map_base_weight.register
def _(w: Rotated, stats, fn):
    rotated = None if stats is None else stats.rotated(lambda x: apply_hadamard(x, w.signs))
    return Rotated(map_base_weight(w.inner, rotated, fn), w.signs)


def rotate(*, random: bool = False, seed: int = 0, layers: Iterable[str] | None = None, match: str = ".*") -> Transform:
    """A Transform that rotates the inputs of Dense layers by Hadamard matrices; it needs no statistics.

    random: with signs drawn from `seed` and the layer's name, else all signs are 1. layers: exactly these layers, else
    all Dense layers whose name matches `match`. `apply` raises UserError for an input size without a Hadamard matrix.
    """

    def apply(params: dict, stats: dict) -> dict:
        chosen = match_layers(params, match, dense_only=True) if layers is None else layers
        seeds = {layer: layer_seed(seed, layer) if random else None for layer in chosen}
        return each_layer(lambda w, _, seed: rotate_kernel(w, seed), seeds).apply(params, stats)

    return Transform(frozenset(), apply, "Hadamard" + ", random signs" * random)


def rotate_kernel(w: Array, seed: int | None = None) -> Rotated:
    """`w` [K, N] with its inputs rotated; `seed` of the signs, None for no signs.

    Raises UserError if `w` is not the kernel of a Dense, is rounded already or is not finite, or if there is no
    Hadamard matrix of size K.
    """
    check_kernel(w)
    signs = None if seed is None else draw_signs(seed, len(w))
    return Rotated(apply_hadamard(w.astype(jnp.float32).T, signs).T, signs)


def layer_seed(seed: int, layer: str) -> int:
    """The seed of a layer's own signs."""
    return (seed + zlib.crc32(layer.encode())) % 2**32


def draw_signs(seed: int, inputs: int) -> Array:
    """float32 [inputs] of random +1 and -1."""
    return jax.random.rademacher(jax.random.key(seed), (inputs,), jnp.float32)


def apply_hadamard(x: Array, signs: Array | None) -> Array:
    """x R, [..., K], in the dtype of x."""
    return fast_hadamard(x if signs is None else x * signs.astype(x.dtype))


def fold_heads(
    qkv: Array, bias: Array, proj: Array, *, heads: int, signs: Array | None = None
) -> tuple[Array, Array, Array]:
    """qkv [C, 3D], bias [3D] and proj [D, N] of the same attention, whose heads give their output times R to proj.

    The values, the last third of qkv, are made in rotated form, and so are their weighted means over keys. Attention
    computes the same as before, at no cost. signs: [D / heads], the same for all heads, or [D].
    """
    for w in (qkv, bias[None], proj):
        check_kernel(w)
    width = len(proj)
    if qkv.shape[1] != 3 * width or len(bias) != 3 * width or width % heads:
        shapes = f"{list(qkv.shape)}, {list(bias.shape)} and {list(proj.shape)}"
        raise UserError(f"qkv [C, 3D], bias [3D] and proj [D, N] of {heads} heads expected, got {shapes}")
    signs = None if signs is None else signs.reshape(-1, width // heads)
    by_head = lambda x: apply_hadamard(x.reshape(*x.shape[:-1], heads, -1), signs).reshape(x.shape)
    values = lambda x: jnp.concatenate([x[..., : 2 * width], by_head(x[..., 2 * width :])], axis=-1)
    return values(qkv), values(bias), by_head(proj.T).T


def check_kernel(w: object) -> None:
    """Raises UserError unless `w` is an array [inputs, outputs] of finite numbers."""
    plain = isinstance(w, jax.Array | np.ndarray)
    if not plain or w.ndim != 2:
        got = f"shape {list(w.shape)}" if plain else f"a {type(w).__name__}"
        raise UserError(f"a rotation takes the kernel [inputs, outputs] of a Dense before it is rounded, got {got}")
    if not np.isfinite(w).all():
        raise UserError("the weight holds NaN or infinity: look at the checkpoint")

"""Rotation: a layer's inputs mixed by an orthogonal matrix, so that outliers spread over all, and its weight likewise.

As in QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456) it is R = diag(signs) H / sqrt(n), H a Hadamard matrix of
size n: x R takes few products (hadamard.py), and x W = (x R) (R^T W).

Letters: K inputs, N outputs; C inputs of attention, D its width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.algorithms.hadamard import fast_hadamard
from sam2jq.quant.leaves import apply_kernel, materialize, weight_leaf
from sam2jq.quant.transform import Stats, map_base_weight

Array = jax.Array


@weight_leaf()
class Rotated:
    """x @ w == (x R) @ inner; signs: f32 [K] of +-1, None where all are 1."""

    inner: object
    signs: Array | None


@materialize.register
def _(w: Rotated) -> Array:
    unmixed = fast_hadamard(materialize(w.inner).T).T  # H is symmetric
    return unmixed if w.signs is None else unmixed * w.signs[:, None]


@apply_kernel.register
def _(w: Rotated, x: Array, product) -> Array:
    return apply_kernel(w.inner, apply_hadamard(x, w.signs), product)


@map_base_weight.register
def _(w: Rotated, stats, fn):
    rotated = None if stats is None else stats.rotated(lambda x: apply_hadamard(x, w.signs))
    return Rotated(map_base_weight(w.inner, rotated, fn), w.signs)


@dataclass(frozen=True)
class RotationSpec:
    """random: signs are drawn, from `seed`; layers whose signs are to differ need seeds that do."""

    random: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:  # jax keeps no more bits of it
            raise UserError(f"seed must be in 0..2^32 - 1, got {self.seed}")


def rotate(w: Array, stats: Stats | None, spec: RotationSpec) -> Rotated:
    """`w` [K, N] with its inputs rotated; needs no statistics.

    ValueError: not the kernel of a Dense, rounded already, not finite, or no Hadamard matrix has size K.
    """
    check_kernel(w)
    signs = draw_signs(spec, len(w))
    return Rotated(apply_hadamard(w.astype(jnp.float32).T, signs).T, signs)


def draw_signs(spec: RotationSpec, inputs: int) -> Array | None:
    return jax.random.rademacher(jax.random.key(spec.seed), (inputs,), jnp.float32) if spec.random else None


def apply_hadamard(x: Array, signs: Array | None) -> Array:
    """x R, [..., K], in the dtype of x."""
    return fast_hadamard(x if signs is None else x * signs.astype(x.dtype))


def fold_heads(
    qkv: Array, bias: Array, proj: Array, *, heads: int, signs: Array | None = None
) -> tuple[Array, Array, Array]:
    """qkv [C, 3D], bias [3D] and proj [D, N] of an attention whose heads hand (their output) R to proj.

    The values, the last third of qkv, are made in rotated form; what is a mean of values over keys then is too. So
    attention computes the same as before, at no cost. signs: [D / heads], for all heads the same, or [D].
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
    """ValueError unless `w` is an array [inputs, outputs] of finite numbers."""
    plain = isinstance(w, jax.Array | np.ndarray)
    if not plain or w.ndim != 2:
        got = f"shape {list(w.shape)}" if plain else f"a {type(w).__name__}"
        raise UserError(f"a rotation takes the kernel [inputs, outputs] of a Dense before it is rounded, got {got}")
    if not np.isfinite(w).all():
        raise UserError("the weight holds NaN or infinity: look at the checkpoint")

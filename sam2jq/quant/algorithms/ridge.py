"""Ridge recalibration of weights before rounding (Q-SAM2, arXiv 2506.09782).

Letters: G [K, K] the Gram matrix of the K inputs, W [K, N] the weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from sam2jq.errors import UserError
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform, check_unrounded, each_layer

Array = jax.Array


def ridge(strength: float = 1e-3, *, layers: list[str] | None = None, match: str = ".*") -> Transform:
    """A Transform that replaces kernels by `ridge_kernel` of them, in `layers` or in all that `match`."""
    specs = strength if layers is None else dict.fromkeys(layers, strength)
    return each_layer(ridge_kernel, specs, {"gram"}, match=match, description=f"strength {strength}")


def ridge_kernel(w: Array, stats: Stats, strength: float) -> Array:
    """(G + lambda I)^-1 G W with lambda = strength * mean(diag G), for `w` [*reduce, out].

    Outputs hardly change, while the weights of inputs that are nearly always 0 shrink. So the rest is rounded on a
    finer grid. Raises UserError if `w` is rounded already, or if the result
    is not finite.
    """
    check_unrounded(w)
    if not strength >= 0:
        raise UserError(f"the strength of the ridge must not be negative, got {strength}")
    shrunk = _ridge(w, stats.gram, strength)
    if not np.isfinite(shrunk).all():
        raise UserError(
            "the weight or the Gram matrix holds NaN, or the Gram matrix is singular: then raise the ridge, now "
            f"{strength}"
        )
    return shrunk


@jax.jit
def _ridge(w: Array, gram: Array, strength: float) -> Array:
    damping = strength * jnp.diag(gram).mean()
    factor = cho_factor(gram + damping * jnp.eye(len(gram)))
    flat = w.astype(jnp.float32).reshape(len(gram), -1)
    # (G + lambda I)^-1 G = I - lambda (G + lambda I)^-1 is exact where it changes nothing
    return (flat - damping * cho_solve(factor, flat)).reshape(w.shape)

"""Q-SAM2's recalibration (arXiv 2506.09782), and the bias that takes back what quantization did to the outputs' mean.

Letters: G [K, K] the Gram matrix of the K inputs, W [K, N] the weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from sam2jq.errors import UserError
from sam2jq.quant.leaves import materialize
from sam2jq.quant.transform import Stats

Array = jax.Array


def ridge(w: Array, stats: Stats, lam: float) -> Array:
    """(G + lambda I)^-1 G W, lambda = lam * mean(diag G): `w` [*reduce, out] less what its inputs never excite.

    Outputs stay nearly as they were while the weight shrinks, so that it can be rounded more finely.
    """
    if not lam >= 0:
        raise UserError(f"the strength of the ridge must not be negative, got {lam}")
    shrunk = _ridge(w, stats.gram, lam)
    if not np.isfinite(shrunk).all():
        raise UserError(f"NaN in weight or Gram matrix, or the latter is singular: then raise the ridge, now {lam}")
    return shrunk


@jax.jit
def _ridge(w: Array, gram: Array, lam: float) -> Array:
    damping = lam * jnp.diag(gram).mean()
    factor = cho_factor(gram + damping * jnp.eye(len(gram)))
    flat = w.astype(jnp.float32).reshape(len(gram), -1)
    # as (G + lambda I)^-1 G = I - lambda (G + lambda I)^-1, which is exact where it changes nothing
    return (flat - damping * cho_solve(factor, flat)).reshape(w.shape)


@jax.jit
def bias_shift(before, after, stats: Stats) -> Array:
    """[N]: E[x] @ (before - after), which added to the bias keeps the outputs' mean when `after` replaces `before`.

    Both are kernels or weight leaves. For a grouped Conv, E[x] is the mean of all groups.
    """
    difference = materialize(before) - materialize(after)
    return stats.mean @ difference.reshape(len(stats.mean), -1)

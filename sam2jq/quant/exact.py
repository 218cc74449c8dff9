"""Products in whole float32, where rounding errors would change which weights or settings are chosen.

Accelerators multiply float32 numbers in fewer bits unless a product asks for all of them.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

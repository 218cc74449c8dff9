"""The dtype that a model computes in."""

import jax
import jax.numpy as jnp

from sam2jq.errors import UserError
from sam2jq.models.variants import FLOATS
from sam2jq.tree import flatten, unflatten

# parts whose layers all have inputs in the dtype of the images
CAST = ("image_encoder.", "sam_mask_decoder/", "memory_attention/", "memory_encoder/")


def float_dtype(dtype) -> str:
    """The name of a floating-point dtype; "auto" is bfloat16 on GPUs and TPUs and float32 on CPUs.

    Raises UserError for any other.
    """
    if isinstance(dtype, str) and dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    allowed = f"allowed: auto, {', '.join(FLOATS)}"
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise UserError(f"unknown dtype {dtype!r}; {allowed}") from error
    if name not in FLOATS:
        raise UserError(f"dtype {name} is not supported; {allowed}")
    return name


def cast_kernels(params: dict, dtype: str) -> dict:
    """`params` with kernels of layers that compute in `dtype` cast to it once, where each call would cast them.

    Weight leaves, and all that is no kernel, stay in float32. Results may differ by the rounding of the weights: where
    XLA computes a product of bfloat16 in float32, it may leave out the cast in the call.
    """

    def cast(path: str, leaf):
        is_kernel = path.endswith("/kernel") and path.startswith(CAST) and isinstance(leaf, jax.Array)
        return leaf.astype(dtype) if is_kernel else leaf

    return unflatten({path: cast(path, leaf) for path, leaf in flatten(params).items()})

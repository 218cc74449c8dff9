"""What a layer does with its kernel, whatever leaf the kernel is: the one dispatch point of quantization.

A weight leaf registers `effective`, and `matmul` or `conv` where it can do better than with its effective array.
"""

from functools import singledispatch

import jax
import jax.numpy as jnp
from jax import lax

from sam2jq.quant.qtensor import QTensor, dequantize

Array = jax.Array
NHWC = ("NHWC", "HWIO", "NHWC")


@singledispatch
def effective(w) -> Array:
    """The plain array [*reduce, out] that `w` stands for: what a vanilla export writes."""
    return w


@effective.register
def _(w: QTensor) -> Array:
    return dequantize(w)


def matmul(w, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    return x @ effective(w).astype(x.dtype)


def conv(w, x: Array, *, stride: int, padding: int, groups: int) -> Array:
    """[B, H, W, in] -> [B, H', W', out], `w` standing for [kh, kw, in / groups, out]."""
    kernel, pad = effective(w).astype(x.dtype), [(padding, padding)] * 2
    if kernel.shape[:2] == (1, 1) and stride == groups == 1:  # XLA's convolution takes several times as long on a CPU
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pad, dimension_numbers=NHWC, feature_group_count=groups
    )


def conv_transpose(w, x: Array, *, stride: int) -> Array:
    """[B, H, W, in] -> [B, H * stride, W * stride, out], `w` standing for [stride, stride, in, out].

    No two inputs meet in an output, so it is one product and a reordering; XLA's own takes several times as long.
    """
    kernel = effective(w).astype(x.dtype)[::-1, ::-1]  # a transposed convolution turns its kernel round
    y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel)
    return y.reshape(len(x), x.shape[1] * stride, x.shape[2] * stride, -1)


@jax.jit
def effective_params(params: dict) -> dict:
    """`params` with every weight leaf replaced by the plain array it stands for, in float32."""
    return jax.tree.map(effective, params, is_leaf=lambda node: not isinstance(node, dict))

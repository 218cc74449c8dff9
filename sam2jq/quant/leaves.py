"""What a layer does with its kernel, whatever leaf the kernel is: the one dispatch point of quantization.

A weight leaf registers `effective`, and `contract` where what it does to x is not a product with its effective array;
`quantize_output` where it changes what leaves the layer.
"""

from collections.abc import Callable, Iterable
from functools import singledispatch

import jax
import jax.numpy as jnp
from jax import lax

from sam2jq.quant.qtensor import QTensor, dequantize
from sam2jq.tree import pytree

Array = jax.Array
LEAVES: dict[str, type] = {}  # every class of weight leaf by its name, as packages store it
NHWC = ("NHWC", "HWIO", "NHWC")


def weight_leaf(static: Iterable[str] = ()):
    """Class decorator: a `pytree` dataclass that stands for a kernel, and that packages can store.

    The first field is the weight inside, `inner`, or the full-shape array itself; `static` fields are no arrays.
    """

    def wrap(cls):
        cls = pytree(static)(cls)
        LEAVES[cls.__name__] = cls
        return cls

    return wrap


def unwrap(leaf) -> tuple[object, dict[type, object]]:
    """The innermost part of a weight leaf, and {class: leaf} of the leaves around it, outermost first."""
    around = {}
    while hasattr(leaf, "inner"):
        around[type(leaf)] = leaf
        leaf = leaf.inner
    return leaf, around


@singledispatch
def materialize(w) -> Array:
    """The plain array [*reduce, out] that `w` stands for: what a vanilla export writes."""
    return w


@materialize.register
def _(w: QTensor) -> Array:
    return dequantize(w)


@singledispatch
def apply_kernel(w, x: Array, product: Callable[[Array, Array], Array]) -> Array:
    """product(kernel, x) of the kernel that `w` stands for. A product is linear in both, contracts the last axis of
    x and keeps the kernel's last axis last; so a leaf can change x, or split the kernel, whatever the layer is.
    """
    return product(materialize(w).astype(x.dtype), x)


@singledispatch
def quantize_output(w, y: Array) -> Array:
    """What leaves a layer with kernel `w`, of its outputs y [..., out] with their bias."""
    return y


def dense(kernel: Array, x: Array) -> Array:
    """[in, out], [..., in] -> [..., out].

    As one product of two matrices: XLA would else copy the cotangent, transposed, for the gradient of the kernel, and
    take twice as long for that.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def matmul(w, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    return apply_kernel(w, x, dense)


def conv(w, x: Array, *, stride: int, padding: int, groups: int) -> Array:
    """[B, H, W, in] -> [B, H', W', out], `w` standing for [kh, kw, in / groups, out]."""

    def product(kernel: Array, x: Array) -> Array:
        if kernel.shape[:2] == (1, 1) and stride == groups == 1:  # XLA's own takes several times as long on a CPU
            return dense(kernel[0, 0], x)
        pad = [(padding, padding)] * 2
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pad, dimension_numbers=NHWC, feature_group_count=groups
        )

    return apply_kernel(w, x, product)


def conv_transpose(w, x: Array, *, stride: int) -> Array:
    """[B, H, W, in] -> [B, H * stride, W * stride, out], `w` standing for [stride, stride, in, out].

    No two inputs meet in an output, so it is one product and a reordering; XLA's own takes several times as long.
    """

    def product(kernel: Array, x: Array) -> Array:
        y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel[::-1, ::-1])  # a transposed convolution turns its kernel round
        return y.reshape(len(x), x.shape[1] * stride, x.shape[2] * stride, -1)

    return apply_kernel(w, x, product)


@jax.jit
def materialize_params(params: dict) -> dict:
    """`params` with every weight leaf replaced by the plain array it stands for, in float32."""
    return jax.tree.map(materialize, params, is_leaf=lambda node: not isinstance(node, dict))

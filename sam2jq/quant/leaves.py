"""Weight leaves: what stands in a params tree in place of a kernel, and the rules by which layers use them.

This is the one place where quantization is dispatched by type. A leaf class is decorated with `weight_leaf` and
registers `materialize`, `apply_kernel` if it changes the layer's input or splits the product, `quantize_output` if it
changes the layer's output, and `map_base_weight` (transform.py). Leaves nest, from the outside: Smoothed, Rotated,
LowRank, ActQuantized, QTensor.
"""

from collections.abc import Callable, Iterable
from functools import singledispatch

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jq.quant.qtensor import QTensor, dequantize
from sam2jq.tree import pytree

Array = jax.Array
LEAVES: dict[str, type] = {}  # every class of weight leaf by its name, which packages store
NHWC = ("NHWC", "HWIO", "NHWC")


def weight_leaf(static: Iterable[str] = ()):
    """A class decorator that makes a `pytree` dataclass a weight leaf, which packages can store.

    The first field is `inner`, the leaf or kernel inside. Fields named in `static` are not arrays.
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


def base_weight(leaf) -> object:
    """The innermost part of a weight leaf, which holds the weight itself."""
    return unwrap(leaf)[0]


def is_bare(leaf) -> bool:
    """Whether a weight leaf is a kernel or a QTensor without leaves around it: y = x @ materialize(leaf)."""
    return isinstance(leaf, QTensor | jax.Array | np.ndarray)


@singledispatch
def materialize(w) -> Array:
    """The float array [*reduce, out] that is equivalent to the weight leaf `w`: what a vanilla export writes."""
    return w


@materialize.register
def _(w: QTensor) -> Array:
    return dequantize(w)


@singledispatch
def apply_kernel(w, x: Array, product: Callable[[Array, Array], Array]) -> Array:
    """product(kernel, x) for the kernel that is equivalent to `w`.

    `product` is linear in both arguments, contracts the last axis of x and keeps the kernel's last axis last. So a leaf
    can transform x or split the kernel without knowing whether the layer is a Dense or a Conv.
    """
    return product(materialize(w).astype(x.dtype), x)


@singledispatch
def quantize_output(w, y: Array) -> Array:
    """The outputs y [..., out] of a layer with kernel `w`, bias added, rounded if `w` says so."""
    return y


def dense(kernel: Array, x: Array) -> Array:
    """[in, out], [..., in] -> [..., out].

    One product of two matrices: for a batched product XLA copies the transposed cotangent in the kernel's gradient,
    which takes twice as long.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def matmul(w, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    return apply_kernel(w, x, dense)


def patches(x: Array, size: int, stride: int, padding: int) -> Array:
    """[B, H, W, C] -> [B, H', W', size * size * C]: the input patch of each output pixel, flattened like the kernel."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((length - size) // stride * stride + 1 for length in x.shape[1:3])
    shifts = [(i, j) for i in range(size) for j in range(size)]
    return jnp.concatenate([x[:, i : i + rows : stride, j : j + columns : stride] for i, j in shifts], -1)


def blocks(x: Array, size: int) -> Array:
    """`patches` that do not overlap, by a reordering: on a CPU ten times as fast as by slices, on a TPU a fifth."""
    rows, columns = (length // size for length in x.shape[1:3])
    x = x[:, : rows * size, : columns * size].reshape(len(x), rows, size, columns, size, -1)
    return x.swapaxes(2, 3).reshape(len(x), rows, columns, -1)


def conv(w, x: Array, *, stride: int, padding: int, groups: int) -> Array:
    """[B, H, W, in] -> [B, H', W', out], for a kernel [kh, kw, in / groups, out].

    A kernel that is as large as its stride is a product: XLA aborts on the gradient of such a convolution for a TPU. On
    a TPU any kernel with a stride is one, as XLA's gradient of it takes up to forty times as long there.
    """

    def product(kernel: Array, x: Array) -> Array:
        size, pad = kernel.shape[0], [(padding, padding)] * 2
        if size == stride == groups == 1:  # XLA's convolution is several times slower on a CPU
            return dense(kernel[0, 0], x)
        as_matrix = lambda kernel: kernel.reshape(-1, kernel.shape[-1])
        by_patches = lambda kernel, x: dense(as_matrix(kernel), patches(x, size, stride, padding))
        by_blocks = lambda kernel, x: dense(as_matrix(kernel), blocks(x, size))
        by_xla = lambda kernel, x: lax.conv_general_dilated(
            x, kernel, (stride, stride), pad, dimension_numbers=NHWC, feature_group_count=groups
        )
        if stride == 1 or groups > 1:
            return by_xla(kernel, x)
        other = by_blocks if size == stride and not padding else by_xla
        return lax.platform_dependent(kernel, x, tpu=by_patches, default=other)

    return apply_kernel(w, x, product)


def conv_transpose(w, x: Array, *, stride: int) -> Array:
    """[B, H, W, in] -> [B, H * stride, W * stride, out], for a kernel [stride, stride, in, out].

    Windows do not overlap, so this is one product and a reordering. XLA's own operation takes several times as long.
    """

    def product(kernel: Array, x: Array) -> Array:
        y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel[::-1, ::-1])  # a transposed convolution flips its kernel
        return y.reshape(len(x), x.shape[1] * stride, x.shape[2] * stride, -1)

    return apply_kernel(w, x, product)


@jax.jit
def materialize_params(params: dict) -> dict:
    """`params` with every weight leaf replaced by its equivalent float32 array, see `materialize`."""
    return jax.tree.map(materialize, params, is_leaf=lambda node: not isinstance(node, dict))

"""The layers of sam2jq.models.layers and attention.py as operators; `p` is the part of the params tree of a layer."""

from functools import partial

import numpy as np

from converters.exports.onnx import leaves
from converters.exports.onnx.graph import MICROSOFT, Graph


def array(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def dense(g: Graph, p: dict, x: str) -> str:
    """[..., C] -> [..., features]."""
    return leaves.apply_kernel(p["kernel"], g, x, leaves.dense, array(p["bias"]))


def conv(g: Graph, p: dict, x: str, *, size: int = 1, stride: int = 1, padding: int = 0, groups: int = 1) -> str:
    """[B, H, W, C] -> [B, H', W', features]."""
    product = conv_1x1 if size == 1 else partial(conv_nchw, size=size, stride=stride, padding=padding, groups=groups)
    return leaves.apply_kernel(p["kernel"], g, x, product, array(p["bias"]))


def conv_1x1(g: Graph, kernel: str, x: str, bias: np.ndarray | None) -> str:
    return leaves.dense(g, g.Squeeze(kernel, np.array([0, 1])), x, bias)


def conv_nchw(g: Graph, kernel: str, x: str, bias, *, size: int, stride: int, padding: int, groups: int) -> str:
    """ONNX has channels first; engines cancel pairs of transpositions."""
    bias = () if bias is None else (bias,)
    settings = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [padding] * 4, "group": groups}
    y = g.Conv(g.transpose(x, 0, 3, 1, 2), g.transpose(kernel, 3, 2, 0, 1), *bias, **settings)
    return g.transpose(y, 0, 2, 3, 1)


def conv_transpose(g: Graph, p: dict, x: str, side: int) -> str:
    """[B, side, side, C] -> [B, 2 side, 2 side, features]; no two inputs overlap: one product and a reordering."""

    def product(g: Graph, kernel: str, x: str, bias: np.ndarray | None) -> str:
        for axis in (0, 1):  # a transposed convolution flips its kernel [2, 2, C, features]
            kernel = g.Gather(kernel, np.array([1, 0]), axis=axis)
        matrix = g.reshape(g.transpose(kernel, 2, 0, 1, 3), 0, -1)
        y = leaves.dense(g, matrix, x, None if bias is None else np.tile(bias, 4))
        y = g.transpose(g.reshape(y, 0, side, side, 2, 2, -1), 0, 1, 3, 2, 4, 5)
        return g.reshape(y, 0, 2 * side, 2 * side, -1)

    return leaves.apply_kernel(p["kernel"], g, x, product, array(p["bias"]))


def layer_norm(g: Graph, p: dict, x: str, eps: float = 1e-5) -> str:
    return g.LayerNormalization(x, array(p["scale"]), array(p["bias"]), epsilon=eps)


def mlp(g: Graph, p: dict, x: str, act: str = "Relu") -> str:
    """[..., C] -> [..., C']: the Dense layers `layers.0`, `layers.1`, ... with `act`, an operator, between them."""
    for i in range(len(p)):
        x = dense(g, p[f"layers.{i}"], g.add(act, x)[0] if i else x)
    return x


def attention(g: Graph, q: str, k: str, v: str, heads: int) -> str:
    """softmax(q kT / sqrt(C)) v, [B, N, heads * C], for q [B, N, heads * C] and k, v [B, M, heads * C]."""
    return g.MultiHeadAttention(q, k, v, domain=MICROSOFT, num_heads=heads)

"""Weight leaves as operators: what `sam2jq.quant.leaves.apply_kernel` computes, by the fastest operators that engines
have for it.

Letters: K inputs, N outputs, G groups of inputs that share a scale.
"""

import math
from collections.abc import Callable
from functools import singledispatch

import ml_dtypes
import numpy as np
from onnx import TensorProto

from converters.exports.nearest import bare, without
from converters.exports.onnx.graph import MICROSOFT, Graph
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.hadamard import factors
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import unwrap
from sam2jq.quant.package import full_shape
from sam2jq.quant.qtensor import QTensor

BLOCKS = (256, 128, 64, 32, 16)  # group sizes of MatMulNBits
Product = Callable[[Graph, str, str, np.ndarray | None], str]  # (graph, kernel, x, bias or None) -> y
STATIC = "quantize with quant.ipts.static true and group_shapes [[-1, -1]], and without quant.opts"


def dense(g: Graph, kernel: str, x: str, bias: np.ndarray | None) -> str:
    """[K, N], [..., K] -> [..., N]."""
    y = g.MatMul(x, kernel)
    return y if bias is None else g.Add(y, bias)


def why_refused(leaf) -> str:
    """Why a leaf has no exact form in ONNX, and what to do; "" if it has one."""
    _, around = unwrap(leaf)
    inputs = around.get(ActQuantized)
    if OutQuantized in around or (inputs and inputs.scale is None):
        return f"activations are rounded on a grid of each call's own, for which engines have no kernel: {STATIC}"
    if inputs and inputs.spec.codes != "int":
        return f"inputs are {inputs.spec.dtype}, for which engines have no kernel: quantize with quant.ipts.dtype uint8"
    if unknown := [cls.__name__ for cls in around if apply_kernel.dispatch(cls) is apply_kernel.dispatch(object)]:
        return f"no operators are known for its leaf {unknown[0]}: add them to converters/exports/onnx/leaves.py"
    return ""


def nearest_leaf(leaf):
    """A leaf that has an exact form in ONNX, in place of one that is `why_refused`; see `round_again`."""
    leaf = without(leaf, [OutQuantized])
    if ActQuantized in unwrap(leaf)[1] and why_refused(leaf):
        leaf = without(leaf, [ActQuantized])
    return bare(leaf) if why_refused(leaf) else leaf


@singledispatch
def apply_kernel(w, g: Graph, x: str, product: Product, bias: np.ndarray | None) -> str:
    """product(kernel, x) + bias for the kernel that is equivalent to `w`, a leaf that is not `why_refused`."""
    return product(g, g.constant(np.asarray(w, np.float32)), x, bias)


@apply_kernel.register
def _(w: QTensor, g: Graph, x: str, product: Product, bias) -> str:
    if product is dense and (block := block_size(w)):
        y = matmul_nbits(w, g, x, block)
        return y if bias is None else g.Add(y, bias)
    return product(g, dequantized(w, g), x, bias)


@apply_kernel.register
def _(w: Smoothed, g: Graph, x: str, product: Product, bias) -> str:
    return apply_kernel(w.inner, g, g.Div(x, np.asarray(w.scale)), product, bias)


@apply_kernel.register
def _(w: Rotated, g: Graph, x: str, product: Product, bias) -> str:
    """The Hadamard matrix is a (x) b, as in `fast_hadamard`: two small products in place of a large one."""
    x = x if w.signs is None else g.Mul(x, np.asarray(w.signs))
    a, b = (factor.astype(np.float32) / math.sqrt(len(factor)) for factor in factors(full_shape(w)[0]))
    shape = g.Shape(x)
    x = g.MatMul(a, g.MatMul(g.reshape(x, -1, len(a), len(b)), b))
    return apply_kernel(w.inner, g, g.Reshape(x, shape), product, bias)


@apply_kernel.register
def _(w: LowRank, g: Graph, x: str, product: Product, bias) -> str:
    branch = g.MatMul(product(g, g.constant(np.asarray(w.down)), x, None), np.asarray(w.up))
    return g.Add(apply_kernel(w.inner, g, x, product, bias), branch)


@apply_kernel.register
def _(w: ActQuantized, g: Graph, x: str, product: Product, bias) -> str:
    if product is dense and is_int8_matrix(w.inner):
        return integer_matmul(w, g, x, bias)
    scale, zero_point = (np.asarray(part, np.float32) for part in (w.scale, w.zero_point))
    codes = g.Add(g.Round(g.Mul(x, 1 / scale)), zero_point)
    codes = g.Clip(codes, np.float32(w.spec.qmin), np.float32(w.spec.qmax))
    return apply_kernel(w.inner, g, g.Mul(g.Sub(codes, zero_point), scale), product, bias)


def block_size(w: QTensor) -> int | None:
    """The largest block of MatMulNBits in which all codes have one scale; None if there is none."""
    size = w.spec.group_size or math.inf
    if w.spec.per_tensor or w.spec.codes != "int" or w.qvalue.ndim != 2:
        return None
    whole = [block for block in BLOCKS if size == math.inf or size % block == 0]
    # a block may not be much longer than the column itself: its padding is stored
    return next((block for block in whole if block < 2 * len(w.qvalue)), whole[-1] if whole else None)


def unsigned_codes(w: QTensor) -> tuple[np.ndarray, np.ndarray, int]:
    """Codes uint8 [*reduce, N] and zero points uint8 [G, N] that stand for the same numbers, and the bits they take.

    Codes of 5 to 7 bits take 8, those of 2 and 3 take 4: the next width that engines read.
    """
    bits = 4 if w.spec.bits <= 4 else 8
    shift = 2 ** (bits - 1) if w.spec.symmetric else 0
    zero_point = np.zeros(w.scale.shape) if w.zero_point is None else np.asarray(w.zero_point, np.int16)
    codes = np.asarray(w.qvalue).astype(np.int16) + shift
    return codes.astype(np.uint8), (zero_point + shift).astype(np.uint8), bits


def matmul_nbits(w: QTensor, g: Graph, x: str, block: int) -> str:
    """x @ w [..., N] by com.microsoft's MatMulNBits, which reads packed codes [N, blocks, block]."""
    codes, zero_point, bits = unsigned_codes(w)
    width, outputs = codes.shape
    blocks = -(-width // block)
    repeats = (w.spec.group_size or blocks * block) // block
    rows = lambda x: x.repeat(repeats, axis=0)[:blocks].T  # [N, blocks]
    codes = np.pad(codes, ((0, blocks * block - width), (0, 0))).T.reshape(outputs, blocks, block)
    scale, zero_point = rows(np.asarray(w.scale, np.float32)), rows(zero_point)
    if bits == 4:
        codes, zero_point = pairs(codes), pairs(np.pad(zero_point, ((0, 0), (0, blocks % 2))))
    # accuracy_level 0: in float32; 4 would round the inputs to 8 bits
    size = {"K": width, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 0}
    return g.MatMulNBits(x, codes, scale, zero_point, domain=MICROSOFT, **size)


def pairs(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of codes of 4 bits -> [..., n / 2], the first of each pair in the low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def dequantized(w: QTensor, g: Graph) -> str:
    """The kernel [*reduce, N] as a float32 tensor that engines compute from its codes when they load the file.

    No DequantizeLinear: before a product, ONNX Runtime turns it into one that rounds the inputs, too.
    """
    shape, groups = w.qvalue.shape, len(w.scale)
    if w.spec.codes == "float":
        codes, zero_point, scale = np.asarray(w.qvalue).astype(np.float32), None, np.asarray(w.scale)
        if w.spec.bits == 4:  # e2m1 are halves of whole numbers
            codes, scale = (2 * codes).astype(np.int8), scale / 2
        else:
            codes = codes.astype(ml_dtypes.float8_e4m3fn)
        kind = None
    else:
        codes, zero_point, bits = unsigned_codes(w)
        scale, kind = np.asarray(w.scale), TensorProto.UINT4 if bits == 4 else None
    if groups > 1:
        size = w.spec.group_size
        codes = codes.reshape(-1, shape[-1])
        codes = np.pad(codes, ((0, groups * size - len(codes)), (0, 0))).reshape(groups, size, -1)
        scale, zero_point = scale[:, None], None if zero_point is None else zero_point[:, None]
    kernel = g.Cast(g.constant(codes, kind), to=TensorProto.FLOAT)
    kernel = kernel if zero_point is None else g.Sub(kernel, zero_point.astype(np.float32))
    kernel = g.Mul(kernel, scale.astype(np.float32))
    if groups > 1:
        kernel = g.slice(g.reshape(kernel, -1, shape[-1]), 0, math.prod(shape[:-1]), 0)
    return kernel if groups == 1 else g.reshape(kernel, *shape)


def is_int8_matrix(w) -> bool:
    """Whether `w` is a matrix of integer codes with one scale per output, or one for all."""
    return isinstance(w, QTensor) and w.spec.codes == "int" and len(w.scale) == 1


def integer_matmul(w: ActQuantized, g: Graph, x: str, bias: np.ndarray | None) -> str:
    """[..., N]: x rounded to uint8 times int8 codes, summed in int32, the bias inside.

    The fastest pair of types on x86. Other codes are shifted to them: by 128, which changes no difference of a code and
    its zero point.
    """
    weight, spec = w.inner, w.spec
    outputs = weight.qvalue.shape[-1]
    shift = 128 if spec.symmetric else 0
    scale, zero_point = np.float32(w.scale), np.uint8(np.asarray(w.zero_point) + shift)
    if (spec.qmin + shift, spec.qmax + shift) != (0, 255):  # QuantizeLinear alone would use all 256 codes
        limits = (np.array([spec.qmin, spec.qmax]) - np.asarray(w.zero_point)) * scale
        x = g.Clip(x, *limits.astype(np.float32))
    codes = g.QuantizeLinear(x, scale, zero_point)
    shift = 0 if weight.spec.symmetric else 128
    kernel = (np.asarray(weight.qvalue).astype(np.int16) - shift).astype(np.int8)
    own_zero = np.zeros((1, 1)) if weight.zero_point is None else np.asarray(weight.zero_point, np.int16) - shift
    row = lambda x, dtype: np.broadcast_to(np.asarray(x), (1, outputs))[0].astype(dtype)
    inputs = codes, kernel, scale, row(weight.scale, np.float32), zero_point, row(own_zero, np.int8)
    return g.MatMulIntegerToFloat(*inputs, "" if bias is None else bias, domain=MICROSOFT)

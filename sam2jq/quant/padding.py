"""Layers padded to a few shapes, so that layers of many shapes share a few compiled programs.

Zeros change no result: every grid includes 0, and inputs and weights that are 0 add nothing to an output or its error.
Letters: K inputs, N outputs, K' and N' the same padded.
"""

import math

import jax
import numpy as np

from sam2jq.quant.qtensor import QTensor, group_count, storage_dtype
from sam2jq.quant.spec import QuantSpec

Array = jax.Array
SMALLEST = 128  # padding costs little time up to this size, and a program of its own seconds


def padded_size(size: int) -> int:
    """The least of 128, 192, 256, 384, 512, 768, 1024, ... that is at least `size`: at most half of it is padding."""
    power = SMALLEST
    while power < size:
        power *= 2
    return 3 * power // 4 if power > SMALLEST and size <= 3 * power // 4 else power


def pad_axes(x: Array, *axes: int) -> np.ndarray:
    """`x` in host memory, with zeros up to the `padded_size` of each of `axes`."""
    x = np.asarray(x)
    widths = [(0, padded_size(length) - length if axis in axes else 0) for axis, length in enumerate(x.shape)]
    return np.pad(x, widths)


def pad_kernel(w: Array, inputs: int) -> np.ndarray:
    """`w` [*reduce, N] with K = `inputs` inputs as float32 [K', N']."""
    return pad_axes(np.asarray(w, np.float32).reshape(inputs, -1), 0, 1)


def unpad_qtensor(codes: Array, scale: Array, zero_point: Array, shape: tuple[int, ...], spec: QuantSpec) -> QTensor:
    """The QTensor of a kernel of `shape` [*reduce, N] from its codes [K', N'], and scales and zero points [G', N']."""
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    codes, scale, zero_point = jax.device_get((codes, scale, zero_point))
    groups = slice(group_count(inputs, spec)), slice(outputs)
    qvalue = codes[:inputs, :outputs].reshape(shape).astype(storage_dtype(spec))
    zero_point = None if spec.symmetric else zero_point[groups].astype(np.int16)
    return jax.device_put(QTensor(qvalue, scale[groups], zero_point, spec))

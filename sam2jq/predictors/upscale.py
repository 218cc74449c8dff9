"""Mask logits at the size of an image, by programs that are compiled once for images of many sizes.

Letters: N masks, [h, w] their low resolution, [H, W] a canvas: the image's size rounded up to multiples of STEP.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.predictors.resizing import bilinear_weights

Array = jax.Array
STEP = 256  # pixels


class Canvas(NamedTuple):
    """Bilinear interpolation as two matrices, zero beyond the image: masks on a canvas are rows @ masks @ columns."""

    rows: Array  # [H, h]
    columns: Array  # [w, W]
    size: tuple[int, int]  # of the image, in pixels


class MaskStats(NamedTuple):
    """Of N masks: boxes int32 [N, 4], x0 y0 x1 y1 of the outermost pixels, 0 of an empty mask; stability [N]."""

    boxes: Array
    stability: Array


@lru_cache(maxsize=8)  # a predictor asks for the same one for every mask of an image
def canvas_of(side: int, size: tuple[int, int]) -> Canvas:
    """The canvas of an image of `size` (H, W) for masks [side, side], as torch's `interpolate(align_corners=False)`."""
    padded = lambda length: np.pad(bilinear_weights(side, length), ((0, -length % STEP), (0, 0)))
    rows, columns = map(padded, size)
    return Canvas(jnp.asarray(rows), jnp.asarray(columns.T), size)


@jax.jit
def upscale(masks: Array, canvas: Canvas) -> Array:
    """Mask logits [N, h, w] -> [N, H, W]."""
    return jax.lax.map(lambda mask: upscale_one(mask, canvas), masks)


@jax.jit
def threshold(masks: Array, canvas: Canvas, limit: Array) -> Array:
    """Mask logits [N, h, w] -> bool [N, H, W], where they are above `limit`."""
    return jax.lax.map(lambda mask: upscale_one(mask, canvas) > limit, masks)


@jax.jit
def measure(masks: Array, canvas: Canvas, limit: Array, offset: Array) -> MaskStats:
    """Box and stability of mask logits [N, h, w] at the size of the image.

    stability: the IoU of the masks at the limits +- offset (SAM, arXiv 2304.02643, appendix B); NaN if both are empty.
    """

    def one(mask: Array) -> MaskStats:
        full = upscale_one(mask, canvas)
        height, width = canvas.size
        inside = (jnp.arange(full.shape[0]) < height)[:, None] & (jnp.arange(full.shape[1]) < width)
        area = lambda limit: ((full > limit) & inside).sum(dtype=jnp.int32)
        mask = (full > limit) & inside
        (x0, x1), (y0, y1) = extent(mask.any(0)), extent(mask.any(1))
        return MaskStats(jnp.stack([x0, y0, x1, y1]), area(limit + offset) / area(limit - offset))

    return jax.lax.map(one, masks)


def upscale_one(mask: Array, canvas: Canvas) -> Array:
    """Mask logits [h, w] -> [H, W]."""
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return product(product(canvas.rows, mask.astype(jnp.float32)), canvas.columns)


def extent(line: Array) -> tuple[Array, Array]:
    """The first and the last true element of bool [L]; 0 and 0 if there is none."""
    return line.argmax(), jnp.where(line.any(), len(line) - 1 - line[::-1].argmax(), 0)

"""Prompts: a grid of clicks, and random clicks and boxes sampled from masks.

Letters: P prompts, S the image's side in pixels, h x w the grid of cells that weights and logits are given on.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
BOX_NOISE = 0.1  # of the box's side, as in SAM (arXiv 2304.02643, appendix A)


def click_grid(side: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """side * side foreground clicks, one per prompt: points float32 [P, 1, 2] and labels int32 [P, 1], all 1.

    Points are x, y in pixels of a size x size image, row by row, at the centers of a side x side grid.
    """
    centers = (np.arange(side) + 0.5) * size / side
    points = np.stack(np.meshgrid(centers, centers), -1).reshape(-1, 1, 2).astype(np.float32)
    return points, np.ones(points.shape[:2], np.int32)


def random_cells(key: Array, weights: Array) -> Array:
    """Flat indices [P], each sampled in proportion to `weights` [P, h, w] >= 0; the last where all are zero."""
    total = jnp.cumsum(weights.reshape(len(weights), -1), axis=1)
    level = jax.random.uniform(key, (len(weights), 1)) * total[:, -1:]
    return jnp.minimum((total <= level).sum(1), total.shape[1] - 1)


def random_points(key: Array, weights: Array, size: int) -> Array:
    """Points [P, 1, 2], x, y in pixels of a size x size image, inside cells sampled by `weights` [P, h, w]."""
    cells, jitter = jax.random.split(key)
    height, width = weights.shape[1:]
    row, column = jnp.divmod(random_cells(cells, weights), width)
    corner = jnp.stack([column, row], -1)
    offset = jax.random.uniform(jitter, corner.shape, minval=0.25, maxval=0.75)  # away from the neighbors
    return ((corner + offset) * jnp.array([size / width, size / height]) - 0.5)[:, None]


def inside(coverage: Array) -> Array:
    """Weights [P, h, w] for a click on an object: 1 in cells that it covers by at least half, or the most.

    coverage: the covered share of each cell, [P, h, w], 0..1.
    """
    return (coverage >= jnp.minimum(0.5, coverage.max((1, 2), keepdims=True))).astype(jnp.float32)


def boxes(masks: Array) -> Array:
    """Boxes [P, 2, 2], corners x0 y0 and x1 y1 (inclusive), of boolean masks [P, S, S]."""

    def span(hits: Array) -> tuple[Array, Array]:
        return hits.argmax(-1), hits.shape[-1] - 1 - hits[:, ::-1].argmax(-1)

    (x0, x1), (y0, y1) = span(masks.any(1)), span(masks.any(2))
    return jnp.stack([jnp.stack([x0, y0], -1), jnp.stack([x1, y1], -1)], 1).astype(jnp.float32)


def jitter_boxes(key: Array, corners: Array, size: int) -> Array:
    """`corners` [P, 2, 2] with normal noise: BOX_NOISE of the box's sides, at most 2 % of the image's side."""
    noise = jax.random.normal(key, corners.shape) * BOX_NOISE * (corners[:, 1:] - corners[:, :1])
    return jnp.clip(corners + jnp.clip(noise, -0.02 * size, 0.02 * size), 0, size - 1)


def sample_correction_clicks(key: Array, logits: Array, coverage: Array, size: int) -> tuple[Array, Array]:
    """A click [P, 1, 2] where mask logits [P, h, w] are wrong, and its label [P, 1]: 1 for a false negative.

    coverage: the covered share of each cell, [P, h, w], 0..1. A correct mask gets a click on the object.
    """
    target = coverage > 0.5
    wrong = (logits > 0) != target
    weights = jnp.where(wrong.any((1, 2), keepdims=True), wrong, inside(coverage) > 0).astype(jnp.float32)
    points = random_points(key, weights, size)
    cell = jnp.floor((points[:, 0] + 0.5) / (size / coverage.shape[-1])).astype(int)
    label = target[jnp.arange(len(points)), cell[:, 1], cell[:, 0]]
    return points, label[:, None].astype(jnp.int32)

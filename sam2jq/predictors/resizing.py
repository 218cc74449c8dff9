"""Bilinear resizing of maps in numpy: each new size would compile anew in jax."""

from functools import lru_cache

import numpy as np


def resize_maps(maps: np.ndarray, size: tuple[int, int], *, antialias: bool = False) -> np.ndarray:
    """Maps [..., h, w] -> [..., *size], pixel centers aligned, as `sam2jq.models.layers.resize` computes it."""
    rows, columns = (bilinear_weights(old, new, antialias) for old, new in zip(maps.shape[-2:], size))
    return rows @ maps @ columns.T


@lru_cache(maxsize=8)  # the masks of an image are resized one by one
def bilinear_weights(length: int, new_length: int, antialias: bool = False) -> np.ndarray:
    """float32 [new_length, length]: the weights of `length` values at each of the new positions."""
    reach = max(length / new_length, 1) if antialias else 1  # of the triangular kernel
    position = (np.arange(new_length) + 0.5) * length / new_length - 0.5
    kernel = np.maximum(1 - np.abs(position[:, None] - np.arange(length)) / reach, 0)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)

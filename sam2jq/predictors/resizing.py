"""Bilinear resizing of maps in numpy: each new size would compile anew in jax."""

import numpy as np


def resize_maps(maps: np.ndarray, size: tuple[int, int], *, antialias: bool = False) -> np.ndarray:
    """Maps [..., h, w] -> [..., *size], pixel centers aligned, as `sam2jq.models.layers.resize` computes it."""

    def weights(length: int, new_length: int) -> np.ndarray:
        reach = max(length / new_length, 1) if antialias else 1  # of the triangular kernel
        position = (np.arange(new_length) + 0.5) * length / new_length - 0.5
        kernel = np.maximum(1 - np.abs(position[:, None] - np.arange(length)) / reach, 0)
        return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)

    return weights(maps.shape[-2], size[0]) @ maps @ weights(maps.shape[-1], size[1]).T

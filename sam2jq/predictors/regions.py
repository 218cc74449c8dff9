"""Small holes and small regions of masks, as sam2 removes them from mask logits on the host."""

import numpy as np
import scipy

IN_PLANE = np.zeros((3, 3, 3), int)  # the neighbours of a pixel: 8 in its own mask, none in another one
IN_PLANE[1] = 1


def small_regions(masks: np.ndarray, max_area: float) -> np.ndarray:
    """bool [M, H, W]: the pixels of `masks` bool [M, H, W] in 8-connected regions of at most `max_area` pixels."""
    labels, _ = scipy.ndimage.label(masks, IN_PLANE)
    small = np.bincount(labels.ravel()) <= max_area
    small[0] = False  # label 0 is outside of all regions
    return small[labels]


def remove_small_regions(logits: np.ndarray, threshold: float, max_hole: float, max_sprinkle: float) -> np.ndarray:
    """Mask logits [M, H, W] with small holes set to `threshold` + 10 and small foreground regions to `threshold` - 10.

    As in sam2, regions are those of `logits` as given, for both; an area of 0 changes nothing.
    """
    cleaned = logits
    if max_hole > 0:
        cleaned = np.where(small_regions(logits <= threshold, max_hole), np.float32(threshold + 10), cleaned)
    if max_sprinkle > 0:
        cleaned = np.where(small_regions(logits > threshold, max_sprinkle), np.float32(threshold - 10), cleaned)
    return cleaned


def fill_holes(logits: np.ndarray, max_area: float) -> np.ndarray:
    """Mask logits [M, H, W] with holes of at most `max_area` pixels set to 0.1, as sam2's video predictor does."""
    return np.where(small_regions(logits <= 0, max_area), np.float32(0.1), logits) if max_area > 0 else logits

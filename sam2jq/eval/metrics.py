"""Mask metrics: IoU, boundary IoU, and the video metrics J & F of SA-V and DAVIS.

J & F follow facebookresearch/sam2, sav_dataset/utils/sav_benchmark.py, which took them from hkchengrex/vos-benchmark.
They are shares in 0..1 here; the evaluator prints percent.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import minimum_filter
from scipy.spatial import KDTree

from sam2jq.errors import UserError


class VideoScores(NamedTuple):
    """Region similarity J, contour accuracy F and their mean, all in 0..1."""

    j: float
    f: float

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


def iou(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Intersection over union [...] of boolean masks [..., H, W]; 1 where both are empty."""
    check_shapes(got, reference)
    intersection, union = (f(got, reference).sum((-2, -1)) for f in (np.logical_and, np.logical_or))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def boundary_iou(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Boundary IoU [...] of boolean masks [..., H, W] (arXiv 2103.16562); 1 where both are empty."""
    check_masks(got, reference, "..., H, W")
    return iou(inner_boundary(got), inner_boundary(reference))


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels [..., H, W] of a mask up to d pixels from one outside it, diagonal steps counting as one.

    d is 2 % of the image's diagonal, rounded, and at least 1. As in the paper's code, a mask ends at the image's edge.
    """
    depth = max(1, round(0.02 * np.hypot(*mask.shape[-2:])))
    eroded = minimum_filter(mask, 2 * depth + 1, axes=(-2, -1), mode="constant", cval=0)
    return mask & ~eroded


def region_similarity(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """J [...] of boolean masks [..., H, W]: intersection over union, and 1 where both are empty."""
    check_masks(got, reference, "..., H, W")
    return iou(got, reference)


def contour_accuracy(got: np.ndarray, reference: np.ndarray) -> float:
    """F of two boolean masks [H, W]: the harmonic mean of precision and recall of contour pixels.

    Precision is the share of got's contour pixels at most ceil(0.008 * diagonal) pixels, in Euclidean distance, from
    one of reference's; recall is the same the other way round. An empty contour has no wrong pixels, so its share
    is 1: F is 1 where both contours are empty and 0 where one is.
    """
    check_masks(got, reference, "H, W")
    radius = np.ceil(0.008 * np.linalg.norm(got.shape))
    got, reference = (np.argwhere(contour(mask)) for mask in (got, reference))
    precision, recall = share_near(got, reference, radius), share_near(reference, got, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """The pixels [H, W] that differ from the one to the right, the one below or the one below right.

    A contour is thus one pixel wide, half of it outside the mask on the upper left. The mask goes on beyond the
    image, so there is none along the image's edges: a mask of the whole image has an empty contour.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """The share of points [N, 2] at most `radius` from one of the others [M, 2]; 1 where N is 0."""
    distance, _ = KDTree(others).query(points, distance_upper_bound=radius + 0.5)  # the bound itself is excluded
    return float(np.mean(distance <= radius)) if len(points) else 1.0


def video_scores(got: np.ndarray, reference: np.ndarray) -> VideoScores:
    """Mean J and F of one object from its boolean masks [T, H, W] in all its annotated frames, in order.

    The first and the last annotated frame are left out, for every object its own. Of the others, those before the
    object is first seen, in got or in reference, do not count. From there on all do: where it is absent from both, J
    and F are 1; where it is absent from one, J is 0, and so is F unless the other fills the image. An object that the
    model lost is an empty mask: the evaluator accepts no missing file. Nor does it score an object that reference
    shows in none of the frames left.
    """
    check_masks(got, reference, "T, H, W")
    got, reference = got[1:-1], reference[1:-1]
    if not reference.any():
        raise UserError(
            f"the object is in none of the {len(reference)} annotated frames between the first and the last: "
            "SA-V's evaluator has no score for it, leave it out"
        )
    seen = np.argmax((got | reference).any((1, 2)))
    got, reference = got[seen:], reference[seen:]
    f = [contour_accuracy(*masks) for masks in zip(got, reference)]
    return VideoScores(float(region_similarity(got, reference).mean()), float(np.mean(f)))


def mean_scores(scores: list[VideoScores]) -> VideoScores:
    """The score of a dataset: the mean over the objects of all its videos at once, however many a video has."""
    if not scores:
        raise UserError("no object to average over")
    return VideoScores(*np.mean(scores, axis=0).tolist())


def check_shapes(got: np.ndarray, reference: np.ndarray) -> None:
    if got.shape != reference.shape:
        raise UserError(f"shapes differ: {got.shape} and {reference.shape}")


def check_masks(got: np.ndarray, reference: np.ndarray, axes: str) -> None:
    """Raises unless both are boolean, of one shape and have `axes`, such as "T, H, W"."""
    check_shapes(got, reference)
    for mask in (got, reference):
        if mask.dtype != bool or (mask.ndim != len(axes.split()) and "..." not in axes):
            raise UserError(f"masks must be bool [{axes}], got {mask.dtype} {list(mask.shape)}")

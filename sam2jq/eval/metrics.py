"""Mask metrics: IoU, boundary IoU, and the video metrics J & F of SA-V and DAVIS.

J & F follow facebookresearch/sam2, sav_dataset/utils/sav_benchmark.py, which took them from hkchengrex/vos-benchmark.
Values are in 0..1 here; the evaluator prints percent.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy

from sam2jq.errors import UserError


class VideoScores(NamedTuple):
    """Region similarity J, contour accuracy F and their mean, all in 0..1."""

    j: float
    f: float

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


class LongVideoScores(NamedTuple):
    """J, F and, of LVOS, V: the deviation of their mean over the frames of an object; all in 0..1."""

    j: float
    f: float
    v: float


def iou(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Intersection over union [...] of boolean masks [..., H, W]; 1 where both are empty."""
    check_shapes(predicted, reference)
    intersection, union = (f(predicted, reference).sum((-2, -1)) for f in (np.logical_and, np.logical_or))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def boundary_iou(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Boundary IoU [...] of boolean masks [..., H, W] (arXiv 2103.16562); 1 where both are empty."""
    check_masks(predicted, reference, "..., H, W")
    return iou(inner_boundary(predicted), inner_boundary(reference))


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """bool [..., H, W]: the pixels of a mask at a chessboard distance of at most d from a pixel outside it.

    d is 2 % of the image's diagonal, rounded, and at least 1. As in the paper's code, pixels beyond the image are
    outside the mask.
    """
    depth = max(1, round(0.02 * np.hypot(*mask.shape[-2:])))
    eroded = scipy.ndimage.minimum_filter(mask, 2 * depth + 1, axes=(-2, -1), mode="constant", cval=0)
    return mask & ~eroded


def region_similarity(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """J [...] of boolean masks [..., H, W]: intersection over union, and 1 where both are empty."""
    check_masks(predicted, reference, "..., H, W")
    return iou(predicted, reference)


def contour_accuracy(predicted: np.ndarray, reference: np.ndarray) -> float:
    """F of two boolean masks [H, W]: the harmonic mean of precision and recall of contour pixels.

    Precision is the share of predicted contour pixels that are at most ceil(0.008 * diagonal) pixels, in Euclidean
    distance, from a contour pixel of the reference. Recall is the same with the masks swapped. The share of an empty
    contour is 1. F is 1 if both contours are empty and 0 if only one is.
    """
    check_masks(predicted, reference, "H, W")
    radius = np.ceil(0.008 * np.linalg.norm(predicted.shape))
    predicted, reference = (np.argwhere(contour(mask)) for mask in (predicted, reference))
    precision, recall = share_near(predicted, reference, radius), share_near(reference, predicted, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels that differ from their neighbor to the right, below, or below right.

    A contour is thus one pixel wide; at the top and left it lies outside the mask. The mask is continued beyond the
    image, so that the image's edges are no contour: a mask of the whole image has an empty contour.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """The share of points [N, 2] at most `radius` from one of the others [M, 2]; 1 where N is 0."""
    tree = scipy.spatial.KDTree(others)
    distance, _ = tree.query(points, distance_upper_bound=radius + 0.5)  # the bound itself is excluded
    return float(np.mean(distance <= radius)) if len(points) else 1.0


def video_scores(predicted: np.ndarray, reference: np.ndarray, *, from_first_mask: bool = False) -> VideoScores:
    """Mean J and F of one object from its boolean masks [T, H, W] in all its annotated frames, in order.

    By default as SA-V's evaluator computes them; from_first_mask: as DAVIS's, from the object's first mask on.

    The first and the last annotated frame of the object are left out. So are frames before the first one in which the
    prediction or the reference is not empty. In the remaining frames J and F are 1 if both masks are empty; if one is,
    J is 0, and so is F unless the other mask fills the image. Where the model lost the object its mask must be empty:
    the evaluator accepts no missing file. With `from_first_mask` no other frame is left out, and the reference may be
    empty in all of them.
    Raises UserError if there is no frame between the first and the last or, without `from_first_mask`, if the reference
    is empty in all of them: SA-V's evaluator has no score for such an object.
    """
    check_masks(predicted, reference, "T, H, W")
    predicted, reference = predicted[1:-1], reference[1:-1]
    if from_first_mask and not len(reference):
        raise UserError("two annotated frames or fewer: the first and the last have no score")
    if not from_first_mask and not reference.any():
        raise UserError(
            f"the object is in none of the {len(reference)} annotated frames between the first and the last: "
            "SA-V's evaluator has no score for it, leave it out"
        )
    first = 0 if from_first_mask else np.argmax((predicted | reference).any((1, 2)))
    predicted, reference = predicted[first:], reference[first:]
    j, f = frame_scores(predicted, reference)
    return VideoScores(float(j.mean()), float(f.mean()))


def frame_scores(predicted: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F of each frame, [T] each, of boolean masks [T, H, W]."""
    f = [contour_accuracy(*masks) for masks in zip(predicted, reference)]
    return region_similarity(predicted, reference), np.array(f)


def lvos_scores(predicted: np.ndarray, reference: np.ndarray) -> LongVideoScores:
    """The scores of one object from its boolean masks [T, H, W] in all its annotated frames, as LVOS' evaluator's.

    The first and the last frame are left out. The evaluator rounds the variance of (J + F) / 2 to four digits, and V is
    its root (arXiv 2404.19326).
    """
    check_masks(predicted, reference, "T, H, W")
    j, f = frame_scores(predicted[1:-1], reference[1:-1])
    return LongVideoScores(float(j.mean()), float(f.mean()), math.sqrt(round(float(((j + f) / 2).var()), 4)))


def mean_scores(scores: list):
    """The score of a dataset: the mean over the objects of all videos. Raises UserError if there is no object."""
    if not scores:
        raise UserError("no object to average over")
    return type(scores[0])(*np.mean(scores, axis=0).tolist())


def check_shapes(predicted: np.ndarray, reference: np.ndarray) -> None:
    """Raises UserError unless both arrays have the same shape."""
    if predicted.shape != reference.shape:
        raise UserError(f"shapes differ: {predicted.shape} and {reference.shape}")


def check_masks(predicted: np.ndarray, reference: np.ndarray, axes: str) -> None:
    """Raises UserError unless both masks are boolean and have the same shape and the axes `axes`, such as "T, H, W"."""
    check_shapes(predicted, reference)
    for mask in (predicted, reference):
        if mask.dtype != bool or (mask.ndim != len(axes.split()) and "..." not in axes):
            raise UserError(f"masks must be bool [{axes}], got {mask.dtype} {list(mask.shape)}")

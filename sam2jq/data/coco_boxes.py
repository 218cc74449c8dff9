"""Boxes of COCO's format: x, y, width, height in pixels, and their check against the mask."""

import numpy as np

from sam2jq.data.coco_masks import FARTHEST
from sam2jq.errors import UserError

# COCO's own boxes are up to 12 pixels off at an edge, and overlap the box of their mask by an IoU of 0.5 at least (887
# instances of COCO 2017; the smallest are of 4 pixels). A box that breaks the rules of `check_box` is of another kind.
OFF = 6  # pixels at an edge from which a box is read as corners, if they fit
FITS = 3  # pixels at every edge by which corners fit
LEAST_IOU = 0.1  # below it, if an edge is OFF too, a box is not that of the mask


def instance_box(bbox, mask: np.ndarray) -> np.ndarray:
    """The box [4], x0 y0 x1 y1, of COCO's bbox, or of the mask [H, W] if there is none.

    Raises UserError if bbox is malformed, or contradicts the mask.
    """
    if not bbox:
        return box_of(mask)
    if mask.any():
        check_box(bbox, mask)
    return annotated_box(bbox)


def annotated_box(bbox) -> np.ndarray:
    """The box [4], x0 y0 x1 y1, of COCO's x, y, width, height. Raises UserError if it is no box with an area."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(each, int | float) for each in bbox):
        raise UserError(f"its bbox {str(bbox)[:80]} is not four numbers: give x, y, width, height")
    if not all(abs(number) <= FARTHEST for number in bbox):
        raise UserError(f"its bbox {bbox} is not finite, or lies far outside of the image")
    x, y, width, height = map(float, bbox)
    if width <= 0 or height <= 0:
        raise UserError(f"its bbox {bbox} has no area: it is x, y, width, height")
    return np.array([x, y, x + width, y + height], np.float32)


def box_of(mask: np.ndarray) -> np.ndarray:
    """The box [4], x0 y0 x1 y1 with the last pixel included, of a mask [H, W]; zeros if it is empty."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1] if len(x) else [0] * 4, np.float32)


def check_box(bbox: list[float], mask: np.ndarray) -> None:
    """Raises UserError if an annotated x, y, width, height contradicts the box of a mask [H, W] that is not empty.

    It does if it fits as x0, y0, x1, y1 only, or hardly overlaps that box: it is in other units, or of another object.
    """
    given, found = annotated_box(bbox), box_of(mask)
    if np.abs(given - found).max() <= OFF:
        return
    x, y, right, bottom = found.tolist()
    way_out = f"give x, y, width, height in pixels, about {[x, y, right - x, bottom - y]}, or leave bbox out"
    if np.abs(np.array(bbox) - found).max() <= FITS:
        raise UserError(f"its bbox {bbox} is x0, y0, x1, y1, as its mask shows; {way_out}")
    height, width = mask.shape
    if iou(np.clip(given, 0, [width, height, width, height]), found) < LEAST_IOU:
        raise UserError(f"its bbox {bbox} is not where its mask is; {way_out}")


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """The intersection over union of two boxes [4], x0 y0 x1 y1, of which one has an area."""
    area = lambda first, last: float(np.prod(np.maximum(last - first, 0)))
    shared = area(np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:]))
    return shared / (area(one[:2], one[2:]) + area(other[:2], other[2:]) - shared)

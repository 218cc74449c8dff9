"""Crops of an image, grids of points in them, and boxes of masks, as sam2's automatic mask generator has them.

Boxes are x0 y0 x1 y1 in pixels; those of masks include x1 and y1.
"""

import itertools
import math

import numpy as np

from sam2jq.errors import UserError
from sam2jq.predictors.prompts import as_array

EDGE = 20  # pixels: a mask that ends so near to a crop's edge may be cut off there


def point_grid(points_per_side: int) -> np.ndarray:
    """The points [points_per_side ** 2, 2] of a regular grid, x and y in 0..1, row by row."""
    line = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def layer_grids(points_per_side: int | None, layers: int, factor: int, grids: list | None) -> list[np.ndarray]:
    """The grid of points [N, 2] in 0..1 of the image and of each layer of crops; arguments of the generator.

    Raises UserError unless one of points_per_side and grids is given, and there is a point a side, or a grid, each.
    """
    if layers < 0:
        raise UserError(f"crop_n_layers {layers}: give 0 for the image alone, or the number of layers of crops")
    if (points_per_side is None) == (grids is None):
        raise UserError("give points_per_side or point_grids, and None for the other")
    if grids is not None:
        if len(grids) <= layers:
            raise UserError(
                f"point_grids: {len(grids)} grids for the image and {layers} layers of crops; give one each"
            )
        return [check_grid(f"point_grids[{i}]", grid) for i, grid in enumerate(grids)]
    sides = [int(points_per_side / factor**layer) for layer in range(layers + 1)]
    if min(sides) < 1:
        raise UserError(f"points_per_side {points_per_side}: no point is left in layer {sides.index(min(sides))}; give "
                        "at least crop_n_points_downscale_factor ** crop_n_layers")  # fmt: skip
    return list(map(point_grid, sides))


def check_grid(name: str, grid) -> np.ndarray:
    """A grid [N, 2] as an array. Raises UserError, which calls it `name`, unless it holds x and y in 0..1."""
    points = as_array(name, grid, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not ((points >= 0) & (points <= 1)).all():
        raise UserError(f"{name} {list(points.shape)} must be [N, 2], x and y in 0..1 of the image's width and height")
    return points


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[int, list[int]]]:
    """(layer, box) of an image of `size` (H, W) in layer 0 and of its 4 ** i crops in layer i.

    overlap_ratio: of the crops in layer 1, relative to the shorter side; half as much in each next layer.
    """
    height, width = size
    boxes = [(0, [0, 0, width, height])]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / count)
        wide, high = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for x, y in itertools.product(range(count), repeat=2):
            x0, y0 = x * (wide - overlap), y * (high - overlap)
            boxes.append((layer, [x0, y0, min(x0 + wide, width), min(y0 + high, height)]))
    return boxes


def near_crop_edge(boxes: np.ndarray, crop: list[int], size: tuple[int, int]) -> np.ndarray:
    """bool [N]: whether boxes [N, 4] end near an edge of the crop that is no edge of the image of `size` (H, W)."""
    near = lambda edges: np.abs(boxes - np.array(edges)) <= EDGE
    return (near(crop) & ~near([0, 0, size[1], size[0]])).any(axis=1)


def non_maximum_suppression(boxes: np.ndarray, scores: np.ndarray, max_iou: float) -> np.ndarray:
    """Indices of the boxes [N, 4] that remain, by falling score: each removes later ones of a higher IoU with it.

    Like torchvision's `nms`, it computes in float32, and boxes without area overlap nothing.
    """
    order = np.argsort(-scores, kind="stable")
    x0, y0, x1, y1 = boxes[order].astype(np.float32).T
    areas = (x1 - x0) * (y1 - y0)
    remaining, kept = np.arange(len(order)), []
    while len(remaining):
        i, rest = remaining[0], remaining[1:]
        kept.append(order[i])
        widths = np.minimum(x1[i], x1[rest]) - np.maximum(x0[i], x0[rest])
        heights = np.minimum(y1[i], y1[rest]) - np.maximum(y0[i], y0[rest])
        shared = np.maximum(widths, 0) * np.maximum(heights, 0)
        with np.errstate(invalid="ignore"):  # 0 / 0 of two boxes without area
            iou = shared / (areas[i] + areas[rest] - shared)
        remaining = rest[~(iou > max_iou)]
    return np.array(kept, int)


def width_height(box) -> list[float]:
    """x0 y0 x1 y1 -> x0 y0 x1 - x0 y1 - y0, as sam2 computes it for boxes that include x1 and y1, too."""
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]

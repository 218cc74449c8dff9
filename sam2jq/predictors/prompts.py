"""Prompts as users give them, checked: clicks, boxes, masks and low-resolution logits as numpy arrays."""

from collections.abc import Iterator

import numpy as np

from sam2jq.data.images import as_numpy
from sam2jq.errors import UserError

LOGIT_LIMIT = 32.0  # low-resolution logits are handed out within +- this
MOST_PROMPTS = 64  # in one call of the model, which bounds its memory
LABELS = (-1, 0, 1, 2, 3)  # padding, background, foreground, and the two corners of a box


def point_prompts(coords, labels, box, size: tuple[int, int], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [P, N, 2] in pixels of the model's image and labels int32 [P, N]; a box is the first two points.

    coords [N, 2] or [P, N, 2], labels [N] or [P, N], box [4] or [P, 4], in pixels of an image of size (height, width).
    N = 0 clicks change nothing beside a box. Raises UserError if a shape, a number or a label is wrong, or if only one
    of coords and labels is given.
    """
    if (coords is None) != (labels is None):
        raise UserError("point_coords and point_labels go together: give both or neither")
    prompts = []
    if box is not None:
        prompts.append(box_corners(box))
    if coords is not None:
        prompts.append(clicks(coords, labels))
    if len(prompts) == 2 and prompts[1][1].shape == (1, 0):
        prompts.pop()
    if len({len(coords) for coords, _ in prompts}) > 1:
        raise UserError("box and point_coords must hold the same number of prompts")
    coords, labels = (np.concatenate(part, axis=1) for part in zip(*prompts))
    return coords / np.array(size[::-1], np.float32) * image_size, labels


def padded_prompts(points, masks) -> Iterator[tuple]:
    """Yields (points, masks, point_mask) of at most MOST_PROMPTS prompts, for `SAM2.decode_masks`.

    points: coords [P, N, 2] and labels [P, N], or None; masks: logits [1 or P, h, w, 1], or None. P and N are rounded
    up to powers of two, N to 4 at least. Added points are ignored by `point_mask`; added prompts are copies.
    """
    prompts, point_mask, count = (None, None), None, prompt_count(points, masks)
    if points is not None:
        *prompts, point_mask = padded_points(*points)
    for start in range(0, count, MOST_PROMPTS):
        size = power_of_two(min(count - start, MOST_PROMPTS))
        rows = np.minimum(np.arange(start, start + size), count - 1)
        parts = [x if x is None or len(x) == 1 < count else x[rows] for x in (*prompts, masks, point_mask)]
        yield None if points is None else tuple(parts[:2]), parts[2], parts[3]


def prompt_count(points, masks) -> int:
    """How many prompts P there are in the arguments of `padded_prompts`; without any it is 1, the image alone."""
    given = masks if points is None else points[0]
    return 1 if given is None else len(given)


def padded_points(coords: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """coords [P, N, 2] and labels [P, N] with copies of the last point, zeros if there is none, and bool [P, N].

    N becomes a power of two, 4 at least; the third array is False at copies.
    """
    count = labels.shape[1]
    if count == 0:
        coords, labels = np.zeros((len(coords), 1, 2), np.float32), np.zeros((len(labels), 1), np.int32)
    columns = np.arange(power_of_two(max(count, 4)))
    copied = np.minimum(columns, labels.shape[1] - 1)
    return coords[:, copied], labels[:, copied], np.broadcast_to(columns < count, (len(labels), len(columns)))


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`, a positive number.

    Counts in the shapes of compiled programs are padded to it, so that few are compiled.
    """
    return 1 << (count - 1).bit_length()


def box_corners(box) -> tuple[np.ndarray, np.ndarray]:
    """Corners [P, 2, 2] and labels [P, 2], 2 and 3, of boxes [4], [P, 4], or [P, 2, 2] as corners.

    More leading axes, and the numbers of several boxes in a row, are taken as in sam2.
    """
    box = as_array("box", box, np.float32)
    if box.shape[-1:] != (4,) and box.shape[-2:] != (2, 2) and (box.ndim != 1 or box.size % 4):
        raise UserError(f"box {list(box.shape)} must be [4] or [P, 4]: x0 y0 x1 y1")
    corners = box.reshape(-1, 2, 2)
    return corners, np.tile(np.array([[2, 3]], np.int32), (len(corners), 1))


def clicks(coords, labels) -> tuple[np.ndarray, np.ndarray]:
    """Points [P, N, 2] and labels [P, N] of coords [N, 2] or [P, N, 2] and labels [N] or [P, N]; [] is N = 0.

    With P = 1 one of them may lack the first axis, as in sam2's video predictor.
    """
    coords, labels = as_array("point_coords", coords, np.float32), as_array("point_labels", labels, np.float32)
    shapes = list(coords.shape), list(labels.shape)
    coords = coords.reshape(0, 2) if coords.shape == (0,) else coords
    coords = coords[None] if coords.ndim == 2 else coords
    labels = labels[None] if labels.ndim == 1 else labels
    if coords.ndim != 3 or coords.shape[-1] != 2 or coords.shape[:-1] != labels.shape:
        raise UserError(
            f"point_coords {shapes[0]} and point_labels {shapes[1]} must be [N, 2] and [N], or [P, N, 2] and [P, N]"
        )
    if not np.isin(labels, LABELS).all():
        raise UserError("point_labels must be 1 (foreground), 0 (background), 2 and 3 (the corners of a box) or -1 "
                        "(padding)")  # fmt: skip
    return coords, labels.astype(np.int32)


def object_mask(mask) -> np.ndarray:
    """The mask bool [...], true where `mask` is not 0, as in sam2. Raises UserError for logits, inf and NaN.

    It does so too for several values of which none is 0, such as probabilities: all of the frame would be the object.
    """
    mask = as_array("mask", mask, np.float64)  # in which the smallest values of other dtypes are not 0
    if (mask < 0).any():
        raise UserError("mask has negative values, so it looks like logits: give mask > 0")
    if mask.size and mask.all() and mask.min() < mask.max():
        raise UserError(f"mask holds values from {mask.min():g} to {mask.max():g} and no 0, so that its object is "
                        "everything: give a mask with 0 outside of the object")  # fmt: skip
    return mask != 0


def mask_logits(mask_input, side: int) -> np.ndarray:
    """Mask logits float32 [P, side, side, 1] of [1, side, side] or [P, 1, side, side].

    Raises UserError if the shape is another, or if a prompt holds a mask in place of logits: no value below 0, and all
    of them whole numbers or at most 1, or some above the limit of logits. Zeros everywhere are logits.
    """
    logits = as_array("mask_input", mask_input, np.float32)
    if logits.ndim not in (3, 4) or logits.shape[-3:] != (1, side, side):
        raise UserError(f"mask_input {list(logits.shape)} must be [1, {side}, {side}] or [P, 1, {side}, {side}]")
    logits = np.moveaxis(logits.reshape(-1, 1, side, side), 1, -1)
    if any(is_mask(prompt) for prompt in logits):
        raise UserError("mask_input holds a mask, not logits: give the third result of predict, or "
                        f"20 * (mask > 0) - 10 of a mask [1, {side}, {side}]")  # fmt: skip
    return logits


def is_mask(values: np.ndarray) -> bool:
    """Whether `values` can only be a mask, a label image or probabilities, no logits of a predictor.

    Zeros everywhere are logits: callers of exported models give them for "no mask".
    """
    if (values < 0).any() or (values == LOGIT_LIMIT).all() or not values.any():
        return False
    return bool((values <= 1).all() or (values == np.rint(values)).all() or (values > LOGIT_LIMIT).any())


def as_array(name: str, value, dtype) -> np.ndarray:
    """`value` as a numpy array. Raises UserError if it is not an array of finite numbers."""
    try:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError("a masked array: give its `filled` values")
        array = as_numpy(value)
        if array.dtype.kind in "cSUmM":
            raise TypeError(f"dtype {array.dtype}")
        with np.errstate(over="ignore"):  # what does not fit into `dtype` becomes infinite
            array = array.astype(dtype)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: of tensors with gradients
        raise UserError(f"{name} is not an array of numbers: {' '.join(str(error).split())}") from error
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds NaN or infinite values: give finite numbers")
    return array

"""Label images: png files in which the value of a pixel is the number of its object."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam2jq.data.images import check_size, open_image
from sam2jq.errors import UserError, few

LOSSY = {"JPEG", "MPO", "JPEG2000"}  # formats of PIL in which a mask may come back with other values
LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp"}  # PIL's names of such compressions in a TIFF
SOFT = 3  # labels along edges that a soft label image has at least; a real object may be one pixel wide
VOID = 255  # of label images: pixels of no object


def read_labels(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """int [H, W], the values of a mask file: palette indices, grey values, or False and True.

    Raises UserError for a lossy format, and unless it has one channel of integers, none negative, and `size` (H, W).
    """
    with open_image(path) as image:
        if image.format in LOSSY or image.info.get("compression") in LOSSY_TIFF:
            name = "JPEG in a TIFF" if image.format == "TIFF" else image.format
            raise UserError(f"{path}: {name} changes the values of a mask's pixels; save the mask as png again")
        labels = np.array(image)
        if image.mode == "P" and is_inverted(image, labels):
            raise UserError(
                f"{path}: index 0 of its palette, which is no object, is its brightest color; save the mask as grey "
                "values, 0 where the object is not"
            )
    if labels.ndim != 2:
        raise UserError(f"{path}: not a mask but an image with {labels.shape[2]} channels; convert it to one channel")
    if labels.dtype.kind == "f" or labels.min() < 0:
        raise UserError(f"{path}: holds floats or negative numbers, as logits do; save 0 and 1 as a mask")
    if size is not None:
        check_size(path, labels.shape, size, "its frame has")
    return labels.astype(np.int64)


def regions_of(labels: np.ndarray) -> list[int]:
    """The values above 0 in labels [H, W] that fill a square of 2 x 2 pixels somewhere.

    Values between two others along an edge, where interpolation or JPEG made them, do not.
    """
    corner, right, below, across = labels[:-1, :-1], labels[:-1, 1:], labels[1:, :-1], labels[1:, 1:]
    filled = np.unique(corner[(corner == right) & (corner == below) & (corner == across)])
    return filled[filled > 0].tolist()


def check_sharp(path: str, labels: np.ndarray) -> None:
    """Raises UserError if most of the labels in a label image [H, W] are values along the edges of a region."""
    values = [value for value in np.unique(labels).tolist() if value > 0]
    regions = regions_of(labels) if len(values) > SOFT else []
    edges = len(values) - len(regions)
    if regions and edges >= SOFT and edges > len(regions):
        raise UserError(
            f"{path}: most of its {len(values)} values, {few(values, 5)}, are no objects but soft edges, as "
            "interpolation or JPEG makes them; resize the original by nearest neighbor, or save one mask as 0 and 1"
        )


def has_soft_edges(labels: np.ndarray) -> bool:
    """Whether each pixel of labels [H, W] between 0 and the highest value touches a higher one, as in one soft mask.

    It is not so in a label image of several objects, nor where JPEG or ringing left values apart from the object.
    """
    height, width = labels.shape
    padded = np.pad(labels, 1)
    windows = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    between = (labels > 0) & (labels < labels.max())
    return bool((np.maximum.reduce(windows) > labels)[between].all())


def label_colors(path: str) -> dict[int, tuple[int, ...]]:
    """{label: RGB} of the palette of a mask file; {} if it has none."""
    with open_image(path) as image:
        palette = image.getpalette("RGB") if image.mode == "P" else None
    return {i: tuple((palette or [])[3 * i : 3 * i + 3]) for i in range(len(palette or []) // 3)}


def is_inverted(image: Image.Image, labels: np.ndarray) -> bool:
    """Whether index 0 of a palette image has a brighter color than all others in it; in masks it is black."""
    colors = np.array(image.getpalette("RGB")).reshape(-1, 3).sum(1)
    if colors[0] == 0:
        return False  # black, as in nearly all masks, which are not searched for their values then
    others = [value for value in np.unique(labels).tolist() if value > 0]
    return bool(others) and all(value < len(colors) and colors[0] > colors[value] for value in others)


def write_labels(path: str | Path, labels: np.ndarray) -> None:
    """Writes labels [H, W] as a png, which the evaluators of SA-V and DAVIS read.

    uint8 gets DAVIS's palette; uint16, for labels above 255, are grey values.
    """
    if labels.dtype not in (np.uint8, np.uint16) or labels.ndim != 2:
        raise UserError(f"{path}: labels must be uint8 or uint16 [H, W], got {labels.dtype} {list(labels.shape)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(davis_palette())
    image.save(path, format="PNG")


def davis_palette() -> bytes:
    """The 256 colors of DAVIS and PASCAL VOC: bits 0, 1 and 2 of a label are the top bits of red, green and blue."""
    bits = (np.arange(256)[:, None] >> np.arange(9)) & 1  # [label, bit]
    channels = [sum(bits[:, 3 * i + channel] << (7 - i) for i in range(3)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8).tobytes()

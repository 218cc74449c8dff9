"""Segmentations of COCO's format, polygons and run lengths: their check and the masks that they stand for."""

import numpy as np

from sam2jq.errors import UserError

NORMALIZED = (-0.5, 1.5)  # no polygon in pixels lies within it; normalized ones leave 0..1 a little by rounding
FARTHEST = 1e5  # pixels; pycocotools takes memory in proportion to the length of an edge


def check_mask(where: str, id: object, segmentation, size: tuple[int, int]) -> None:
    """Raises UserError that begins with `where` if an annotation has no valid id or its mask is malformed."""
    if not isinstance(id, int | str):
        raise UserError(f"{where}: an annotation has the id {id!r}, which is no whole number")
    try:
        check_segmentation(segmentation, size)
    except UserError as error:
        raise UserError(f"{where}: annotation {id} is not readable: {error}") from error


def check_segmentation(segmentation, size: tuple[int, int]) -> None:
    """Raises UserError, which says what is wrong, unless `decode_mask` can read a mask of `size` (H, W).

    It is fast, so that all annotations are checked before the first one is used. Sums of run lengths are not checked.
    """
    match segmentation:
        case [*polygons]:
            if polygons and all(isinstance(value, int | float) for value in polygons):
                raise UserError(
                    "its segmentation is one flat list [x, y, ...]; put it into a list of polygons, [[x, y, ...]]"
                )
            for polygon in polygons:
                check_polygon(polygon)
            least, most = NORMALIZED
            if polygons and max(size) > 1 and all(least < value < most for polygon in polygons for value in polygon):
                raise UserError("its polygons lie within 0..1; give pixels: multiply x by the width, y by the height")
        case {"size": [height, width], "counts": list() | str()}:
            if (height, width) != size:
                raise UserError(f"its mask has {width} x {height} pixels, but the image {size[1]} x {size[0]}")
        case _:
            raise UserError("its segmentation is neither polygons nor run lengths with a size")


def check_polygon(polygon) -> None:
    """Raises UserError unless `polygon` is [x, y, x, y, ...] with 3 points at least."""
    if not isinstance(polygon, list) or any(isinstance(value, list | tuple) for value in polygon):
        raise UserError("its segmentation must be lists of numbers, [[x, y, x, y, ...], ...], not of pairs")
    finite = all(isinstance(value, int | float) and abs(value) <= FARTHEST for value in polygon)
    if len(polygon) < 6 or len(polygon) % 2 or not finite:
        raise UserError(f"a polygon has {len(polygon)} numbers; it needs x and y, finite, of 3 points at least")


def decode_mask(segmentation, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] from polygons [[x, y, x, y, ...], ...], or from run lengths as a list or as COCO's string.

    Raises UserError if the segmentation is neither, or has another size.
    """
    check_segmentation(segmentation, size)
    if isinstance(segmentation, list):
        return fill_polygons(segmentation, size)
    counts = segmentation["counts"]
    return decode_runs(run_lengths(counts) if isinstance(counts, str) else counts, size)


def fill_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], the union of the polygons."""
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise UserError("polygons need the extra eval: pip install 'sam2jq[eval]'") from error
    if not polygons:
        return np.zeros(size, bool)
    return mask.decode(mask.merge(mask.frPyObjects(polygons, *size))).astype(bool)


def decode_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] from run lengths of false, true, false, ... in column-major order.

    pycocotools is not used, because it leaves pixels uninitialized if the runs do not fill the mask. Raises UserError
    then.
    """
    if not all(isinstance(run, int) and run >= 0 for run in runs):
        raise UserError("its run lengths must be whole numbers that are not negative; encode its mask again")
    if sum(runs) != size[0] * size[1]:
        raise UserError(
            f"its run lengths cover {sum(runs)} pixels, but the mask has {size[0] * size[1]}; encode its mask again"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def run_lengths(text: str) -> list[int]:
    """The run lengths in COCO's string: 5 bits per character, lowest first, a continuation bit, and a sign.

    From the fourth on, a number is stored as the difference to the one two places before.
    """
    runs, value, shift = [], 0, 0
    for code in text.encode():
        value += (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            value -= (code - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def encode_runs(mask: np.ndarray) -> list[int]:
    """The run lengths of a mask, bool [H, W], which `decode_runs` reads."""
    pixels = mask.T.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff([0, *changes.tolist(), pixels.size]).tolist()
    return [0, *runs] if pixels[0] else runs


def run_text(runs: list[int]) -> str:
    """COCO's string of run lengths, which `run_lengths` reads."""
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            low, value = value & 31, value >> 5
            last = value == (-1 if low & 16 else 0)
            text.append(chr(48 + low + (0 if last else 32)))
            if last:
                break
    return "".join(text)


def encode_mask(mask: np.ndarray) -> dict:
    """A mask, bool [H, W], as COCO's run lengths in a string; pycocotools reads it, too."""
    return {"size": list(mask.shape), "counts": run_text(encode_runs(mask))}

"""Everything in an image, found by two models, compared: such as a quantized model and full precision.

Letters: N masks of the model, M of the reference, in an image [H, W].
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from sam2jq.errors import UserError
from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator

FOUND = 0.5  # IoU from which on a mask of the reference counts as found


def compare_everything(
    generator: AutomaticMaskGenerator,
    reference: AutomaticMaskGenerator,
    images: Iterable[tuple[str, Callable[[], np.ndarray]]],
    on_image: Callable[[str, np.ndarray, np.ndarray], None] = lambda *_: None,
) -> dict:
    """{"recall", "miou": 0..1, "count_mismatch": images with another number of masks, "masks", "reference_masks",
    "images": counts, "left_out": {image: why it cannot be read}}.

    Each mask of the reference is paired with one mask at most, so that the sum of IoUs is the largest. miou is the mean
    IoU of these pairs over all masks of the reference, 0 for those without a pair; recall is the share with an IoU of
    FOUND or more. images: (name, a function that reads it). on_image: called with the name and the masks of both,
    bool [N, H, W] and [M, H, W].
    Raises UserError if the reference finds no mask at all.
    """
    ious, counts, left_out = [], [], {}
    for name, read in images:
        try:
            image = read()
        except (UserError, OSError) as error:
            left_out[name] = str(error)
            continue
        found, expected = (stacked(each.generate(image), image.shape[:2]) for each in (generator, reference))
        on_image(name, found, expected)
        ious.append(paired_ious(found, expected))
        counts.append((len(found), len(expected)))
    all_ious = np.concatenate([np.zeros(0), *ious])
    if not len(all_ious):
        raise UserError(
            f"the reference finds no mask in {len(counts)} images: lower everything.pred_iou_thresh or "
            "everything.stability_score_thresh"
        )
    masks, reference_masks = map(sum, zip(*counts))
    return {
        "recall": float((all_ious >= FOUND).mean()),
        "miou": float(all_ious.mean()),
        "count_mismatch": sum(own != other for own, other in counts),
        "masks": masks,
        "reference_masks": reference_masks,
        "images": len(counts),
        "left_out": left_out,
    }


def stacked(records: list[dict], size: tuple[int, int]) -> np.ndarray:
    """The masks of records, bool [N, H, W]."""
    return np.array([record["segmentation"] for record in records], bool).reshape(-1, *size)


def paired_ious(masks: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The IoU [M] of each mask of `reference` [M, H, W] with its own one of `masks` [N, H, W], 0 without one."""
    pack = lambda each: np.packbits(each.reshape(len(each), math.prod(each.shape[1:])), axis=1)
    size = lambda packed: np.bitwise_count(packed).sum(1, dtype=np.int64)
    flat = pack(masks)
    rows = [size(flat & mask) / np.maximum(size(flat | mask), 1) for mask in pack(reference)]
    ious = np.array(rows).reshape(len(reference), len(masks))
    pairs = linear_sum_assignment(ious, maximize=True)
    found = np.zeros(len(reference))
    found[pairs[0]] = ious[pairs]
    return found

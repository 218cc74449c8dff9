"""Everything in an image, found by two models, compared: such as a quantized model and full precision.

Letters: N masks of the model, M of the reference, in an image [H, W].
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from sam2jq.errors import UserError
from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator
from sam2jq.training.parallel_map import Replicas, parallel_map

FOUND = 0.5  # IoU from which on a mask of the reference counts as found
Pair = tuple[AutomaticMaskGenerator, AutomaticMaskGenerator]  # of a model and of its reference


def compare_everything(
    generators: Pair | Replicas,
    images: Iterable[tuple[str, Callable[[], np.ndarray]]],
    on_image: Callable[[str, np.ndarray, np.ndarray], None] = lambda *_: None,
) -> dict:
    """{"recall", "miou": 0..1, "count_mismatch": images with another number of masks, "masks", "reference_masks",
    "images": counts, "left_out": {image: why it cannot be read}}.

    Each mask of the reference is paired with one mask at most, so that the sum of IoUs is the largest. miou is the mean
    IoU of these pairs over all masks of the reference, 0 for those without a pair; recall is the share with an IoU of
    FOUND or more. images: (name, a function that reads it), split as by `parallel_map`. on_image: called with the name
    and the masks of both, bool [N, H, W] and [M, H, W], in the process that makes them.
    Raises UserError if the reference finds no mask at all.
    """

    def compare(generators: Pair, named: tuple[str, Callable]) -> tuple[str, str | None, np.ndarray, int]:
        name, read = named
        try:
            image = read()
        except (UserError, OSError) as error:
            return name, str(error), np.zeros(0), 0
        found, expected = (stacked(each.generate(image), image.shape[:2]) for each in generators)
        on_image(name, found, expected)
        return name, None, paired_ious(found, expected), len(found)

    rows = parallel_map(compare, generators, images)
    left_out = {name: why for name, why, *_ in rows if why is not None}
    counts = [(number, len(ious)) for _, why, ious, number in rows if why is None]
    all_ious = np.concatenate([np.zeros(0), *(ious for _, _, ious, _ in rows)])
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

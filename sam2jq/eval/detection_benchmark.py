"""Masks of a detector's boxes, scored by COCO's mask AP: instance segmentation as SAM's authors measure it.

Kirillov et al., Segment Anything, section 7.4. The scores and categories of the masks are those of the boxes.
"""

import contextlib
import io
from collections.abc import Iterable

import numpy as np

from sam2jq.data import preprocess
from sam2jq.data.detections import DetectedImage, Detections
from sam2jq.data.images import check_size, read_image
from sam2jq.errors import UserError, few
from sam2jq.eval.image_benchmark import segment_boxes
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.training.parallel_map import Replicas, parallel_map

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats


def evaluate_detections(
    predictor: PromptedImage | Replicas, images: Iterable[DetectedImage], detections: Detections
) -> dict:
    """{"ap": {name of NAMES: 0..1, or None without an instance of that size}, "images", "boxes": counts}.

    images: those of `detections` that are scored, split as by `parallel_map`. "left_out" is {image: why} of those that
    cannot be read. Raises UserError if these have no box.
    """
    rows = parallel_map(try_mask_results, predictor, images)
    results = [result for _, found, _ in rows for result in found]
    scored = [image.id for image, _, error in rows if error is None]
    left_out = {image.path: error for image, _, error in rows if error is not None}
    if not results:
        reasons = few([f"{name}: {why}" for name, why in left_out.items()], 3)
        raise UserError(f"{detections.file}: the images that are scored have no box{': ' * bool(reasons)}{reasons}")
    ap = average_precision(detections.content, results, scored)
    return {"ap": ap, "images": len(scored), "boxes": len(results), "left_out": left_out}


def try_mask_results(predictor: PromptedImage, image: DetectedImage) -> tuple[DetectedImage, list[dict], str | None]:
    """(the image, its `mask_results`, why it cannot be read or None)."""
    try:
        return image, mask_results(predictor, image), None
    except (UserError, OSError) as error:
        return image, [], str(error)


def average_precision(content: dict, results: list[dict], images: list[int]) -> dict[str, float | None]:
    """{name of NAMES: 0..1} of masks in COCO's results format, by pycocotools, on the images with the ids `images`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    # numbered anew from 1: COCOeval takes an annotation with the id 0 for one that no mask matches
    annotations = [annotation | {"id": i} for i, annotation in enumerate(content["annotations"], 1)]
    truth.dataset = content | {"annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) if value >= 0 else None for name, value in zip(NAMES, evaluation.stats)}


def mask_results(predictor: PromptedImage, image: DetectedImage) -> list[dict]:
    """The masks of an image's boxes in COCO's results format."""
    from pycocotools import mask as codec

    if not len(image.boxes):
        return []
    pixels = read_image(image.path)
    check_size(image.path, pixels.shape[:2], image.size, "its annotations are for")
    features = predictor.encode(preprocess(pixels, predictor.image_size)[None])
    masks = segment_boxes(predictor, features, image.boxes, image.size)
    return [
        {"image_id": image.id, "category_id": category, "score": score, "segmentation": run_lengths}
        for mask, score, category in zip(masks, image.scores, image.categories)
        for run_lengths in [codec.encode(np.asfortranarray(mask, np.uint8))]
    ]

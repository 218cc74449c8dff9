"""Promptable image segmentation: objects of images from boxes and simulated clicks, scored by mIoU.

Letters: I objects of one image, H x W its size, S the model's image side in pixels.
"""

from collections.abc import Iterable

import numpy as np
import scipy

from sam2jq.data import preprocess
from sam2jq.data.labeled import LabeledImage
from sam2jq.errors import UserError, few
from sam2jq.eval.metrics import iou
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.predictors.prompts import LOGIT_LIMIT
from sam2jq.predictors.resizing import resize_maps
from sam2jq.training.parallel_map import Replicas, parallel_map

PROMPTS = ("box", "1 click", "3 clicks")
BATCH = 16  # prompts decoded together; smaller batches are padded, so that the decoder compiles once


def evaluate_images(predictor: PromptedImage | Replicas, samples: Iterable[LabeledImage]) -> dict:
    """{"miou": {"box", "1 click", "3 clicks"}: means over all instances in 0..1, "images", "instances": counts}.

    "left_out" is {image or image/annotation: why} of those that cannot be read, or have an empty mask. The images are
    split as by `parallel_map`. Raises UserError if no image has an object.
    """
    scored = parallel_map(score_sample, predictor, samples)
    ious = [found for found, _ in scored if found]
    left_out = {name: why for _, without in scored for name, why in without.items()}
    if not ious:
        reasons = few([f"{name}: {why}" for name, why in left_out.items()], 3)
        raise UserError(f"no image has an object to segment: {reasons or 'every annotation is a crowd or missing'}")
    counts = {"images": len(ious), "instances": sum(len(image["box"]) for image in ious)}
    return {"miou": mean_ious(ious), **counts, "left_out": left_out}


def score_sample(predictor: PromptedImage, sample: LabeledImage) -> tuple[dict[str, np.ndarray] | None, dict[str, str]]:
    """(the `object_ious` of an image or None, {image or image/annotation: why it is left out})."""
    pair, left_out = read_sample(sample)
    return object_ious(segment_objects(predictor, *pair), pair[1]) if pair else None, left_out


def read_sample(sample: LabeledImage) -> tuple[tuple[np.ndarray, np.ndarray] | None, dict[str, str]]:
    """((image, masks), {image or image/annotation: why it is left out}); None if nothing is left of the image."""
    try:
        image, masks = sample.read()
        left_out = {f"{sample.name}/{annotation}": why for annotation, why in sample.left_out().items()}
    except (UserError, OSError) as error:
        return None, {sample.name: str(error)}
    return (image, masks) if len(masks) else None, left_out


def segment_objects(predictor: PromptedImage, image: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """{"box", "1 click", "3 clicks": bool [I, H, W]}: predictions for prompts simulated from `masks` [I, H, W].

    The box is the mask's bounding box. The first click is the mask's interior point, and the best of three masks by
    estimated IoU is taken. Each later click is the interior point of the widest error region, and refines the earlier
    mask (SAM 2, appendix F.1).
    """
    features = predictor.encode(preprocess(image, predictor.image_size)[None])
    parts = [segment_batch(predictor, features, masks[i : i + BATCH]) for i in range(0, len(masks), BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in PROMPTS}


def segment_batch(predictor: PromptedImage, features: list, masks: np.ndarray) -> dict[str, np.ndarray]:
    """As `segment_objects`, for at most BATCH objects."""
    count, *size = masks.shape
    boxes = np.stack([corners(mask) for mask in masks])
    results = {"box": segment_boxes(predictor, features, boxes, size)}
    points = np.stack([interior_point(mask)[0] for mask in masks])[:, None].astype(np.float32)
    labels = np.ones((count, 1), np.int32)
    logits, predicted = decode_padded(predictor, features, size, points, labels, multimask=True)
    results["1 click"] = predicted
    for _ in range(2):
        clicks = [correction_click(*pair) for pair in zip(predicted, masks)]
        points = np.concatenate([points, np.array([[point] for point, _ in clicks], np.float32)], 1)
        labels = np.concatenate([labels, np.array([[label] for _, label in clicks], np.int32)], 1)
        logits, predicted = decode_padded(predictor, features, size, points, labels, logits)
    return results | {"3 clicks": predicted}


def segment_boxes(predictor: PromptedImage, features: list, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [N, H, W]: the masks of boxes [N, 2, 2], x0 y0 and x1 y1 in pixels of an image of `size` (H, W)."""
    parts = [boxes[i : i + BATCH] for i in range(0, len(boxes), BATCH)]
    labels = lambda part: np.tile(np.array([[2, 3]], np.int32), (len(part), 1))
    return np.concatenate([decode_padded(predictor, features, size, part, labels(part))[1] for part in parts])


def decode_padded(
    predictor: PromptedImage,
    features: list,
    size: tuple[int, int],
    points: np.ndarray,
    labels: np.ndarray,
    mask_input: np.ndarray | None = None,
    multimask: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits [N, S / 4, S / 4] and bool masks [N, H, W] of the points [N, P, 2] of N <= BATCH objects.

    The best mask by estimated IoU is taken. The batch is padded with its last object.
    """
    count = len(points)
    scale = predictor.image_size / np.array(size[::-1], np.float32)
    pad = lambda x: np.concatenate([x, np.repeat(x[-1:], BATCH - count, axis=0)])
    if mask_input is not None:
        mask_input = pad(mask_input.clip(-LOGIT_LIMIT, LOGIT_LIMIT))[..., None]
    out = predictor.decode(features, (pad(points * scale), pad(labels)), mask_input, multimask=multimask)
    best = np.asarray(out.ious).argmax(1)
    logits = np.asarray(out.masks, np.float32)[np.arange(BATCH), best][:count]
    return logits, resize_maps(logits, size) > 0


def corners(mask: np.ndarray) -> np.ndarray:
    """The corners [2, 2], x0 y0 and x1 y1, of the bounding box of a mask [H, W]."""
    y, x = np.nonzero(mask)
    return np.array([[x.min(), y.min()], [x.max(), y.max()]], np.float32)


def interior_point(region: np.ndarray) -> tuple[tuple[int, int], float]:
    """The pixel x, y of a region [H, W] farthest from its edge, and that distance; the image border is an edge.

    (0, 0) and 0 for an empty region.
    """
    if not region.any():
        return (0, 0), 0.0
    (left, top), (right, bottom) = corners(region).astype(int)  # outside of its box the distance is 0
    box = region[top : bottom + 1, left : right + 1]
    distance = scipy.ndimage.distance_transform_edt(np.pad(box, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), box.shape)
    return (left + x, top + y), distance[y, x]


def correction_click(predicted: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], int]:
    """The next click x, y on a mask [H, W] and its label: 1 in a false negative region, 0 in a false positive one."""
    (missed, missed_distance), (extra, extra_distance) = (
        interior_point(region) for region in (target & ~predicted, predicted & ~target)
    )
    if missed_distance == extra_distance == 0:  # no error
        return interior_point(target)[0], 1
    return (missed, 1) if missed_distance >= extra_distance else (extra, 0)


def object_ious(predicted: dict[str, np.ndarray], masks: np.ndarray) -> dict[str, np.ndarray]:
    """{"box", "1 click", "3 clicks": IoU [I]} of the result of `segment_objects` with `masks` [I, H, W]."""
    return {name: iou(predicted[name], masks) for name in PROMPTS}


def mean_ious(images: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """{"box", "1 click", "3 clicks": mIoU}: the mean over all objects of all images."""
    return {name: float(np.concatenate([ious[name] for ious in images]).mean()) for name in PROMPTS}

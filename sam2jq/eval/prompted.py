"""How well a model segments: objects of images from a user's prompts, and objects followed through clips.

Letters: I objects of one image, H x W its size, S the model's image side.
"""

from collections.abc import Iterator
from itertools import groupby

import jax.numpy as jnp
import numpy as np
from scipy.ndimage import distance_transform_edt

from sam2jq.data import preprocess
from sam2jq.eval.metrics import iou
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.image import LOGIT_LIMIT, decode, encode_images
from sam2jq.predictors.video import VideoPredictor

PROMPTS = ("box", "1 click", "3 clicks")
AT_ONCE = 16  # prompts decoded together: always as many, so that they compile once


def segment_objects(
    model: SAM2, params: dict, image: np.ndarray, masks: np.ndarray, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """{"box", "1 click", "3 clicks": bool [I, H, W]}: what the model makes of prompts that `masks` [I, H, W] suggest.

    A box is the mask's own. The first click lies where the mask is widest and takes the best of three masks by
    estimated IoU; each later one lies in the widest part that is wrong, and refines one mask (SAM 2, appendix F.1).
    """
    features = encode_images(model, params, jnp.asarray(preprocess(image, model.variant.image_size)[None], dtype))
    parts = [segment_some(model, params, features, masks[i : i + AT_ONCE]) for i in range(0, len(masks), AT_ONCE)]
    return {name: np.concatenate([part[name] for part in parts]) for name in PROMPTS}


def segment_some(model: SAM2, params: dict, features: list, masks: np.ndarray) -> dict[str, np.ndarray]:
    """As `segment_objects`, for at most AT_ONCE objects."""
    count, *size = masks.shape
    scale = model.variant.image_size / np.array(size[::-1], np.float32)

    def predict(points: np.ndarray, labels: np.ndarray, hint: np.ndarray | None, multimask: bool):
        """Mask logits [count, S / 4, S / 4] and the bool masks [count, H, W] they mean."""
        fill = lambda x: np.concatenate([x, np.repeat(x[-1:], AT_ONCE - len(x), axis=0)])
        hint = None if hint is None else fill(hint.clip(-LOGIT_LIMIT, LOGIT_LIMIT))[..., None]
        out = decode(model, params, features, (fill(points * scale), fill(labels)), hint, multimask=multimask)
        best = np.asarray(out.ious).argmax(1)
        logits = np.asarray(out.masks, np.float32)[np.arange(AT_ONCE), best][:count]
        return logits, enlarge(logits, size) > 0

    results = {}
    boxes = np.stack([corners(mask) for mask in masks])
    _, results["box"] = predict(boxes, np.tile(np.array([[2, 3]], np.int32), (count, 1)), None, False)
    points = np.stack([interior_point(mask)[0] for mask in masks])[:, None].astype(np.float32)
    labels = np.ones((count, 1), np.int32)
    logits, found = predict(points, labels, None, True)
    results["1 click"] = found
    for _ in range(2):
        fixes = [correction_click(mask, wanted) for mask, wanted in zip(found, masks)]
        points = np.concatenate([points, np.array([[place] for place, _ in fixes], np.float32)], 1)
        labels = np.concatenate([labels, np.array([[label] for _, label in fixes], np.int32)], 1)
        logits, found = predict(points, labels, logits, False)
    return results | {"3 clicks": found}


def corners(mask: np.ndarray) -> np.ndarray:
    """[2, 2]: x0 y0 and x1 y1 of the box round a mask [H, W]."""
    y, x = np.nonzero(mask)
    return np.array([[x.min(), y.min()], [x.max(), y.max()]], np.float32)


def interior_point(region: np.ndarray) -> tuple[tuple[int, int], float]:
    """The pixel x, y of a region [H, W] that lies farthest from its edge, and how far; the image ends it too."""
    distance = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), region.shape)
    return (x, y), distance[y, x]


def correction_click(found: np.ndarray, wanted: np.ndarray) -> tuple[tuple[int, int], int]:
    """The next click x, y on a mask [H, W] and its label: 1 where object was missed, 0 where too much was taken."""
    (missed, deep), (extra, deeper) = interior_point(wanted & ~found), interior_point(found & ~wanted)
    if deep == deeper == 0:  # nothing is wrong
        return interior_point(wanted)[0], 1
    return (missed, 1) if deep >= deeper else (extra, 0)


def enlarge(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[I, h, w] -> [I, H, W], bilinear between pixel centres: in numpy, since every image has a size of its own."""

    def weights(length: int, wanted: int) -> np.ndarray:
        place = ((np.arange(wanted) + 0.5) * length / wanted - 0.5).clip(0, length - 1)
        return np.maximum(1 - np.abs(place[:, None] - np.arange(length)), 0).astype(np.float32)

    return weights(logits.shape[1], size[0]) @ logits @ weights(logits.shape[2], size[1]).T


def object_ious(found: dict[str, np.ndarray], masks: np.ndarray) -> dict[str, np.ndarray]:
    """{"box", "1 click", "3 clicks": IoU [I]} of what `segment_objects` found with `masks` [I, H, W]."""
    return {name: iou(found[name], masks) for name in PROMPTS}


def mean_ious(images: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """{"box", "1 click", "3 clicks": mIoU}: the mean over all objects of all images."""
    return {name: float(np.concatenate([ious[name] for ious in images]).mean()) for name in PROMPTS}


def track_from_masks(
    predictor: VideoPredictor, clip, first: dict[str, tuple[int, np.ndarray]]
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (frame, object, bool mask [H, W]) of objects given by a mask on the first frame they are seen in.

    clip: what `VideoPredictor.init_state` takes. Frames before an object's first are not yielded for it.
    """
    order = sorted(first, key=lambda name: first[name][0])
    for start, group in groupby(order, key=lambda name: first[name][0]):
        state = predictor.init_state(clip)
        for name in group:
            predictor.add_new_mask(state, start, name, first[name][1])
        for frame, names, logits in predictor.propagate_in_video(state):
            yield from ((frame, name, mask) for name, mask in zip(names, logits[:, 0] > 0))

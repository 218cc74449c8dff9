"""Which masks a report shows: the worst, and a random sample, so that none is picked for its looks."""

import random
from typing import NamedTuple

import numpy as np

from sam2jq.data.prompts import click_grid
from sam2jq.eval.agreement import Compared
from sam2jq.eval.image_benchmark import interior_point
from sam2jq.eval.metrics import iou

WORST, RANDOM = 5, 7


class Shown(NamedTuple):
    """What two models make of one click; the click x, y is in parts of the image's width and height."""

    image: str
    click: tuple[float, float]
    iou: float  # of the two masks
    before: np.ndarray  # bool [h, w], in full precision
    after: np.ndarray  # bool [h, w], quantized
    ground_truth: tuple[float, float] | None = None  # IoU of either with the true mask, where that is known


class Gallery(NamedTuple):
    """worst: of the WORST images with the worst masks the worst one each; sample: one mask of each drawn image."""

    worst: tuple[Shown, ...] = ()
    sample: tuple[Shown, ...] = ()


def sample_images(images: int, seed: int) -> dict[int, float]:
    """{index of an image: which of its masks is shown, in 0..1} of RANDOM images."""
    rng = random.Random(seed)
    return {i: rng.random() for i in sorted(rng.sample(range(images), min(RANDOM, images)))}


def add(gallery: Gallery, shown: list[Shown], drawn: float | None) -> Gallery:
    """`gallery` after an image with the masks `shown`, of which `drawn` says which one is in the sample, if any."""
    if not shown:
        return gallery
    by_iou = lambda one: one.iou
    worst = sorted([*gallery.worst, min(shown, key=by_iou)], key=by_iou)[:WORST]
    sample = () if drawn is None else (shown[int(drawn * len(shown))],)
    return Gallery(tuple(worst), gallery.sample + sample)


def of_clicks(image: str, result: Compared) -> list[Shown]:
    """The masks of a grid of clicks, of each click the one that full precision thinks best."""
    clicks = click_grid(round(len(result.best) ** 0.5), 1)[0][:, 0].tolist()
    before, after = result.masks
    return [
        Shown(image, tuple(click), float(result.ious[i, best]), before[i, best], after[i, best])
        for i, (click, best) in enumerate(zip(clicks, result.best))
    ]


def of_objects(image: str, masks: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[Shown]:
    """What two models make of one click into each of the objects `masks`; all bool [I, H, W]."""
    height, width = masks.shape[1:]
    clicks = [interior_point(mask)[0] for mask in masks]
    ious = zip(*(iou(*pair).tolist() for pair in ((after, before), (before, masks), (after, masks))))
    return [
        Shown(image, (float(x + 0.5) / width, float(y + 0.5) / height), between, *both, tuple(truth))
        for (x, y), (between, *truth), both in zip(clicks, ious, zip(before, after))
    ]

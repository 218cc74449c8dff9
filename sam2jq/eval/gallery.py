"""The masks that a report shows: the worst ones and a random sample."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam2jq.data.prompts import click_grid
from sam2jq.eval.agreement import ImageAgreement
from sam2jq.eval.image_benchmark import interior_point
from sam2jq.eval.metrics import iou

WORST, RANDOM = 5, 7


class GalleryItem(NamedTuple):
    """The masks of two models for one click; click: (x, y), in 0..1 of the image's width and height."""

    image: str
    click: tuple[float, float]
    iou: float  # of the two masks
    before: np.ndarray  # bool [h, w], in full precision
    after: np.ndarray  # bool [h, w], quantized
    ground_truth: tuple[float, float] | None = None  # IoUs of before and after with the ground truth, if there is one


class EverythingItem(NamedTuple):
    """All masks of one image, bool [N, H, W] each, in full precision and quantized."""

    image: str
    before: np.ndarray
    after: np.ndarray


class Gallery(NamedTuple):
    """worst: the worst mask of each of the WORST images with the lowest IoU; sample: one mask per sampled image;
    everything: of the first image that was compared."""

    worst: tuple[GalleryItem, ...] = ()
    sample: tuple[GalleryItem, ...] = ()
    everything: EverythingItem | None = None


def sample_images(images: int, seed: int) -> dict[int, float]:
    """{index of an image: which of its masks is shown, as a position in 0..1} of RANDOM images out of `images`."""
    rng = random.Random(seed)
    return {i: rng.random() for i in sorted(rng.sample(range(images), min(RANDOM, images)))}


def add_items(gallery: Gallery, items: list[GalleryItem], position: float | None) -> Gallery:
    """`gallery` updated with the items of one image; position: from `sample_images`, None if it is not sampled."""
    if not items:
        return gallery
    by_iou = lambda item: item.iou
    worst = sorted([*gallery.worst, min(items, key=by_iou)], key=by_iou)[:WORST]
    sample = () if position is None else (items[int(position * len(items))],)
    return Gallery(tuple(worst), gallery.sample + sample)


def merge_galleries(galleries: Sequence[Gallery], images: Sequence[str]) -> Gallery:
    """The gallery of all images, from those of parts of them, whose items may be in any order. images: their names."""
    place = {name: i for i, name in enumerate(images)}
    in_order = lambda items: sorted(items, key=lambda item: place[item.image])
    worst, sample = ([item for gallery in galleries for item in getattr(gallery, kind)] for kind in ("worst", "sample"))
    return Gallery(tuple(sorted(in_order(worst), key=lambda item: item.iou)[:WORST]), tuple(in_order(sample)))


def click_items(image: str, result: ImageAgreement) -> list[GalleryItem]:
    """The items of a grid of clicks: of each click the mask with the best IoU as estimated in full precision."""
    clicks = click_grid(round(len(result.best) ** 0.5), 1)[0][:, 0].tolist()
    before, after = result.masks
    return [
        GalleryItem(image, tuple(click), float(result.ious[i, best]), before[i, best], after[i, best])
        for i, (click, best) in enumerate(zip(clicks, result.best))
    ]


def object_items(image: str, masks: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[GalleryItem]:
    """The items of one click into each object. masks: ground truth, before, after: predictions; all bool [I, H, W]."""
    height, width = masks.shape[1:]
    clicks = [interior_point(mask)[0] for mask in masks]
    ious = zip(*(iou(*pair).tolist() for pair in ((after, before), (before, masks), (after, masks))))
    return [
        GalleryItem(image, (float(x + 0.5) / width, float(y + 0.5) / height), between, *both, tuple(truth))
        for (x, y), (between, *truth), both in zip(clicks, ious, zip(before, after))
    ]

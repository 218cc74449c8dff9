import numpy as np

from sam2jq.data.prompts import click_grid
from sam2jq.eval.agreement import ImageAgreement
from sam2jq.eval.gallery import (
    RANDOM,
    WORST,
    Gallery,
    GalleryItem,
    add_items,
    click_items,
    merge_galleries,
    object_items,
    sample_images,
)


def item(name: str, iou: float) -> GalleryItem:
    return GalleryItem(name, (0.5, 0.5), iou, np.ones((2, 2), bool), np.ones((2, 2), bool))


def build_gallery(images: list[list[GalleryItem]], seed: int) -> Gallery:
    sampled, gallery = sample_images(len(images), seed), Gallery()
    for i, items in enumerate(images):
        gallery = add_items(gallery, items, sampled.get(i))
    return gallery


def test_the_worst_masks_are_sorted_by_iou():
    ious = np.random.default_rng(0).permutation(40) / 40
    images = [[item(str(i), iou), item(str(i), iou + 1)] for i, iou in enumerate(ious)]
    assert [one.iou for one in build_gallery(images, 0).worst] == sorted(ious)[:WORST]


def test_the_sample_depends_on_the_seed_and_not_on_the_ious():
    images = lambda sign: [[item(str(i), sign * i / 40)] for i in range(40)]
    names = lambda gallery: [one.image for one in gallery.sample]
    assert len(names(build_gallery(images(1), 0))) == RANDOM
    assert names(build_gallery(images(1), 0)) == names(build_gallery(images(-1), 0))
    assert names(build_gallery(images(1), 0)) != names(build_gallery(images(1), 1))


def test_galleries_of_parts_are_merged_into_that_of_all_images():
    """In whatever order the parts saw their images."""
    order = np.random.default_rng(0).permutation(40)
    items = [item(str(i), (7 * i % 40) / 40) for i in range(40)]
    sampled, parts = sample_images(40, 0), [Gallery(), Gallery(), Gallery()]
    for i in order:
        parts[i % 3] = add_items(parts[i % 3], [items[i]], sampled.get(i))
    merged, whole = merge_galleries(parts, [str(i) for i in range(40)]), build_gallery([[one] for one in items], 0)
    names = lambda gallery: [[one.image for one in kind] for kind in (gallery.worst, gallery.sample)]
    assert names(merged) == names(whole)


def test_an_image_without_an_object_adds_no_mask():
    assert [one.image for one in build_gallery([[], [item("a", 0.5)]], 0).worst] == ["a"]


def test_of_each_click_the_mask_with_the_best_estimated_iou_in_full_precision_is_taken():
    masks = np.random.default_rng(0).random((2, 4, 3, 8, 8)) < 0.5
    best = np.array([0, 2, 1, 2])
    ious = np.arange(12.0).reshape(4, 3)
    items = click_items("a", ImageAgreement(None, None, ious, best, tuple(masks)))
    assert [one.iou for one in items] == [0, 5, 7, 11]
    assert np.array_equal(items[1].before, masks[0, 1, 2])
    assert np.allclose([one.click for one in items], click_grid(2, 1)[0][:, 0])


def test_the_click_lies_inside_the_object_and_both_masks_are_compared_with_it():
    ground_truth = np.zeros((1, 10, 20), bool)
    ground_truth[0, 2:7, 4:14] = True
    half = ground_truth & (np.arange(20) < 9)
    (one,) = object_items("a", ground_truth, ground_truth, half)
    x, y = one.click
    assert ground_truth[0, int(y * 10), int(x * 20)]
    assert (one.iou, one.ground_truth) == (0.5, (1.0, 0.5))

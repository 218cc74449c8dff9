import numpy as np

from sam2jq.data.prompts import click_grid
from sam2jq.eval.agreement import Compared
from sam2jq.eval.gallery import RANDOM, WORST, Gallery, Shown, add, of_clicks, of_objects, sample_images


def shown(name: str, iou: float) -> Shown:
    return Shown(name, (0.5, 0.5), iou, np.ones((2, 2), bool), np.ones((2, 2), bool))


def collected(images: list[list[Shown]], seed: int) -> Gallery:
    drawn, gallery = sample_images(len(images), seed), Gallery()
    for i, of in enumerate(images):
        gallery = add(gallery, of, drawn.get(i))
    return gallery


def test_the_worst_are_the_worst_and_come_worst_first():
    ious = np.random.default_rng(0).permutation(40) / 40
    images = [[shown(str(i), iou), shown(str(i), iou + 1)] for i, iou in enumerate(ious)]
    assert [one.iou for one in collected(images, 0).worst] == sorted(ious)[:WORST]


def test_the_sample_follows_the_seed_and_not_the_figures():
    images = lambda sign: [[shown(str(i), sign * i / 40)] for i in range(40)]
    names = lambda gallery: [one.image for one in gallery.sample]
    assert len(names(collected(images(1), 0))) == RANDOM
    assert names(collected(images(1), 0)) == names(collected(images(-1), 0))
    assert names(collected(images(1), 0)) != names(collected(images(1), 1))


def test_an_image_without_an_object_shows_nothing():
    assert [one.image for one in collected([[], [shown("a", 0.5)]], 0).worst] == ["a"]


def test_of_a_click_the_mask_is_shown_that_full_precision_thinks_best():
    masks = np.random.default_rng(0).random((2, 4, 3, 8, 8)) < 0.5
    best = np.array([0, 2, 1, 2])
    ious = np.arange(12.0).reshape(4, 3)
    found = of_clicks("a", Compared(None, None, ious, best, tuple(masks)))
    assert [one.iou for one in found] == [0, 5, 7, 11]
    assert np.array_equal(found[1].before, masks[0, 1, 2])
    assert np.allclose([one.click for one in found], click_grid(2, 1)[0][:, 0])


def test_an_object_is_clicked_inside_and_both_masks_are_compared_with_it():
    ground_truth = np.zeros((1, 10, 20), bool)
    ground_truth[0, 2:7, 4:14] = True
    half = ground_truth & (np.arange(20) < 9)
    (one,) = of_objects("a", ground_truth, ground_truth, half)
    x, y = one.click
    assert ground_truth[0, int(y * 10), int(x * 20)]
    assert (one.iou, one.ground_truth) == (0.5, (1.0, 0.5))

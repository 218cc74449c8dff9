import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, label

from sam2jq.data import draw_clip, draw_scene
from sam2jq.data.synthetic import scenes, shapes
from sam2jq.data.synthetic.scenes import CENTRE, MAX_OBJECTS, MIN_VISIBLE, Motion, build_world, render

SEEDS = range(60)
PLAIN = {"camera": Motion(CENTRE, 1), "slope": 0, "dapple": 0, "blurs": np.zeros(2), "grain": 0, "strokes": []}


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_seed_determines_the_scene(seed):
    scene, again, other = draw_scene(seed), draw_scene(seed), draw_scene(seed + 1)
    np.testing.assert_array_equal(scene.image, again.image)
    np.testing.assert_array_equal(scene.masks, again.masks)
    assert (scene.image != other.image).mean() > 0.5


def test_a_scene_is_the_first_frame_of_its_clip_and_a_clip_the_start_of_a_longer_one():
    scene, clip, longer = draw_scene(3, 64), draw_clip(3, 2, 64), draw_clip(3, 3, 64)
    np.testing.assert_array_equal(scene.image, clip.frames[0])
    np.testing.assert_array_equal(scene.masks, clip.masks[0])
    np.testing.assert_array_equal(clip.frames, longer.frames[:2])
    np.testing.assert_array_equal(clip.masks, longer.masks[:2])


@pytest.mark.parametrize("size", [32, 100, 256])
def test_masks_are_disjoint_and_never_too_small(size):
    for seed in SEEDS:
        image, masks = draw_scene(seed, size)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert (masks.shape[1:], masks.dtype) == ((size, size), bool)
        assert 1 <= len(masks) <= MAX_OBJECTS
        assert masks.sum(axis=0).max() == 1
        assert masks.mean(axis=(1, 2)).min() >= MIN_VISIBLE


def test_an_object_is_mostly_in_one_piece():
    """Under a tenth of the masks have less than 70 % of their area in one piece: those that another object cuts."""
    masks = [mask for seed in SEEDS for mask in draw_scene(seed, 128).masks]
    parts = [np.bincount(label(mask)[0].ravel())[1:].max() / mask.sum() for mask in masks]
    assert np.mean(np.less(parts, 0.7)) < 0.1


def test_a_mask_is_where_its_own_object_is_visible():
    """Every object is painted in its own hue; light, shadow and texture change the brightness only."""
    hues = np.linspace(0, 1, MAX_OBJECTS + 1)

    def colored(sprite, hue):
        return sprite._replace(colours=np.float32([[hue, 1 - hue, 0]] * 2))

    for seed in SEEDS:
        world = build_world(seed)
        ground = [colored(sprite, 0) for sprite in world.ground]
        objects = [colored(sprite, hue) for sprite, hue in zip(world.objects, hues[1:])]
        image, labels = render(world._replace(**PLAIN | {"ground": ground, "objects": objects}), 0, 128)
        hue = image[..., 0] / np.maximum(image[..., :2].sum(axis=-1, dtype=float), 1)
        assert (np.abs(hue - hues[labels]) < 0.5 / MAX_OBJECTS).mean() > 0.95  # edges are mixed


def test_an_object_covers_those_behind_it():
    """Without the rear objects the mask of the front one stays the same; without the front one theirs only grow."""
    for seed in SEEDS:
        world = build_world(seed)
        _, both = render(world, 0, 64)
        *rear, front = world.objects
        _, alone = render(world._replace(objects=[front]), 0, 64)
        _, without = render(world._replace(objects=rear), 0, 64)
        np.testing.assert_array_equal(both == len(world.objects), alone == 1)
        assert all((without == number)[both == number].all() for number in range(1, len(world.objects)))


def test_clutter_of_the_ground_has_no_mask_and_is_smaller_than_any_mask():
    for seed in SEEDS:
        world = build_world(seed)
        _, labels = render(world._replace(objects=[]), 0, 64)
        assert not labels.any()
        assert all(np.pi * abs(sprite.motion.size) ** 2 < 1.1 * MIN_VISIBLE for sprite in world.ground[2:])


@pytest.mark.parametrize("shape", [shapes.ring, shapes.frame, shapes.mug])
def test_some_shapes_have_a_hole(shape):
    y, x = np.mgrid[-1.3:1.3:64j, -1.3:1.3:64j].astype(np.float32)
    for seed in SEEDS:
        inside = shape(np.random.default_rng(seed), x, y) < 0
        assert binary_fill_holes(inside).sum() > 1.05 * inside.sum()


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_is_one_piece_within_reach(shape):
    """At the strongest bending, and except for the last pixels of sharp tips."""
    y, x = np.mgrid[-1.6:1.6:128j, -1.6:1.6:128j].astype(np.float32)
    for seed in SEEDS:
        inside = shape(np.random.default_rng(seed), x, y + 0.12 * np.sin(2.5 * x + seed)) < 0
        assert np.bincount(label(inside)[0].ravel())[1:].max() > 0.99 * inside.sum()
        assert np.hypot(x, y)[inside].max() < scenes.REACH


def test_texture_moves_with_the_object():
    """An object that moves by (5, 3) pixels per frame has the same pixels at its new position."""
    for seed in range(20):
        world = build_world(seed)
        lone = world.objects[-1]
        motion = Motion(CENTRE, lone.motion.size / abs(lone.motion.size) / 8, velocity=(5 + 3j) / 128)
        world = world._replace(**PLAIN | {"objects": [lone._replace(motion=motion)]})
        (image, labels), (later, later_labels) = render(world, 0, 128), render(world, 2, 128)
        np.testing.assert_array_equal(np.roll(labels, (6, 10), (0, 1)), later_labels)
        before = np.roll(image, (6, 10), (0, 1)).astype(int)[later_labels > 0]
        # all but the edge, where the ground shows through, and rounding at sharp borders within the texture
        assert (np.abs(before - later[later_labels > 0]) <= 2).mean() > 0.85


def test_the_ground_moves_with_the_camera():
    """A pan of 4 pixels per frame shifts the ground by 4 pixels."""
    world = build_world(5)._replace(**PLAIN | {"objects": [], "camera": Motion(CENTRE, 1, velocity=4 / 64)})
    (image, _), (later, _) = render(world, 0, 64), render(world, 1, 64)
    assert (np.abs(image[:, 4:].astype(int) - later[:, :-4]) <= 2).mean() > 0.95


@pytest.fixture(scope="module")
def clips():
    return [draw_clip(seed, size=64) for seed in range(24)]


def test_the_first_frame_shows_every_object(clips):
    for frames, masks in clips:
        assert (frames.shape, frames.dtype, masks.dtype) == ((24, 64, 64, 3), np.uint8, bool)
        assert masks.shape == (24, masks.shape[1], 64, 64)
        assert masks.sum(axis=1).max() == 1
        assert masks[0].mean(axis=(1, 2)).min() >= MIN_VISIBLE


def test_objects_move_smoothly(clips):
    """Masks of an object in adjacent frames have a mean IoU over 0.6; those of the first and last frame under 0.4."""
    steps, trips = [], []
    for _, masks in clips:
        large = masks.mean(axis=(2, 3)) > 0.01  # of smaller ones, at this size, most pixels are edges
        steps += iou(masks[:-1], masks[1:])[large[:-1]].tolist()
        trips += iou(masks[0], masks[-1]).tolist()
    assert np.mean(steps) > 0.6
    assert np.mean(np.less(steps, 0.05)) < 0.02
    assert np.mean(trips) < 0.4


def iou(a, b):
    """Intersection over union over the last two axes."""
    return (a & b).sum(axis=(-2, -1)) / np.maximum((a | b).sum(axis=(-2, -1)), 1)


def test_in_over_a_third_of_the_clips_an_object_vanishes_and_returns(clips):
    def returns(visible):
        gone = np.flatnonzero(~visible)
        return len(gone) > 0 and visible[gone[0] :].any()

    found = [any(returns(visible) for visible in masks.any(axis=(2, 3)).T) for _, masks in clips]
    assert np.mean(found) > 1 / 3


def test_colour_alone_does_not_segment_objects():
    """Mean IoU of three baselines, each with the best threshold for the image: one channel for all objects together,
    under 0.6; one channel for one object, under 0.35; distance in color to a clicked pixel, under 0.4.

    Objects cover 0.32 of an image, so that a mask of everything already has an IoU of 0.32.
    """

    def best(image, mask):
        levels = np.arange(8, 256, 8)
        guesses = (image[None] < levels[:, None, None, None]).transpose(0, 3, 1, 2).reshape(-1, *mask.shape)
        return max(iou(guesses, mask).max(), iou(~guesses, mask).max())

    def alike(image, mask):
        rows, columns = np.nonzero(mask)
        clicked = image[rows[len(rows) // 2], columns[len(rows) // 2]].astype(float)
        distance = np.linalg.norm(image - clicked, axis=-1)
        return iou(distance < np.arange(5, 200, 5)[:, None, None], mask).max()

    drawn = [draw_scene(seed, 64) for seed in SEEDS]
    assert np.mean([best(image, masks.any(axis=0)) for image, masks in drawn]) < 0.6
    assert np.mean([best(image, mask) for image, masks in drawn for mask in masks]) < 0.35
    assert np.mean([alike(image, mask) for image, masks in drawn for mask in masks]) < 0.4


def test_a_scene_too_small_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least 32 pixels, got 16"):
        draw_scene(0, 16)

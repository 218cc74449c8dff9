import numpy as np
import pytest

from sam2jq.data import draw_scene, scenes
from sam2jq.data.scenes import MAX_OBJECTS, MIN_VISIBLE

SEEDS = range(60)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_seed_is_a_scene(seed):
    scene, again, other = draw_scene(seed), draw_scene(seed), draw_scene(seed + 1)
    np.testing.assert_array_equal(scene.image, again.image)
    np.testing.assert_array_equal(scene.masks, again.masks)
    assert (scene.image != other.image).mean() > 0.5


@pytest.mark.parametrize("size", [32, 100, 256])
def test_masks_are_disjoint_and_never_empty(size):
    for seed in SEEDS:
        image, masks = draw_scene(seed, size)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert (masks.shape[1:], masks.dtype) == ((size, size), bool)
        assert 1 <= len(masks) <= MAX_OBJECTS
        assert masks.sum(axis=0).max() == 1
        assert masks.any(axis=(1, 2)).all()
        assert len(masks) == 1 or masks.mean(axis=(1, 2)).min() >= MIN_VISIBLE


def test_a_mask_is_where_its_own_object_is_seen(monkeypatch):
    """Object k is painted in a hue of its own; light and shadow change its brightness only, noise a little more."""

    def paint_hues(hues):
        return lambda rng, u, v, palette: np.broadcast_to(np.float32([hue := next(hues), 1 - hue, 0]), (*u.shape, 3))

    for seed in SEEDS:
        monkeypatch.setattr(scenes, "paint", paint_hues(iter(np.linspace(0, 1, MAX_OBJECTS + 1))))
        image, masks = draw_scene(seed, 128)
        hue = image[..., 0] / image[..., :2].sum(axis=-1, dtype=float)
        seen = [round(MAX_OBJECTS * np.median(hue[mask])) for mask in masks]
        assert seen == sorted(set(seen) - {0})  # from back to front, none of them background
        for k, mask in zip(seen, masks):
            assert (np.abs(hue[mask] - k / MAX_OBJECTS) < 0.5 / MAX_OBJECTS).mean() > 0.8  # edges are mixed


def test_some_objects_have_holes(monkeypatch):
    """Rings alone, and only the front one, whose holes are not cut by others."""
    monkeypatch.setattr(scenes, "SHAPES", (scenes.ring,))
    assert np.mean([has_hole(draw_scene(seed, 64).masks[-1]) for seed in SEEDS]) > 0.5


def has_hole(mask: np.ndarray) -> bool:
    """Whether some background cannot be reached from the image's border by steps to a side."""
    free = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(free)
    reached[0] = True
    while True:
        grown = reached.copy()
        for axis in (0, 1):
            grown |= np.roll(reached, 1, axis) | np.roll(reached, -1, axis)
        grown &= free
        if (grown == reached).all():
            return bool((free & ~reached).any())
        reached = grown


def test_brightness_does_not_tell_objects_from_background():
    """The best single threshold, either way round, finds the objects with an IoU under 0.5 on average."""

    def best_iou(seed):
        image, masks = draw_scene(seed, 64)
        grey, inside = image.mean(axis=-1), masks.any(axis=0)
        guesses = [guess for t in range(0, 256, 8) for guess in (grey > t, grey <= t)]
        return max((guess & inside).sum() / (guess | inside).sum() for guess in guesses)

    assert np.mean([best_iou(seed) for seed in SEEDS]) < 0.5


def test_a_scene_too_small_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least 32 pixels, got 16"):
        draw_scene(0, 16)

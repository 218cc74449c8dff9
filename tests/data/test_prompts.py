import jax
import numpy as np
import pytest

from sam2jq.data import prompts

KEYS = [jax.random.key(i) for i in range(5)]
MASK = np.zeros((1, 64, 64), bool)
MASK[0, 20:36, 8:52] = True
COVERAGE = MASK.reshape(1, 16, 4, 16, 4).mean((2, 4), dtype=np.float32)


def test_points_lie_on_the_object():
    for key in KEYS:
        points = np.asarray(prompts.random_points(key, prompts.inside(np.repeat(COVERAGE, 50, 0)), 64))
        x, y = np.round(points[:, 0]).astype(int).T
        assert MASK[0, y, x].all()
        assert len(set(zip(x, y))) > 20


def test_an_object_thinner_than_a_cell_is_clicked_in_the_cell_it_covers_most():
    coverage = np.zeros((1, 16, 16), np.float32)
    coverage[0, 3, 5], coverage[0, 3, 6] = 0.2, 0.3
    (x, y), *_ = np.asarray(prompts.random_points(KEYS[0], prompts.inside(coverage), 64))[0]
    assert (int(x) // 4, int(y) // 4) == (6, 3)


def test_boxes_are_tight():
    np.testing.assert_array_equal(prompts.boxes(MASK), [[[8, 20], [51, 35]]])


def test_jittered_boxes_stay_close_and_inside_the_image():
    box = np.asarray(prompts.boxes(MASK))
    moved = np.stack([prompts.jitter_boxes(key, box, 64) for key in KEYS])
    assert 0 < np.abs(moved - box).max() <= 0.02 * 64 + 1e-5
    assert moved.min() >= 0
    assert moved.max() <= 63


@pytest.mark.parametrize(("logits", "label", "rows"), [(-1.0, 1, (20, 36)), (1.0, 0, None)])
def test_correction_clicks_lie_where_the_mask_is_wrong(logits, label, rows):
    """An empty mask gets a foreground click on the object, a full mask a background click outside it."""
    for key in KEYS:
        points, labels = prompts.sample_correction_clicks(key, np.full((1, 16, 16), logits, np.float32), COVERAGE, 64)
        x, y = np.round(np.asarray(points)[0, 0]).astype(int)
        assert int(labels[0, 0]) == label
        assert MASK[0, y, x] == bool(label)


def test_a_correct_mask_gets_a_click_on_the_object():
    points, labels = prompts.sample_correction_clicks(KEYS[0], np.where(COVERAGE > 0.5, 1.0, -1.0), COVERAGE, 64)
    x, y = np.round(np.asarray(points)[0, 0]).astype(int)
    assert MASK[0, y, x]
    assert int(labels[0, 0]) == 1

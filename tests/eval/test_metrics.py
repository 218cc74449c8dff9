import numpy as np
import pytest

from sam2jq.eval.compare import prompt_grid
from sam2jq.eval.metrics import iou, relative_error


def test_relative_error_of_known_vectors():
    assert relative_error([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)
    assert relative_error([0.0], [0.0]) == 0
    assert relative_error([1.0], [0.0]) == float("inf")


def test_iou_of_known_masks():
    a = np.array([[1, 1, 0, 0]], bool)
    b = np.array([[0, 1, 1, 0]], bool)
    none = np.zeros_like(a)
    np.testing.assert_allclose(iou(np.stack([a, a, none]), np.stack([a, b, none])), [1, 1 / 3, 1])
    assert iou(a, none) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="shapes differ"):
        iou(np.zeros((1, 2), bool), np.zeros((2, 1), bool))


def test_the_prompt_grid_covers_the_image_evenly():
    points, labels = prompt_grid(2, 8)
    assert points[:, 0].tolist() == [[2, 2], [6, 2], [2, 6], [6, 6]]
    assert (labels == 1).all()

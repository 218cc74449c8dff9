"""The boxes of COCO's annotations, and that they are those of the masks."""

import numpy as np
import pytest

from sam2jq.data.coco import coco_images, readable_instances
from sam2jq.errors import UserError

from .test_coco import SQUARE, annotation, instances, root

__all__ = ["root"]  # a fixture
BAR = [[12, 8, 28, 8, 28, 18, 12, 18]]


def test_an_instance_without_a_box_gets_that_of_its_mask(root):
    pytest.importorskip("pycocotools")
    without = annotation(SQUARE)
    del without["bbox"]
    (instance,) = instances(root, without)
    np.testing.assert_array_equal(instance.box, [5, 4, 11, 8])


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([5, float("nan"), 2, 2], "not finite"),
        ([20, 15, -10, -5], "no area"),
        ([5, 5, 0, 4], "no area"),
        ([5, 4, 6], "is not four numbers: give x, y, width, height"),
        ([5, 4, 6, "4"], "is not four numbers"),
        ("5 4 6 4", "is not four numbers"),
    ],
)
def test_a_box_without_an_area_is_an_error(root, bbox, message):
    with pytest.raises(UserError, match=message):
        instances(root, annotation(SQUARE) | {"bbox": bbox})


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        (
            [12, 8, 28, 18],
            r"is x0, y0, x1, y1, as its mask shows; give x, y, width, height .* \[12.0, 8.0, 16.0, 10.0\]",
        ),
        ([0.4, 0.4, 0.53, 0.5], "is not where its mask is; give .* in pixels, .* or leave bbox out"),
        ([0, 0, 10, 5], "is not where its mask is"),
    ],
)
def test_a_box_that_contradicts_its_mask_is_an_error(root, bbox, message):
    pytest.importorskip("pycocotools")
    with pytest.raises(UserError, match=f"a.jpg: annotation 7 is not readable: its bbox .* {message}"):
        instances(root, annotation(BAR, bbox=bbox))
    (image,) = coco_images(str(root))
    assert list(readable_instances(image)[1]) == [7]


@pytest.mark.parametrize("bbox", [[12, 8, 16, 10], [8, 3, 22, 17], [12, 8, 9, 10], [-50, -50, 100, 100]])
def test_a_box_that_is_some_pixels_off_is_taken(root, bbox):
    """As in COCO, where boxes are up to 12 pixels off at an edge."""
    pytest.importorskip("pycocotools")
    (instance,) = instances(root, annotation(BAR, bbox=bbox))
    x, y, width, height = bbox
    np.testing.assert_array_equal(instance.box, [x, y, x + width, y + height])

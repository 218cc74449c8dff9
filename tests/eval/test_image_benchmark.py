import numpy as np
import scipy.ndimage

from sam2jq.data.synthetic.scenes import draw_scene
from sam2jq.eval.image_benchmark import (
    PROMPTS,
    corners,
    correction_click,
    interior_point,
    segment_objects,
)
from sam2jq.eval.vos_benchmark import track_from_masks
from sam2jq.predictors.image import ImagePredictor
from tests.conftest import twin

MASK = np.zeros((40, 60), bool)
MASK[10:21, 20:51] = True


def test_a_box_is_tight():
    np.testing.assert_array_equal(corners(MASK), [[20, 10], [50, 20]])


def test_the_first_click_is_the_pixel_farthest_from_the_edge():
    (x, y), distance = interior_point(MASK)
    assert (y, distance) == (15, 6)
    assert 25 <= x <= 45
    assert interior_point(np.ones((5, 9), bool))[0][1] == 2  # the image's edge counts
    assert interior_point(np.zeros((5, 9), bool)) == ((0, 0), 0)
    region = np.random.default_rng(0).random((40, 60)) < 0.8  # many pixels share the largest distance
    region[:7], region[:, 50:] = False, False
    whole = scipy.ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(whole.argmax(), region.shape)
    assert interior_point(region) == ((x, y), whole[y, x])


def test_a_correction_click_lies_in_the_largest_wrong_region():
    predicted = MASK.copy()
    predicted[10:21, 40:51] = False  # false negatives
    predicted[0:4, 0:4] = True  # fewer false positives
    (x, y), label = correction_click(predicted, MASK)
    assert label == 1
    assert MASK[y, x]
    assert not predicted[y, x]
    (x, y), label = correction_click(predicted | MASK, MASK)
    assert label == 0
    assert not MASK[y, x]
    assert correction_click(MASK, MASK) == (interior_point(MASK)[0], 1)


def test_objects_are_segmented_independently():
    """More objects than one batch of the decoder, in another order, get the same masks."""
    pair, scene = twin("nano"), draw_scene(5)
    masks = np.concatenate([scene.masks] * 6)[:18]
    predictor = ImagePredictor(pair.model, pair.params)
    found = segment_objects(predictor, scene.image, masks)
    reverse = segment_objects(predictor, scene.image, masks[::-1])
    assert set(found) == set(PROMPTS)
    for name in PROMPTS:
        assert found[name].shape == masks.shape
        assert np.mean(found[name] != reverse[name][::-1]) < 1e-3  # rounding flips pixels at edges


class Echo:
    """A predictor that returns the prompted mask in every frame."""

    def __init__(self):
        self.starts = []

    def init_state(self, clip, keep_outputs):
        return {"clip": clip, "masks": {}}

    def add_new_mask(self, state, frame, name, mask):
        state["start"], state["masks"][name] = frame, mask

    def propagate_in_video(self, state):
        self.starts.append((state["start"], list(state["masks"])))
        for frame in range(state["start"], state["clip"]):
            logits = np.stack([np.where(mask, 1.0, -1.0)[None] for mask in state["masks"].values()])
            yield frame, list(state["masks"]), logits


def test_objects_are_tracked_from_the_frame_of_their_first_mask():
    predictor = Echo()
    first = {"a": (0, MASK), "late": (3, ~MASK), "b": (0, ~MASK)}
    rows = list(track_from_masks(predictor, 5, first))
    assert predictor.starts == [(0, ["a", "b"]), (3, ["late"])]
    assert [(frame, name) for frame, name, _ in rows if name == "late"] == [(3, "late"), (4, "late")]
    assert all(np.array_equal(mask, first[name][1]) for _, name, mask in rows)

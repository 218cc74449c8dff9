"""Everything in an image, against sam2, whose missing `nms` of torchvision gets a plain stand-in."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from converters.checkpoint import load_checkpoint
from converters.exports.vanilla import build_original, define_torchvision_operators
from converters.names import to_torch
from sam2jq import AutomaticMaskGenerator, build
from sam2jq.data import draw_scene
from sam2jq.data.coco_masks import decode_mask
from sam2jq.errors import UserError
from sam2jq.eval.metrics import iou
from sam2jq.predictors.crops import non_maximum_suppression
from sam2jq.predictors.upscale import STEP, canvas_of, measure, threshold, upscale
from tests.conftest import twin

IMAGE = draw_scene(3, 128).image[:100]
# low enough for some masks of the demo model at 64 pixels
SETTINGS = {"points_per_side": 4, "points_per_batch": 6, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.4}


@cache
def models(name: str = "nano", size: int = 64):
    """The original network, and the model and params: the trained nano, or random weights of another size."""
    if name != "nano":
        return twin(name, "2.1", size)
    model = build("nano", image_size=size)
    params, original = load_checkpoint("demo", model).params, build_original("nano", image_size=size)
    original.load_state_dict({key: torch.as_tensor(np.asarray(value)) for key, value in to_torch(params).items()})
    return original, model, params


def plain_nms(boxes, scores, idxs, iou_threshold):
    """Every pair is compared, the better box first."""
    boxes, kept = boxes.tolist(), []
    for i in scores.sort(descending=True, stable=True)[1].tolist():
        if all(box_iou(boxes[i], boxes[j]) <= iou_threshold for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def box_iou(a, b) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return width * height / (area(a) + area(b) - width * height or 1)


def original_generator(network, monkeypatch, **settings):
    define_torchvision_operators()
    from sam2 import automatic_mask_generator

    monkeypatch.setattr(automatic_mask_generator, "batched_nms", plain_nms)
    generator = automatic_mask_generator.SAM2AutomaticMaskGenerator(network, **settings)
    side = network.image_size
    generator.predictor._bb_feat_sizes = [(side // stride,) * 2 for stride in (4, 8, 16)]
    return generator


def mask_of(segmentation) -> np.ndarray:
    return decode_mask(segmentation, IMAGE.shape[:2]) if isinstance(segmentation, dict) else segmentation


def compare(expected: list[dict], got: list[dict]) -> None:
    """The same records, in the same order."""
    assert len(got) == len(expected) >= 3
    for theirs, ours in zip(expected, got):
        assert list(ours) == list(theirs)
        assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]
        pair = [mask_of(record["segmentation"]) for record in (theirs, ours)]
        assert iou(*pair) >= 0.99 or not np.any(pair)
        for key in ("predicted_iou", "stability_score"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3, nan_ok=True)
        for key in ("point_coords", "crop_box"):
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-4)
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=1)
        assert ours["area"] == pytest.approx(theirs["area"], rel=0.01, abs=1)


CASES = {
    "plain": {},
    "crops": {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "output_mode": "uncompressed_rle"},
    "refined": {"use_m2m": True, "output_mode": "coco_rle"},
    "one mask a click": {"multimask_output": False, "min_mask_region_area": 9, "pred_iou_thresh": 0.1},
    "no threshold": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "mask_threshold": 0.5},
    "own grid": {"points_per_side": None, "point_grids": [np.random.default_rng(0).random((9, 2))]},
}
COMPILING = ("refined", "one mask a click")  # a decoder of their own


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in COMPILING else ()) for case in CASES]
)
def test_records_equal_those_of_the_original(case, sam2_operator, monkeypatch):
    settings = SETTINGS | CASES[case]
    network, model, params = models()
    expected = original_generator(network, monkeypatch, **settings).generate(IMAGE)
    compare(expected, AutomaticMaskGenerator(model, params, **settings).generate(IMAGE))


@pytest.mark.slow
def test_records_of_small_equal_those_of_the_original(monkeypatch):
    thresholds = {
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
    }  # random masks fill the image
    settings = {"points_per_side": 4} | thresholds
    network, model, params = models("small", 256)
    expected = original_generator(network, monkeypatch, **settings).generate(IMAGE)
    compare(expected, AutomaticMaskGenerator(model, params, **settings).generate(IMAGE))


@pytest.fixture
def generator():
    return AutomaticMaskGenerator(*models()[1:], **SETTINGS)


def test_crops_and_images_of_other_sizes_compile_nothing(generator):
    generator.crop_n_layers, generator.point_grids = 1, [np.full((1, 2), 0.5), np.full((2, 2), 0.5)]
    generator.pred_iou_thresh = generator.stability_score_thresh = 0
    generator.generate(IMAGE)
    compiled = [program._cache_size() for program in (measure, threshold)]
    generator.generate(IMAGE[:90, :77])
    assert [program._cache_size() for program in (measure, threshold)] == compiled


def test_one_colour_and_an_empty_grid_give_a_list_and_one_pixel_an_error(generator):
    assert isinstance(generator.generate(np.full((40, 60, 3), 128, np.uint8)), list)
    generator.point_grids = [np.zeros((0, 2))]
    assert generator.generate(Image.fromarray(IMAGE)) == []
    with pytest.raises(UserError, match="the image has 1 x 1 pixels: give one of 2 x 2 pixels at least"):
        generator.generate(np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(UserError, match=r"an image must be uint8 \[H, W, 3\]"):
        generator.generate(np.zeros((9, 9), np.uint8))
    generator.crop_n_layers = 2
    with pytest.raises(UserError, match="crop_n_layers 2: crops of an image of 5 x 4 pixels would be less than 2"):
        generator.generate(np.zeros((4, 5, 3), np.uint8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side 0: no point is left in layer 0"),
        ({"crop_n_layers": -1}, "crop_n_layers -1: give 0 for the image alone"),
        (
            {"points_per_side": 2, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
            "left in layer 2",
        ),
        ({"points_per_side": None}, "give points_per_side or point_grids"),
        ({"point_grids": [np.zeros((1, 2))]}, "give points_per_side or point_grids"),
        ({"points_per_side": None, "point_grids": [[[0.5, np.nan]]]}, r"point_grids\[0\] holds NaN"),
        ({"points_per_side": None, "point_grids": [[[0.5]]]}, r"point_grids\[0\] \[1, 1\] must be \[N, 2\]"),
        ({"points_per_side": None, "point_grids": [[[0.5, 9]]]}, r"point_grids\[0\] .* in 0..1"),
        ({"points_per_side": None, "point_grids": [], "crop_n_layers": 1}, "0 grids for the image and 1 layers"),
        ({"points_per_batch": 0}, "points_per_batch 0: it must be at least 1"),
        ({"output_mode": "png"}, "output_mode 'png': allowed are binary_mask, uncompressed_rle, coco_rle"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        AutomaticMaskGenerator(None, {}, **settings)


def test_suppression_keeps_what_a_comparison_of_all_pairs_keeps():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (200, 2))
    boxes, scores = np.concatenate([corners, corners + rng.integers(0, 20, (200, 2))], axis=1), rng.random(200).round(1)
    kept = non_maximum_suppression(boxes, scores, 0.5)
    expected = plain_nms(torch.from_numpy(boxes), torch.from_numpy(scores), None, 0.5).tolist()
    assert kept.tolist() == expected
    assert 10 < len(kept) < 190
    assert non_maximum_suppression(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("size", [(100, 70), (64, 64), (20, 300)])
def test_upscaled_masks_are_those_of_torch(size):
    logits = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32)
    logits[2] = -5
    expected = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear")[0].numpy()
    canvas = canvas_of(16, size)
    full = np.asarray(upscale(logits, canvas))
    assert [length % STEP for length in full.shape[1:]] == [0, 0]
    np.testing.assert_allclose(full[:, : size[0], : size[1]], expected, atol=1e-5)
    stats = measure(logits, canvas, 0.2, 0.3)
    for mask, box, stability in zip(expected[:2], *map(np.asarray, stats)):
        (y0, x0), (y1, x1) = (f(np.argwhere(mask > 0.2), axis=0) for f in (np.min, np.max))
        assert box.tolist() == [x0, y0, x1, y1]
        assert stability == pytest.approx((mask > 0.5).sum() / (mask > -0.1).sum(), abs=1e-3)
    assert (np.asarray(stats.boxes)[2].tolist(), np.isnan(stats.stability[2])) == ([0, 0, 0, 0], True)

from functools import partial

import chex
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from converters.exports.vanilla import define_torchvision_operators
from sam2jq import ImagePredictor
from sam2jq.data import draw_scene
from sam2jq.errors import UserError
from sam2jq.models import chunking
from sam2jq.models.decoder import Decoded
from sam2jq.models.precision import float_dtype
from sam2jq.predictors import image as image_module
from sam2jq.tree import flatten
from tests.conftest import nhwc, relative, twin


@pytest.fixture(scope="module")
def predictors():
    """The original predictor and ours, with one photograph-shaped image set."""
    define_torchvision_operators()
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    pair = twin("nano", "2.1", 256)
    image = draw_scene(0, 320).image[:, :240]
    original, ours = SAM2ImagePredictor(pair.torch), ImagePredictor(pair.model, pair.params)
    original._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # it takes those of 1024 pixels for granted
    for predictor in (original, ours):
        predictor.set_image(image)
    return original, ours


POINT = {"point_coords": np.array([[100.0, 200.0], [30.5, 40.0]]), "point_labels": np.array([1, 0])}
PROMPTS = {
    "points": POINT,
    "box": {"box": np.array([20, 30, 200, 250])},
    "points and box": POINT | {"box": np.array([20, 30, 200, 250])},
    "mask": {"mask_input": 4 * np.random.default_rng(0).standard_normal((1, 64, 64)).astype(np.float32)},
    "boxes": {"box": np.array([[20, 30, 200, 250], [1, 2, 50, 60], [0, 0, 239, 319]])},
    "batch of points": {"point_coords": np.arange(10, 90, 10).reshape(4, 1, 2), "point_labels": [[1]] * 4},
    "normalized": {"point_coords": np.array([[0.4, 0.6]]), "point_labels": np.array([1]), "normalize_coords": False},
}
PROMPTS["points and mask"] = POINT | PROMPTS["mask"]


PROMPTS["no points"] = {"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0, int)}
PROMPTS["nothing"] = {}
PROMPTS["no points beside a box"] = PROMPTS["no points"] | PROMPTS["box"]
PROMPTS["boxes as corners"] = {"box": PROMPTS["boxes"]["box"].reshape(3, 2, 2)}
PROMPTS["numbers of boxes in a row"] = {"box": PROMPTS["boxes"]["box"].ravel()}
PROMPTS["a box with two more axes"] = {"box": PROMPTS["box"]["box"].reshape(1, 1, 4)}
PROMPTS["a box as points"] = {"point_coords": np.array([[20, 30], [200, 250]]), "point_labels": [2, 3]}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_scores_and_shapes_equal_the_original_predictor(predictors, prompt, multimask):
    expected, got = (p.predict(**PROMPTS[prompt], multimask_output=multimask, return_logits=True) for p in predictors)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert relative(got[0], expected[0]) <= 1e-4


def test_masks_equal_the_original_predictor(predictors):
    expected, got = (p.predict(**POINT)[0] for p in predictors)
    assert set(np.unique(got)) == {0, 1}
    assert got.dtype == expected.dtype
    assert (got != expected).mean() < 1e-4  # pixels whose logit is zero but for rounding


@pytest.mark.parametrize("areas", [(40, 0), (0, 40), (40, 40)])
def test_masks_without_small_holes_and_regions_equal_the_original_predictor(predictors, sam2_operator, areas):
    """The threshold is one at which the masks of random weights have holes and regions."""
    original, ours = predictors
    settings = {"mask_threshold": 0.0, "max_hole_area": areas[0], "max_sprinkle_area": areas[1]}
    cleaning = ImagePredictor(ours.model, ours.params, **settings)
    cleaning._images = ours._images
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(original._transforms, name, value)
        expected = original.predict(**POINT, return_logits=True)
    got, unchanged = (predictor.predict(**POINT, return_logits=True) for predictor in (cleaning, ours))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert np.abs(got[0] - unchanged[0]).max() > 1  # something was removed
    np.testing.assert_array_equal(got[2], unchanged[2])


def test_a_pil_image_has_the_embedding_of_its_array(predictors):
    _, ours = predictors
    image = draw_scene(1).image
    one, other = (ImagePredictor(ours.model, ours.params) for _ in range(2))
    one.set_image(image)
    other.set_image(Image.fromarray(image))
    np.testing.assert_array_equal(one.get_image_embedding(), other.get_image_embedding())


def test_bfloat16_activations_stay_close(predictors):
    """Measured: 0.7 to 0.9 % on three scenes, with and without XLA's optimizations; bfloat16 has 8 bits."""
    _, ours = predictors
    half = ImagePredictor(ours.model, ours.params, dtype="bfloat16")
    half.set_image(draw_scene(0, 320).image[:, :240])
    assert str(half.get_image_embedding().dtype) == "bfloat16"
    got, expected = (p.predict(**POINT, return_logits=True)[0] for p in (half, ours))
    assert 0 < relative(got, expected) < 0.012
    mlps = [leaf.dtype for path, leaf in flatten(half.params).items() if "/mlp/" in path and path.endswith("/kernel")]
    assert mlps
    assert set(mlps) == {np.dtype("bfloat16")}


def test_accelerators_compute_in_bfloat16_unless_told_otherwise(monkeypatch):
    assert float_dtype("auto") == "float32"
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert float_dtype("auto") == "bfloat16"
    assert float_dtype("float32") == "float32"


def test_no_points_beside_boxes_are_the_boxes_alone(predictors):
    _, ours = predictors
    for box in (PROMPTS["box"], PROMPTS["boxes"]):
        for x, y in zip(ours.predict(**PROMPTS["no points"], **box), ours.predict(**box), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "prompt",
    [{"box": np.zeros((0, 4))}, {"box": []}, {"point_coords": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))}],
)
@pytest.mark.parametrize(("multimask", "count"), [(True, 3), (False, 1)])
def test_no_prompt_of_a_batch_gives_an_empty_result(predictors, prompt, multimask, count):
    masks, ious, low_res = predictors[1].predict(**prompt, multimask_output=multimask)
    assert (masks.shape, ious.shape, low_res.shape) == ((0, count, 320, 240), (0, count), (0, count, 64, 64))
    assert {x.dtype for x in (masks, ious, low_res)} == {np.dtype(np.float32)}


DISC = np.hypot(*(np.mgrid[:64, :64] - 30)) < 12


@pytest.mark.parametrize(
    "mask",
    [
        DISC,
        DISC * np.uint8(255),
        DISC * 7,
        DISC * 1.0,
        DISC * 255.0,
        DISC * 0.4,
        np.ones((64, 64)),
        DISC * 254.5,
    ],
)
def test_a_mask_in_place_of_logits_is_an_error(predictors, mask):
    """The original takes 0 and 1 as logits, and the object is then nowhere or everywhere."""
    with pytest.raises(UserError, match=r"mask_input holds a mask, not logits: .* 20 \* \(mask > 0\) - 10"):
        predictors[1].predict(mask_input=mask[None])
    with pytest.raises(UserError, match="mask_input holds a mask"):
        predictors[1].predict(mask_input=np.stack([np.where(DISC, 3.5, -2.0), mask])[:, None])


def test_logits_of_any_sign_are_no_mask(predictors):
    """The way out of the error above, logits over 0 everywhere, those of a saturated mask, and zeros for no mask."""
    original, ours = predictors
    for logits in (20 * DISC - 10, 2.5 + DISC, np.full((64, 64), 32.0), np.zeros((64, 64))):
        assert relative(*(p.predict(mask_input=logits[None], return_logits=True)[0] for p in (ours, original))) <= 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": [[1, 2]]}, "point_coords and point_labels go together"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"\[1, 2\] and point_labels \[2\]"),
        ({"point_coords": [[1, 2]], "point_labels": [5]}, "point_labels must be 1"),
        ({"mask_input": np.zeros((1, 8, 8))}, r"mask_input \[1, 8, 8\] must be \[1, 64, 64\]"),
        ({"box": np.zeros((3, 4)), **POINT}, "the same number of prompts"),
        ({"box": [1, 2, 3]}, r"box \[3\] must be \[4\] or \[P, 4\]"),
        ({"box": np.zeros((4, 2))}, r"box \[4, 2\] must be \[4\] or \[P, 4\]"),
        ({"point_coords": [[[1, 2]]] * 2, "point_labels": [1, 0]}, r"\[2, 1, 2\] and point_labels \[2\] must be"),
        ({"point_coords": [[np.nan, 1]], "point_labels": [1]}, "point_coords holds NaN or infinite values"),
        ({"point_coords": [[1e39, 1]], "point_labels": [1]}, "point_coords holds NaN or infinite values"),
        ({"point_coords": [[None, 1]], "point_labels": [1]}, "point_coords holds NaN or infinite values"),
        ({"point_coords": [[1, 1]], "point_labels": [0.5]}, "point_labels must be 1"),
        ({"point_coords": [[1, 1]], "point_labels": [np.nan]}, "point_labels holds NaN"),
        ({"box": [0, 0, np.inf, 5]}, "box holds NaN or infinite values"),
        ({"mask_input": np.full((1, 64, 64), np.nan)}, "mask_input holds NaN or infinite values"),
        ({"box": [1j, 0, 5, 5]}, "box is not an array of numbers"),
        ({"box": "left"}, "box is not an array of numbers"),
        ({"point_coords": [[1, 2], [3]], "point_labels": [1, 0]}, "point_coords is not an array of numbers"),
    ],
)
def test_a_wrong_prompt_is_named(predictors, prompt, message):
    with pytest.raises(UserError, match=message):
        predictors[1].predict(**prompt)


def test_tensors_of_bfloat16_are_taken(predictors):
    tensor = lambda values: torch.tensor(values, dtype=torch.bfloat16)
    given = PROMPTS["points and mask"]
    given = given | {"mask_input": np.asarray(tensor(given["mask_input"]).float())}
    expected = predictors[1].predict(**given | {"point_coords": [[100, 200], [30.5, 40]]})
    got = predictors[1].predict(**{name: tensor(values) for name, values in given.items()})
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    with pytest.raises(UserError, match=r"an image must be uint8 \[H, W, 3\], got float32"):
        ImagePredictor(predictors[1].model, predictors[1].params).set_image(torch.zeros(9, 9, 3, dtype=torch.bfloat16))


def test_an_image_that_is_refused_leaves_none(predictors):
    ours = ImagePredictor(predictors[1].model, predictors[1].params)
    ours.set_image(np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UserError):
        ours.set_image(np.zeros((20, 30), np.uint8))
    with pytest.raises(RuntimeError, match="call set_image before predict"):
        ours.predict(**POINT)


def test_the_device_of_sam2_is_refused_by_name():
    with pytest.raises(UserError, match="device: jax runs on its default device; set JAX_PLATFORMS"):
        ImagePredictor.from_pretrained("demo", device="cpu")


def test_predicting_without_an_image_is_an_error(predictors):
    with pytest.raises(RuntimeError, match="call set_image before predict"):
        ImagePredictor(predictors[1].model, predictors[1].params).predict(**POINT)


def test_a_session_of_mixed_prompts_compiles_a_handful_of_programs(predictors, monkeypatch):
    """1 to 8 points, 1 to 100 boxes, with and without logits, on images of eight sizes: what jax compiles by."""
    compiled = set()
    shapes = lambda *args: jax.tree.map(lambda x: (x.shape, x.dtype), args)

    def decode(model, params, features, points, masks, point_mask, *, multimask):
        compiled.add(str((shapes(points, masks, point_mask), multimask)))
        count, masks_each = len(masks if points is None else points[0]), 3 if multimask else 1
        return Decoded(np.zeros((count, masks_each, 64, 64)), np.zeros((count, masks_each)), None, None)

    def upscale(masks, canvas):
        compiled.add(str(shapes(masks, canvas.rows, canvas.columns)))
        return np.zeros((1, len(canvas.rows), canvas.columns.shape[1]))

    monkeypatch.setattr(image_module, "decode", decode)
    monkeypatch.setattr(image_module, "upscale", upscale)
    monkeypatch.setattr(image_module, "encode_images", lambda *args: None)
    ours, calls = ImagePredictor(predictors[1].model, predictors[1].params), 0
    for size in ((32, 24), (30, 25), (25, 10), (40, 20), (51, 1), (48, 24), (27, 9), (256, 22)):
        ours.set_image(np.zeros((*size, 3), np.uint8))
        for count in range(1, 9):
            ours.predict(np.ones((count, 2)), np.ones(count), multimask_output=False)
            ours.predict(np.ones((count, 2)), np.ones(count), mask_input=PROMPTS["mask"]["mask_input"])
            calls += 2
        for count in (5, 6, 8, 33, 64, 100):
            assert ours.predict(box=np.ones((count, 4)))[0].shape == (count, 3, *size)
            calls += 1
    assert calls == 176
    assert len(compiled) == 7  # 4 and 8 points, these with logits, 8 and 64 boxes, and one for all sizes


def test_ignored_points_change_nothing(predictors):
    """8 points of which 2 count, and those alone, without a mask."""
    _, ours = predictors
    coords, labels = np.array([[[30.0, 40.0], [90.0, 200.0]]], np.float32), np.array([[1, 0]])
    more = np.concatenate([coords, np.full((1, 6, 2), 7, np.float32)], 1), np.concatenate([labels, np.ones((1, 6))], 1)
    counted, features = np.arange(8)[None] < 2, ours._images[0].features
    decode = lambda *prompt: image_module.decode(ours.model, ours.params, features, *prompt, multimask=True).masks
    alone, ignored = decode((coords, labels.astype(int))), decode((more[0], more[1].astype(int)), None, counted)
    assert relative(ignored, alone) <= 1e-5
    assert relative(decode((more[0], more[1].astype(int)), None, counted | True), alone) > 0.01


def test_models_that_differ_in_their_encoder_share_the_program_of_the_decoder(predictors):
    _, ours = predictors
    points = np.array([[[30.0, 40.0]]], np.float32), np.array([[1]])
    run = lambda params: image_module.decode(ours.model, params, ours._images[0].features, points, multimask=True)
    run(ours.params)
    programs = image_module._decode._cache_size()
    run({name: part for name, part in ours.params.items() if name != "image_encoder.trunk"})
    assert image_module._decode._cache_size() == programs


def test_prompts_one_at_a_time_are_those_together(predictors, monkeypatch):
    """Large images are decoded so on a CPU. A prompt's features are those of the image, given once or for each."""
    _, ours = predictors
    coords, labels = np.arange(20, 60, 10, np.float32).reshape(2, 1, 2), np.ones((2, 1), int)
    logits = 4 * np.random.default_rng(1).standard_normal((2, 64, 64, 1)).astype(np.float32)

    def run(features):
        decode = partial(image_module._decode.__wrapped__, ours.model, multimask=True)
        return jax.jit(decode)(ours.params, features, (coords, labels), logits, None)

    features = ours._images[0].features
    together = run([np.repeat(level, 2, 0) for level in features])
    monkeypatch.setattr(chunking, "CPU_CHUNK_SIZE", 64 * 64 * 8)  # one prompt
    chex.assert_trees_all_close(run(features), together, rtol=1e-4, atol=1e-4)


def test_one_mask_for_all_prompts_and_no_prompt_are_decoded_as_together(predictors, monkeypatch):
    ours = ImagePredictor(predictors[1].model, predictors[1].params)
    ours._images = predictors[1]._images
    calls = PROMPTS["batch of points"] | PROMPTS["mask"], PROMPTS["nothing"]
    together = [ours.predict(**prompt, return_logits=True) for prompt in calls]
    monkeypatch.setattr(chunking, "CPU_CHUNK_SIZE", 64 * 64 * 8)  # one prompt
    monkeypatch.setattr(image_module, "_decode", jax.jit(image_module._decode.__wrapped__, static_argnums=0,
                                                         static_argnames="multimask"))  # fmt: skip
    for prompt, expected in zip(calls, together):
        chex.assert_trees_all_close(ours.predict(**prompt, return_logits=True), expected, rtol=1e-4, atol=1e-4)


def test_batches_equal_the_original_predictor(predictors):
    original, ours = predictors
    images = [draw_scene(1, 160).image[:120], draw_scene(2, 96).image]
    prompts = {
        "point_coords_batch": [np.array([[100.0, 60.0]]), np.arange(12.0).reshape(3, 2, 2) * 7],
        "point_labels_batch": [np.array([1]), np.ones((3, 2), int)],
        "box_batch": [np.array([20, 30, 100, 110]), np.arange(12.0).reshape(3, 4) * 5],
        "mask_input_batch": [PROMPTS["mask"]["mask_input"], None],
    }
    batches = [type(original)(original.model), ImagePredictor(ours.model, ours.params)]
    batches[0]._bb_feat_sizes = original._bb_feat_sizes
    results = []
    for predictor in batches:
        predictor.set_image_batch(images)
        results.append(predictor.predict_batch(**prompts, return_logits=True))
    for expected, got in zip(*results, strict=True):
        assert [x.shape for x in got] == [x.shape for x in expected]
        for x, y in zip(got, expected):
            np.testing.assert_allclose(x, y, atol=1e-4)
    embeddings = [predictor.get_image_embedding() for predictor in batches]
    assert relative(embeddings[1], nhwc(embeddings[0])) <= 1e-4


def test_batches_that_do_not_fit_are_an_error(predictors):
    ours = ImagePredictor(predictors[1].model, predictors[1].params)
    with pytest.raises(RuntimeError, match="call set_image_batch before predict_batch"):
        ours.predict_batch()
    for images in ([], np.zeros((2, 9, 9, 3), np.uint8)):
        with pytest.raises(UserError, match="image_list must be a list of one image at least"):
            ours.set_image_batch(images)
    ours.set_image_batch([np.zeros((20, 30, 3), np.uint8)] * 2)
    with pytest.raises(UserError, match="box_batch has 1 entries for 2 images: give one each"):
        ours.predict_batch(box_batch=[np.array([0, 0, 5, 5])])
    with pytest.raises(RuntimeError, match="a batch of images is set: call predict_batch, or call set_image"):
        ours.predict(**POINT)

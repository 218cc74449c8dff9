"""Every component of SAM 2 equals the `sam2` package's on the same weights."""

import jax
import numpy as np
import pytest
import torch

from tests.conftest import nchw, nhwc, relative, twin

# only memory differs between the versions; nano is compared in test_predict.py and test_video.py too
slow = lambda name, version: pytest.param(name, version, marks=pytest.mark.slow)
models = pytest.mark.parametrize(("name", "version"), [("tiny", "2.0"), slow("nano", "2.1")])
both_versions = pytest.mark.parametrize(
    ("name", "version"), [("tiny", "2.0"), ("nano", "2.1"), slow("nano", "2.0"), slow("tiny", "2.1")]
)
SIZE = 256


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def maps(pair, batch: int) -> list[np.ndarray]:
    """Random feature maps as `encode_image` gives them."""
    features = pair.model.variant.features
    shapes = ((4, features // 8), (8, features // 4), (16, features))
    return [normal(batch, SIZE // stride, SIZE // stride, c, seed=stride) for stride, c in shapes]


def clicks(prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Two points each: a foreground and a background click, two clicks, a box."""
    points = np.random.default_rng(1).uniform(0, SIZE, (prompts, 2, 2)).astype(np.float32)
    return points, np.array([[1, 0], [1, 1], [2, 3]], np.int32)[:prompts]


@pytest.mark.parametrize(
    ("name", "version", "size"),
    [("nano", "2.1", 256), pytest.param("tiny", "2.0", 480, marks=pytest.mark.end_to_end)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("nano", "2.0", 256),
            ("small", "2.1", 256),
            ("large", "2.1", 256),
            ("tiny", "2.1", 1024),
            ("base-plus", "2.1", 1024),
        )
    ],
)
@torch.no_grad()
def test_encoder_features_equal_torch(name, version, size):
    pair, image = twin(name, version, size), normal(1, size, size, 3)
    expected = pair.torch.forward_image(nchw(image))["backbone_fpn"]
    errors = [relative(x, nhwc(y)) for x, y in zip(pair.apply("encode_image", image), expected, strict=True)]
    assert max(errors) <= 1e-5


@models
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["points", "masks", pytest.param("points and masks", marks=pytest.mark.slow)])
@torch.no_grad()
def test_decoded_masks_and_scores_equal_torch(name, version, prompt, multimask):
    pair = twin(name, version, SIZE)
    features = maps(pair, 1)
    points = clicks(3) if "points" in prompt else None
    masks = 5 * normal(3, SIZE // 4, SIZE // 4, 1) if "masks" in prompt else None
    sparse, dense = pair.torch.sam_prompt_encoder(
        points=None if points is None else tuple(map(torch.from_numpy, points)),
        boxes=None,
        masks=None if masks is None else nchw(masks),
    )
    expected = pair.torch.sam_mask_decoder(
        image_embeddings=nchw(features[2]),
        image_pe=pair.torch.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=True,
        high_res_features=[nchw(x) for x in features[:2]],
    )
    got = pair.apply("decode_masks", features, points, masks, multimask=multimask)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), atol=1e-4)
    assert relative(got.masks, expected[0].numpy()) <= 1e-4


@models
@pytest.mark.parametrize("multimask", [True, False])
@torch.no_grad()
def test_object_mask_and_pointer_equal_torch(name, version, multimask):
    pair = twin(name, version, SIZE)
    features, (points, labels), mask = maps(pair, 2), clicks(2), 5 * normal(2, SIZE, SIZE, 1)
    inputs = {"point_coords": torch.from_numpy(points), "point_labels": torch.from_numpy(labels)}
    *_, low_res, _, pointer, score = pair.torch._forward_sam_heads(
        nchw(features[2]), inputs, nchw(mask), [nchw(x) for x in features[:2]], multimask
    )
    got = pair.apply("decode_object", features, (points, labels), mask, multimask=multimask)
    assert relative(got.mask, low_res[:, 0].numpy()) <= 1e-4
    assert relative(got.pointer, pointer.numpy()) <= 1e-4
    np.testing.assert_allclose(got.object_score, score.numpy(), rtol=1e-4)


@torch.no_grad()
def test_an_absent_object_has_torchs_mask_and_pointer():
    pair = twin("nano", "2.1", SIZE)
    params = jax.tree.map(lambda x: x, pair.params)  # fresh dicts
    last = params["sam_mask_decoder"]["pred_obj_score_head"]["layers.2"]
    last["bias"] = last["bias"] - 20
    pair.torch.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.sub_(20)
    features = maps(pair, 2)
    *_, low_res, _, pointer, _ = pair.torch._forward_sam_heads(
        nchw(features[2]), None, None, [nchw(x) for x in features[:2]], False
    )
    pair.torch.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.add_(20)
    got = pair._replace(params=params).apply("decode_object", features, None, multimask=False)
    assert (np.asarray(got.mask) == -1024).all()
    np.testing.assert_array_equal(got.mask, low_res[:, 0].numpy())
    assert relative(got.pointer, pointer.numpy()) <= 1e-6


@models
@torch.no_grad()
def test_a_given_mask_as_output_equals_torch(name, version):
    pair = twin(name, version, SIZE)
    features = maps(pair, 2)
    mask = (normal(2, SIZE, SIZE, 1) > 0).astype(np.float32) * np.array([1, 0], np.float32).reshape(2, 1, 1, 1)
    *_, low_res, _, pointer, score = pair.torch._use_mask_as_output(
        nchw(features[2]), [nchw(x) for x in features[:2]], nchw(mask)
    )
    got = pair.apply("object_from_mask", features, mask)
    assert relative(got.mask, low_res[:, 0].numpy()) <= 1e-4
    assert relative(got.pointer, pointer.numpy()) <= 1e-4
    np.testing.assert_array_equal(got.object_score, score.numpy())


@both_versions
@pytest.mark.parametrize("binarize", [True, False])
@torch.no_grad()
def test_encoded_memory_equals_torch(name, version, binarize):
    pair = twin(name, version, SIZE)
    coarse, mask = maps(pair, 2)[2], 5 * normal(2, SIZE, SIZE, 1)
    score = np.array([[3.0], [-2.0]], np.float32)  # one object there, one not
    pair.torch.binarize_mask_from_pts_for_mem_enc = binarize
    expected, _ = pair.torch._encode_new_memory(
        [nchw(coarse).flatten(2).permute(2, 0, 1)], [coarse.shape[1:3]], nchw(mask), torch.from_numpy(score), True
    )
    assert relative(pair.apply("encode_memory", coarse, mask, score, binarize=binarize), nhwc(expected)) <= 1e-4


@both_versions
@torch.no_grad()
def test_attended_memory_of_several_frames_equals_torch(name, version):
    """Frame 10 looks at the prompted frame 0 and at frames 7, 8, 9."""
    pair, frames = twin(name, version, SIZE), [0, 7, 8, 9]
    coarse = maps(pair, 2)[2]
    memories = normal(2, len(frames), *coarse.shape[1:3], pair.model.variant.memory_features, seed=2)
    pointers = normal(2, len(frames), coarse.shape[-1], seed=3)
    position = lambda x: pair.torch.memory_encoder.position_encoding(x)
    outputs = {
        frame: {
            "maskmem_features": nchw(memories[:, i]),
            "maskmem_pos_enc": [position(nchw(memories[:, i]))],
            "obj_ptr": torch.from_numpy(pointers[:, i]),
        }
        for i, frame in enumerate(frames)
    }
    flat = lambda x: x.flatten(2).permute(2, 0, 1)
    expected = pair.torch._prepare_memory_conditioned_features(
        10,
        False,
        [flat(nchw(coarse))],
        [flat(pair.torch.image_encoder.neck.position_encoding(nchw(coarse)))],
        [coarse.shape[1:3]],
        {"cond_frame_outputs": {0: outputs[0]}, "non_cond_frame_outputs": {f: outputs[f] for f in frames[1:]}},
        num_frames=20,
    )
    # torch adds the pointers of recent frames from the newest to the oldest; attention does not see the order
    times, ages = np.array([0, 4, 5, 6]), np.array([10, 3, 2, 1], np.float32) / 15
    got = pair.apply("attend_memory", coarse, memories, times, pointers, ages[None])
    assert relative(got, nhwc(expected)) <= 1e-4
    assert relative(got, coarse) > 0.1  # the memory changes the features

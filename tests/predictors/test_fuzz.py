"""Random calls of both predictors give what the original predictors give. Slow; every seed is a test of its own."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from converters.exports.vanilla import build_original, define_torchvision_operators
from sam2jq import ImagePredictor, VideoPredictor
from sam2jq.data import draw_scene
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.errors import UserError
from tests.conftest import relative, twin

pytestmark = pytest.mark.slow
FRAMES, HEIGHT, WIDTH = 6, 256, 200
LIMIT = 1e-3  # of logits, as in test_video.py
Call = tuple[str, dict]  # a method and its arguments


def random_clicks(rng, size: tuple[int, int], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Points [*shape, 2], some of them outside of the image, and labels [*shape] of 0 and 1."""
    points = rng.uniform(-0.1, 1.1, (*shape, 2)) * size[::-1]
    return points.astype(np.float32), rng.integers(0, 2, shape)


def random_box(rng, size: tuple[int, int], count: int | None = None) -> np.ndarray:
    """A box [4] in an image of `size`, or `count` boxes [count, 4]."""
    corners = np.sort(rng.uniform(0, 1, (count or 1, 2, 2)), axis=1) * size[::-1]
    boxes = corners.reshape(-1, 4).astype(np.float32)
    return boxes[0] if count is None else boxes


@pytest.fixture(scope="module")
def image_predictors():
    define_torchvision_operators()
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    pair = twin("nano", "2.1", 256)
    original = SAM2ImagePredictor(pair.torch)
    original._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # it takes those of 1024 pixels for granted
    return original, ImagePredictor(pair.model, pair.params)


def random_prompt(rng, size: tuple[int, int]) -> dict:
    """Arguments of `predict`: points, boxes and logits for one object or three, in pixels or in 0..1."""
    count = rng.choice([None, 3], p=[0.7, 0.3])
    batch = () if count is None else (count,)
    normalized = bool(rng.random() < 0.8)
    size = size if normalized else (1, 1)
    kinds = rng.random(3) < (0.7, 0.4, 0.3)
    prompt = {"multimask_output": bool(rng.random() < 0.5), "normalize_coords": normalized}
    if kinds[0] or not kinds.any():
        number = int(rng.choice([1, 2, 4] if count else [0, 1, 2, 4]))
        points, labels = random_clicks(rng, size, (*batch, number))
        if number == 2 and not kinds[1] and rng.random() < 0.3:  # a box as points
            points, labels = random_box(rng, size, count).reshape(points.shape), np.broadcast_to([2, 3], labels.shape)
        prompt |= {"point_coords": points, "point_labels": labels}
    if kinds[1]:
        prompt["box"] = random_box(rng, size, count)
    if kinds[2] and len(prompt) > 2:
        prompt["mask_input"] = 4 * rng.standard_normal((*batch, 1, 64, 64)).astype(np.float32)
    return prompt


@pytest.mark.parametrize("seed", range(4))
def test_50_random_calls_of_the_image_predictor(image_predictors, seed):
    rng = np.random.default_rng(seed)
    size = (320, 240) if seed % 2 else (150, 260)
    for predictor in image_predictors:
        predictor.set_image(draw_scene(seed, 320).image[: size[0], : size[1]])
    for _ in range(50):
        prompt = random_prompt(rng, size)
        expected, got = (p.predict(**prompt, return_logits=True) for p in image_predictors)
        for x, y in zip(got, expected, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), prompt
            np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)
        assert relative(got[0], expected[0]) <= 1e-4


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """[(predictor, state)] of the original and ours on one clip, whose frames the original has encoded."""
    folder = tmp_path_factory.mktemp("clip")
    for i, frame in enumerate(draw_clip(5, FRAMES).frames):
        Image.fromarray(frame[:HEIGHT, :WIDTH]).save(folder / f"{i:05d}.jpg", quality=95)
    weights = twin("nano")
    original = build_original("nano", "2.1", video=True)
    original.load_state_dict(weights.torch.state_dict())
    # Frames without any pointer stop the original on a CPU: only its bfloat16 memories are left, in a float32 layer.
    original.memory_attention.register_forward_pre_hook(in_float32, with_kwargs=True)
    ours = VideoPredictor(weights.model, weights.params)
    states = [predictor.init_state(str(folder)) for predictor in (original, ours)]
    encoded = {}
    with torch.inference_mode():
        for frame in range(FRAMES):
            original._get_image_feature(states[0], frame, 1)
            encoded |= states[0]["cached_features"]
    states[0]["cached_features"] = encoded
    return list(zip((original, ours), states))


def in_float32(module, args, kwargs):
    return args, kwargs | {"memory": kwargs["memory"].float()}


def random_session(rng) -> Iterator[Call]:
    """Calls of the video predictor's methods: a prompt, then prompts, corrections, removals and tracking."""
    objects = []
    for step in range(int(rng.integers(5, 10))):
        kind = rng.choice(["prompt", "track", "clear", "remove"], p=[0.5, 0.35, 0.1, 0.05]) if step else "prompt"
        if kind == "prompt" or not objects:
            obj_id = int(rng.integers(1, 4))
            objects = [*objects, obj_id] if obj_id not in objects else objects
            method, prompt = random_video_prompt(rng)
            yield method, {"frame_idx": int(rng.integers(FRAMES)), "obj_id": obj_id} | prompt
        elif kind == "clear":
            yield "clear_all_prompts_in_frame", {"frame_idx": int(rng.integers(FRAMES)), "obj_id": rng.choice(objects)}
        elif kind == "remove":
            obj_id = int(rng.choice([*objects, 99]))
            objects = [other for other in objects if other != obj_id]
            yield "remove_object", {"obj_id": obj_id}
        else:
            start = None if rng.random() < 0.5 else int(rng.integers(FRAMES))
            count = None if rng.random() < 0.6 else int(rng.integers(1, 4))
            where = {"start_frame_idx": start, "max_frame_num_to_track": count, "reverse": bool(rng.random() < 0.3)}
            yield "propagate_in_video", where
    yield "propagate_in_video", {}


def random_video_prompt(rng) -> Call:
    """The method and the arguments of a prompt on one object: a mask, clicks, a box, or both."""
    size, kind = (HEIGHT, WIDTH), rng.choice(["mask", "clicks", "more clicks", "box", "box and clicks", "corners"])
    if kind == "mask":
        center, radius = rng.uniform(0, 1, 2) * size, rng.uniform(5, 80)
        disc = np.hypot(*(np.mgrid[:HEIGHT, :WIDTH] - center[:, None, None])) < radius
        return "add_new_mask", {"mask": disc * rng.choice([1, 7, 255])}
    points, labels = random_clicks(rng, size, (int(rng.choice([1, 1, 2, 3])),))
    if kind == "corners":
        points, labels = random_box(rng, size).reshape(2, 2), np.array([2, 3])
    prompt = {} if kind == "box" else {"points": points, "labels": labels}
    prompt |= {"box": random_box(rng, size)} if kind.startswith("box") else {}
    return "add_new_points_or_box", prompt | ({"clear_old_points": False} if kind == "more clicks" else {})


def outcome(predictor, state, method: str, arguments: dict) -> list | str:
    """[(frame, object ids, masks)] that a call returns or yields, or "refused"."""
    try:
        result = getattr(predictor, method)(state, **arguments)
        if method == "remove_object":
            ids, updated = result
            result = [(frame, ids, masks) for frame, masks in updated]
        rows = [result] if isinstance(result, tuple) else result
        return [(frame, list(ids), np.asarray(masks)) for frame, ids, masks in rows]
    except (RuntimeError, UserError) as error:
        if "no prompt on" in str(error) or "No input points or masks" in str(error):
            return "refused"
        raise


@pytest.mark.parametrize("seed", range(32))
def test_a_random_session_of_the_video_predictor(sessions, seed):
    for predictor, state in sessions:
        predictor.reset_state(state)
    for call in random_session(np.random.default_rng(seed)):
        expected, got = (outcome(predictor, state, *call) for predictor, state in sessions)
        assert (expected == "refused") == (got == "refused"), call
        if got == "refused":
            continue
        assert [row[:2] for row in got] == [row[:2] for row in expected], call
        for (frame, _, theirs), (_, _, ours) in zip(expected, got):
            assert ours.shape == theirs.shape, call
            assert np.abs(ours - theirs).max() <= LIMIT, (call, frame)

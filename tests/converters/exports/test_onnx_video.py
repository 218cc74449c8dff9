"""Clips tracked by ONNX files, against the original SAM 2, which needs no program of ours to be compiled."""

import numpy as np
import pytest
from PIL import Image

import sam2jq
from converters.exports.vanilla import build_original
from sam2jq.cli.main import main
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.deploy import OnnxVideoPredictor
from sam2jq.deploy.engines import ENGINES
from sam2jq.deploy.video import round_to_bfloat16
from sam2jq.errors import UserError
from sam2jq.models.sam2 import image_params
from sam2jq.tree import flatten, unflatten
from tests.conftest import twin

pytest.importorskip("onnx")
SIZE = 64
MASK = np.zeros((256, 200), np.float32)
MASK[20:80, 50:120] = 1


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of jpg files, since the original reads nothing else."""
    folder = tmp_path_factory.mktemp("clip")
    for i, frame in enumerate(draw_clip(3, 5).frames):
        Image.fromarray(frame[:, :200]).save(folder / f"{i:05d}.jpg", quality=95)
    return str(folder)


def export(model, params, path):
    sam2jq.save(path / "p.safetensors", model, params)
    assert main(["export", "--package", str(path / "p.safetensors"), "--to", "onnx", "--out", str(path / "out")]) == 0
    return path / "out"


@pytest.fixture(scope="module", params=["2.1", pytest.param("2.0", marks=pytest.mark.slow)])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, version):
    weights = twin("nano", version, SIZE)
    return export(weights.model, weights.params, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def expected(clip, version):
    original = build_original("nano", version, SIZE, video=True)
    original.load_state_dict(twin("nano", version, SIZE).torch.state_dict())
    return track(original, clip)


def track(predictor, clip, *, reverse=False) -> list[tuple[int, list, np.ndarray]]:
    """Two objects through a clip: a click, a mask, a correction of a tracked frame, and an empty mask."""
    state = predictor.init_state(clip)
    rows = [predictor.add_new_points_or_box(state, 0, 1, points=[[75, 60]], labels=[1])]
    rows.append(predictor.add_new_mask(state, 0, 2, MASK))
    rows += list(predictor.propagate_in_video(state))
    rows.append(predictor.add_new_points_or_box(state, 3, 1, points=[[75, 60], [30, 30]], labels=[1, 0]))
    rows.append(predictor.add_new_mask(state, 4, 2, 0 * MASK))
    start = {"start_frame_idx": 4, "reverse": True} if reverse else {}
    rows += list(predictor.propagate_in_video(state, **start))
    return [(frame, list(ids), np.asarray(masks)) for frame, ids, masks in rows]


def test_a_clip_is_tracked_as_by_the_original(folder, clip, expected, engine):
    compare(track(OnnxVideoPredictor(folder, engine, dtype="float32"), clip), expected)


@pytest.mark.slow  # a program of ours for each step; the original fails on a CPU where a frame has no pointer
def test_a_clip_is_tracked_in_reverse_as_by_our_predictor(folder, clip, version, engine):
    weights = twin("nano", version, SIZE)
    expected = track(sam2jq.VideoPredictor(weights.model, weights.params), clip, reverse=True)
    compare(track(OnnxVideoPredictor(folder, engine, dtype="float32"), clip, reverse=True), expected)


def compare(got, expected):
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    for (frame, _, ours), (_, _, theirs) in zip(got, expected):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1e-3, frame  # as for VideoPredictor
        assert ours.std() > 1e-2


def test_track_draws_the_masks_of_onnx_files(folder, clip, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "tracked.gif"
    model = ["--model.checkpoint", str(folder), "--engine", "onnxruntime"]
    assert main(["track", clip, *model, "--points", "75,60", "--out", str(out)]) == 0
    assert Image.open(out).n_frames == 5


def test_an_image_only_model_cannot_track(tmp_path):
    pytest.importorskip("onnxruntime")
    model, params = sam2jq.load("demo", image_size=SIZE)
    kept = flatten(image_params(model))
    params = unflatten({path: leaf for path, leaf in flatten(params).items() if path in kept})
    with pytest.raises(UserError, match=r"has no memory_attention.onnx, as exports of an image-only model: it cannot"):
        OnnxVideoPredictor(export(model, params, tmp_path))


def test_memories_are_rounded_to_bfloat16():
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    np.testing.assert_array_equal(round_to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))

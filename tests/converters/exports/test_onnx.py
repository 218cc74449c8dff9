"""The ONNX files of a whole model, and the predictors that run them: masks as of the original SAM 2, in each engine.

The original needs no program to be compiled, and other tests compare our predictors with it.
"""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import sam2jq
from converters.exports.vanilla import build_original
from converters.names import to_torch
from sam2jq.cli.main import main
from sam2jq.data import draw_clip, draw_scene
from sam2jq.deploy import OnnxImagePredictor, OnnxVideoPredictor
from sam2jq.deploy.engines import ENGINES, choose_engine
from sam2jq.deploy.video import round_to_bfloat16
from sam2jq.errors import UserError
from sam2jq.models.sam2 import image_params
from sam2jq.quant.algorithms.activations import quantize_activations
from sam2jq.quant.leaves import materialize_params
from sam2jq.tree import flatten, unflatten
from tests.conftest import relative, twin

pytest.importorskip("onnx")
SIZE, LIMIT = 64, 1e-3  # pixels; of the logits, as for our predictors
W4 = sam2jq.QuantSpec(4, group_size=32)
SCENE = draw_scene(0, 90)
MASK = np.zeros((256, 200), np.float32)
MASK[20:80, 50:120] = 1
LOGITS = np.random.default_rng(0).normal(0, 9, (2, 1, 16, 16)).astype(np.float32)
POINT = {"point_coords": np.array([[40, 40]]), "point_labels": np.array([1])}
PROMPTS = {
    "a click": POINT,
    "two clicks": {"point_coords": np.array([[40, 40], [5, 9]]), "point_labels": np.array([1, 0])},
    "boxes": {"box": np.array([[10, 10, 60, 60], [0, 5, 30, 20]])},
    "a click and a mask": POINT | {"mask_input": LOGITS[0]},
    "a mask alone": {"mask_input": LOGITS[0]},
    "nothing": {},
}


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module", params=["2.1", pytest.param("2.0", marks=pytest.mark.slow)])
def small(request):
    """The model and its params at SIZE, some linear layers in 4 bits."""
    weights = twin("nano", request.param, SIZE)
    chosen = [k for k in sam2jq.layers(weights.params) if "blocks.0" in k or "layers.1.mlp" in k or "cross_attn" in k]
    return weights.model, sam2jq.round_weights(weights.params, dict.fromkeys(chosen, W4))


@pytest.fixture(scope="module")
def original(small):
    model, params = small
    made = build_original("nano", model.version, SIZE, video=True)
    made.load_state_dict(to_torch(materialize_params(params)))
    return made


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    return export(*small, tmp_path_factory.mktemp("onnx"))


def export(model, params, path):
    sam2jq.save(path / "p.safetensors", model, params)
    assert main(["export", "--package", str(path / "p.safetensors"), "--to", "onnx", "--out", str(path / "out")]) == 0
    return path / "out"


@pytest.fixture(scope="module")
def original_image_predictor(original):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(original)
    predictor._bb_feat_sizes = [(SIZE // stride,) * 2 for stride in (4, 8, 16)]
    predictor.set_image(SCENE.image)
    return predictor


def test_each_prompt_gets_the_masks_of_the_original(folder, original_image_predictor, engine):
    predictor = OnnxImagePredictor(folder, engine, dtype="float32")
    predictor.set_image(SCENE.image)
    for name, prompt in PROMPTS.items():
        for multimask in (False, True):
            settings = {"multimask_output": multimask, "return_logits": True}
            results = (each.predict(**prompt, **settings) for each in (predictor, original_image_predictor))
            for got, expected in zip(*results):
                assert got.shape == expected.shape, name
                assert np.abs(got - expected).max() <= LIMIT, name
    assert predictor.predict(box=np.zeros((0, 4)))[0].shape == (0, 3, 90, 90)


def test_many_prompts_are_decoded_in_parts(folder, engine, monkeypatch):
    predictor = OnnxImagePredictor(folder, engine, dtype="float32")
    predictor.set_image(SCENE.image)
    boxes = {"box": np.random.default_rng(0).uniform(0, 80, (5, 4)), "mask_input": LOGITS[0]}
    whole = predictor.predict(**boxes, return_logits=True)
    monkeypatch.setattr("sam2jq.deploy.image.MOST_PROMPTS", 2)
    for got, expected in zip(predictor.predict(**boxes, return_logits=True), whole):
        np.testing.assert_allclose(got, expected, atol=LIMIT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of jpg files, since the original reads nothing else."""
    folder = tmp_path_factory.mktemp("clip")
    for i, frame in enumerate(draw_clip(3, 4).frames):
        Image.fromarray(frame[:, :200]).save(folder / f"{i:05d}.jpg", quality=95)
    return str(folder)


def track(predictor, clip, *, reverse=False) -> list[tuple[int, list, np.ndarray]]:
    """Two objects through a clip: a click, a mask, a correction of a tracked frame, and an empty mask."""
    state = predictor.init_state(clip)
    rows = [predictor.add_new_points_or_box(state, 0, 1, points=[[75, 60]], labels=[1])]
    rows.append(predictor.add_new_mask(state, 0, 2, MASK))
    rows += list(predictor.propagate_in_video(state))
    rows.append(predictor.add_new_points_or_box(state, 2, 1, points=[[75, 60], [30, 30]], labels=[1, 0]))
    rows.append(predictor.add_new_mask(state, 3, 2, 0 * MASK))
    start = {"start_frame_idx": 3, "reverse": True} if reverse else {}
    rows += list(predictor.propagate_in_video(state, **start))
    return [(frame, list(ids), np.asarray(masks)) for frame, ids, masks in rows]


@pytest.fixture(scope="module")
def expected(original, clip):
    return track(original, clip)


@pytest.mark.end_to_end
def test_a_clip_is_tracked_as_by_the_original(folder, clip, expected, engine):
    compare(track(OnnxVideoPredictor(folder, engine, dtype="float32"), clip), expected)


@pytest.mark.slow  # a program of ours for each step; the original fails on a CPU where a frame has no pointer
@pytest.mark.end_to_end
def test_a_clip_is_tracked_in_reverse_as_by_our_predictor(small, folder, clip, engine):
    expected = track(sam2jq.VideoPredictor(*small), clip, reverse=True)
    compare(track(OnnxVideoPredictor(folder, engine, dtype="float32"), clip, reverse=True), expected)


def compare(got, expected):
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    for (frame, _, ours), (_, _, theirs) in zip(got, expected):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= LIMIT, frame
        assert ours.std() > 1e-2


def test_track_draws_the_masks_of_onnx_files(folder, clip, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "tracked.gif"
    model = ["--model.checkpoint", str(folder), "--engine", "onnxruntime"]
    assert main(["track", clip, *model, "--points", "75,60", "--out", str(out)]) == 0
    assert Image.open(out).n_frames == 4


def test_memories_are_rounded_to_bfloat16():
    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    np.testing.assert_array_equal(round_to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_description_names_the_model_the_files_and_what_was_quantized(folder):
    about = json.loads((folder / "model.json").read_text())
    assert about["model"] == {"name": "nano", "version": "2.1", "image_size": 64}
    assert {f"{name}.onnx" for name in ("image_encoder", "prompt_mask_decoder")} <= about["files"].keys()
    assert about["files"]["prompt_mask_decoder.onnx"]["inputs"]["point_coords"] == ["prompts", "points", 2]
    layer = about["layers"]["image_encoder.trunk.blocks.0.attn.qkv"]
    assert layer == {"dtype": "sint4", "group": "32", "inputs": None, "around": [], "rank": 0}
    assert about["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_an_image_only_model_is_exported_for_images(small, tmp_path):
    pytest.importorskip("onnxruntime")
    model, params = small
    kept = flatten(image_params(model))
    params = unflatten({path: leaf for path, leaf in flatten(params).items() if path in kept})
    out = export(model, params, tmp_path)
    assert {path.name for path in out.iterdir()} == {"image_encoder.onnx", "prompt_mask_decoder.onnx", "model.json"}
    with pytest.raises(UserError, match=r"has no memory_attention.onnx, as exports of an image-only model: it cannot"):
        OnnxVideoPredictor(out)


def test_dynamic_activations_are_refused_and_nothing_is_left(small, tmp_path, capsys):
    model, params = small
    layers = ["image_encoder.trunk.blocks.0.attn.qkv"]
    rounded = quantize_activations(dict.fromkeys(layers, sam2jq.QuantSpec(8))).apply(params, {})
    sam2jq.save(tmp_path / "p.safetensors", model, rounded)
    out = tmp_path / "out"
    assert main(["export", "--package", str(tmp_path / "p.safetensors"), "--to", "onnx", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "blocks.0.attn.qkv: activations are rounded on a grid of each call's own" in error
    assert "quant.ipts.static true" in error
    assert not out.exists()


@pytest.fixture
def copied(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_damaged_folder_is_refused_by_name(copied):
    pytest.importorskip("onnxruntime")
    encoder, about = copied / "image_encoder.onnx", copied / "model.json"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="image_encoder.onnx is not the file that model.json describes"):
        OnnxImagePredictor(copied)
    encoder.unlink()
    with pytest.raises(UserError, match="image_encoder.onnx is missing: write the folder again"):
        OnnxImagePredictor(copied)
    about.write_text(about.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="has format sam2jq-onnx 9, this sam2jq reads sam2jq-onnx 1"):
        OnnxImagePredictor(copied)
    about.write_text('{"model_type": "sam2"}')
    with pytest.raises(UserError, match="model.json does not describe ONNX files of sam2jq"):
        OnnxImagePredictor(copied)
    about.unlink()
    with pytest.raises(UserError, match="has no model.json: give the folder that sam2jq export --to onnx wrote"):
        OnnxImagePredictor(copied)


def test_an_engine_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("sam2jq.deploy.engines.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need openvino, which is missing: pip install 'sam2jq\[openvino\]'"):
        choose_engine("openvino")
    with pytest.raises(UserError, match=r"an engine, which is missing: .*openvino.* or .*sam2jq\[onnxruntime\]"):
        choose_engine("auto")
    with pytest.raises(UserError, match="engine 'tensorrt': allowed are auto, openvino, onnxruntime"):
        choose_engine("tensorrt")


def test_bfloat16_is_refused_where_the_engine_has_none(folder):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="bfloat16: onnxruntime computes in float32"):
        OnnxImagePredictor(folder, "onnxruntime", dtype="bfloat16")
    with pytest.raises(UserError, match="dtype 'float16': allowed are auto, float32, bfloat16"):
        OnnxImagePredictor(folder, dtype="float16")


def test_the_predictor_imports_neither_jax_nor_torch_nor_scipy(folder, engine):
    program = """
import sys
for name in ("jax", "flax", "torch", "scipy", "matplotlib"):
    sys.modules[name] = None
import numpy as np
from sam2jq.deploy import OnnxImagePredictor
predictor = OnnxImagePredictor(sys.argv[1], sys.argv[2])
predictor.set_image(np.zeros((50, 40, 3), np.uint8))
assert predictor.predict(point_coords=[[20, 20]], point_labels=[1])[0].shape == (3, 50, 40)
"""
    command = [sys.executable, "-c", program, str(folder), engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "base-plus"])
def test_a_released_size_is_encoded_as_by_ours(name, tmp_path, engine):
    weights = twin(name)
    rounded = sam2jq.round_weights(weights.params, dict.fromkeys(sam2jq.layers(weights.params), W4))
    predictor = OnnxImagePredictor(export(weights.model, rounded, tmp_path), engine, dtype="float32")
    image = draw_scene(0, 300).image
    ours = sam2jq.ImagePredictor(weights.model, materialize_params(rounded))
    for each in (predictor, ours):
        each.set_image(image)
    assert relative(predictor.get_image_embedding(), ours.get_image_embedding()) < 1e-5
    for got, expected in zip(*(each.predict(**POINT, return_logits=True) for each in (predictor, ours))):
        assert relative(got, expected) < 1e-4

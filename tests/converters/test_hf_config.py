"""Folders of Hugging Face: written for transformers, and read with what their configuration says."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch

import sam2jq
from converters.exports import EXPORTS
from converters.exports.vanilla import define_torchvision_operators
from sam2jq import UserError
from sam2jq.data import draw_scene
from tests.converters.test_hf import build_hf

CLICK = {"point_coords": [[75, 60]], "point_labels": [1], "return_logits": True}


@pytest.fixture(scope="module")
def transformers():
    define_torchvision_operators()
    return pytest.importorskip("transformers", minversion="5.0")


def export(out, model, params):
    out.mkdir()
    about = {"model": sam2jq.api.describe_model(model), "random_weights": False}
    EXPORTS["safetensors"].write(out, model, params, about)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model, as `export --to safetensors` writes it."""
    return export(tmp_path_factory.mktemp("hf") / "demo", *sam2jq.load("demo"))


@pytest.fixture(scope="module")
def image_only(folder, transformers, tmp_path_factory):
    """(Hugging Face's `Sam2Model` of the export, the folder into which it saved itself)."""
    theirs = transformers.Sam2Model.from_pretrained(folder).eval()
    saved = tmp_path_factory.mktemp("image") / "only"
    theirs.save_pretrained(saved)
    return theirs, saved


def test_transformers_computes_the_same_masks_from_an_export(folder, image_only, transformers):
    """The operations are the same in another order: measured 5e-5 in logits of up to 30."""
    image = draw_scene(3).image
    predictor = sam2jq.ImagePredictor.from_pretrained("demo")
    predictor.set_image(image)
    _, scores, logits = predictor.predict(**CLICK)
    processor = transformers.Sam2Processor.from_pretrained(folder)
    inputs = processor(images=image, input_points=[[[[75, 60]]]], input_labels=[[[1]]], return_tensors="pt")
    with torch.no_grad():
        out = image_only[0](**inputs)
    np.testing.assert_allclose(out.iou_scores[0, 0], scores, atol=1e-3)
    np.testing.assert_allclose(out.pred_masks[0, 0].clip(-32, 32), logits, atol=2e-3)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", [256, 1024])
def test_the_configuration_is_that_of_the_model(tmp_path, transformers, version, size):
    from converters.hf_config import write_config

    write_config(tmp_path, sam2jq.build("large", version, size))
    made = transformers.Sam2VideoConfig.from_pretrained(tmp_path).to_dict()
    with torch.device("meta"):
        expected = build_hf("large", version, size).config.to_dict()
    unset = ("architectures", "dtype", "transformers_version", "_name_or_path")
    assert {k: v for k, v in made.items() if k not in unset} == {k: v for k, v in expected.items() if k not in unset}
    processor = transformers.Sam2VideoProcessor.from_pretrained(tmp_path)
    assert processor.target_size == size
    assert dict(processor.video_processor.size) == dict(transformers.Sam2VideoVideoProcessor(size=size).size)


@pytest.mark.slow
def test_the_video_model_of_transformers_loads_every_tensor(tmp_path, transformers):
    model = sam2jq.build("tiny", "2.1", 256)
    out = export(tmp_path / "tiny", model, sam2jq.init_params(model, 0))
    theirs, info = transformers.Sam2VideoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.image_size == 256
    assert sam2jq.load(out)[0] == model


def test_an_image_only_model_segments_images_and_says_why_it_tracks_nothing(image_only, tmp_path):
    model, params = sam2jq.load(image_only[1])
    assert model == sam2jq.build("nano")
    image = draw_scene(3).image
    predictors = [sam2jq.ImagePredictor(model, params), sam2jq.ImagePredictor.from_pretrained("demo")]
    for predictor in predictors:
        predictor.set_image(image)
    for got, expected in zip(*(predictor.predict(**CLICK) for predictor in predictors)):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(UserError, match="an image-only model, without the weights of the memory, which tracking needs"):
        sam2jq.VideoPredictor(model, params)
    with pytest.raises(UserError, match="without the weights of the memory"):
        sam2jq.quantize(model, params, sam2jq.gptq(sam2jq.QuantSpec(4)), [image])
    specs = dict.fromkeys(sam2jq.layers(params), sam2jq.QuantSpec(8))
    sam2jq.save(tmp_path / "p.safetensors", model, sam2jq.round_weights(params, specs))
    assert sam2jq.load(tmp_path / "p.safetensors")[1].keys() == params.keys()
    with pytest.raises(UserError, match="build_sam2 loads no model without the weights of the memory"):
        EXPORTS["vanilla"].write(tmp_path, model, params, {"random_weights": False, "model": {}})


def test_a_part_of_the_memory_is_not_enough(tmp_path):
    from converters.checkpoint import save_checkpoint

    _, params = sam2jq.load("demo")
    save_checkpoint(tmp_path / "c.pt", {key: part for key, part in params.items() if key != "memory_encoder"})
    with pytest.raises(UserError, match=r"nano 2.1 is closest: .*missing memory_encoder\..* more$"):
        sam2jq.load(tmp_path / "c.pt")


def test_several_files_with_an_index_are_one_model(image_only, tmp_path):
    theirs, saved = image_only
    theirs.save_pretrained(tmp_path, max_shard_size="2MB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    _, expected = sam2jq.load(saved)
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        _, params = sam2jq.load(source)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(UserError, match="do not fit|is not of SAM 2|is only a part of SAM 2"):
        sam2jq.load(shards[0])
    shards[1].unlink()
    with pytest.raises(UserError, match=f"names {shards[1].name}, which is not beside it"):
        sam2jq.load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../b.safetensors"}}, "lies outside of its folder"),
        ({"weight_map": {"a": 3}}, "is no index"),
        ({}, "is no index"),
        ([], "must hold an object"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"model.safetensors.index.json.*{message}"):
        sam2jq.load(tmp_path)


def change(folder, tmp_path, name, edit):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    content = json.loads((copied / name).read_text())
    edit(content)
    (copied / name).write_text(json.dumps(content))
    return copied


def test_a_folder_knows_its_image_size(tmp_path):
    from converters.checkpoint import save_checkpoint
    from converters.hf_config import write_config

    model = sam2jq.build("nano", image_size=128)
    save_checkpoint(tmp_path / "model.safetensors", sam2jq.load("demo")[1])
    write_config(tmp_path, model)
    assert sam2jq.load(tmp_path)[0] == model
    with pytest.raises(UserError, match="holds a model of image_size 128, not 256"):
        sam2jq.load(tmp_path, image_size=256)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_another_mean_or_deviation_is_an_error(folder, tmp_path, key):
    copied = change(folder, tmp_path, "processor_config.json", lambda c: c["image_processor"].update({key: [0.5] * 3}))
    with pytest.raises(UserError, match=rf"processor_config.json: {key} is \[0.5, 0.5, 0.5\]"):
        sam2jq.load(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
        ("do_resize", False),
        ("resample", 3),
        ("size", 1024),
        ("size", {"longest_edge": 256}),
        ("do_pad", True),
    ],
)
def test_another_preparation_of_images_is_an_error(folder, tmp_path, key, value):
    copied = change(folder, tmp_path, "processor_config.json", lambda c: c["image_processor"].update({key: value}))
    with pytest.raises(
        UserError, match=rf"processor_config.json: {key} is {re.escape(str(value))}, but images are always prepared"
    ):
        sam2jq.load(copied)


@pytest.mark.slow
def test_the_video_model_of_transformers_tracks_the_same_masks(tmp_path, transformers):
    """Three frames of a drawn clip, from a click. The operations are the same in another order: measured 1e-6."""
    from sam2jq.data.sources import scene_video
    from tests.conftest import twin

    pair = twin("tiny", "2.1", 256)
    out = export(tmp_path / "tiny", pair.model, pair.params)
    video = [scene_video("scenes:3/0000")[i] for i in range(3)]
    predictor = sam2jq.VideoPredictor.from_pretrained(str(out))
    state = predictor.init_state(np.stack(video))
    predictor.add_new_points_or_box(state, 0, 1, points=[[75, 60]], labels=[1])
    expected = [masks for _, _, masks in predictor.propagate_in_video(state)]

    theirs = transformers.Sam2VideoModel.from_pretrained(out).eval()
    processor = transformers.Sam2VideoProcessor.from_pretrained(out)
    session = processor.init_video_session(video=np.stack(video))
    processor.add_inputs_to_inference_session(
        session, frame_idx=0, obj_ids=1, input_points=[[[[75, 60]]]], input_labels=[[[1]]]
    )
    with torch.no_grad():
        theirs(inference_session=session, frame_idx=0)
        outs = [out.pred_masks for out in theirs.propagate_in_video_iterator(session)]
    size = (session.video_height, session.video_width)
    got = [processor.post_process_masks([masks], original_sizes=[size], binarize=False)[0] for masks in outs]
    for x, y in zip(got, expected, strict=True):
        assert y.std() > 0.01
        np.testing.assert_allclose(np.asarray(x).reshape(y.shape), y, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image_size", 512),
        ("num_maskmem", 4),
        ("max_cond_frame_num", 4),
        ("multimask_max_pt_num", 2),
        ("sigmoid_bias_for_mem_enc", -9.0),
        ("memory_attention_rope_theta", 500.0),
        ("rope_parameters.rope_theta", 500.0),
        ("enable_occlusion_spatial_embedding", False),
        ("vision_config.model_type", "timm_wrapper"),
        ("vision_config.backbone_feature_sizes", [[32, 32], [16, 16], [8, 8]]),
        ("vision_config.fpn_top_down_levels", [3]),
        ("vision_config.backbone_config.window_size_per_stage", [8, 4, 14, 7]),
        ("vision_config.backbone_config.window_size_per_stage", None),
        ("vision_config.backbone_config.global_attention_blocks", [3]),
        ("vision_config.backbone_config.hidden_act", "relu"),
        ("vision_config.backbone_config.layer_norm_eps", 1e-5),
        ("prompt_encoder_config.image_size", 512),
        ("mask_decoder_config.num_attention_heads", 4),
        ("mask_decoder_config.dynamic_multimask_stability_thresh", 0.9),
    ],
)
def test_a_setting_with_which_another_model_is_computed_is_an_error(folder, path, value):
    """None: the key is left out, which means its default, that of the size tiny."""
    from converters.checkpoint import read_weights
    from converters.hf_checks import check_config, read_config

    files = read_config(folder)
    model = sam2jq.load("demo")[0]
    check_config(files, model, video=True)
    assert read_weights(str(folder)).config == files
    *sections, key = path.split(".")
    node = files[folder / "config.json"]
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    shown = "missing" if value is None else repr(value)
    with pytest.raises(UserError, match=rf"config\.json: {re.escape(path)} is {re.escape(shown)}, "):
        check_config(files, model, video=True)


@pytest.mark.parametrize("kind", ["Sam2Config", "Sam2VideoConfig"])
def test_every_setting_of_transformers_is_compared_or_known_to_change_nothing(transformers, kind):
    from converters.hf_checks import IMAGE, VIDEO, equal, flat

    expected = flat(IMAGE | (VIDEO if kind == "Sam2VideoConfig" else {}))
    given = flat(getattr(transformers, kind)().to_dict())
    assert all(equal(given[key], value) for key, value in expected.items() if key != "memory_attention_rope_theta")
    same = re.compile(r".*(id2label|label2id|dropout|initializer_range|layer_scale_init_value|model_type|rope_type)")
    general = {*transformers.PreTrainedConfig().to_dict(), "_name_or_path"}
    rest = {key for key in given.keys() - expected.keys() if key.rpartition(".")[2] not in general}
    assert [key for key in rest if not same.match(key)] == ["vision_config.backbone_config.num_attention_heads"]


def test_a_folder_of_another_model_is_an_error(tmp_path):
    from converters.hf_checks import read_config

    (tmp_path / "config.json").write_text('{"model_type": "edgetam_video"}')
    with pytest.raises(UserError, match="config.json: model_type is edgetam_video, but only SAM 2"):
        read_config(tmp_path)

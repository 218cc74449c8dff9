"""The methods of the predictors take the arguments of sam2's, at the same positions and with the same defaults."""

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from converters.exports.vanilla import define_torchvision_operators
from sam2jq import AutomaticMaskGenerator, ImagePredictor, VideoPredictor
from sam2jq.errors import UserError
from sam2jq.models.sam2 import abstract_params, build

# parameters of the original that have no counterpart, and why
NOT_APPLICABLE = {
    ("ImagePredictor", "__init__", "sam_model"): "here `model` and `params`",
    ("AutomaticMaskGenerator", "__init__", "model"): "here `model` and `params`",
    ("ImagePredictor", "__init__", "kwargs"): "the original ignores them; here unknown arguments are refused by name",
    ("AutomaticMaskGenerator", "__init__", "kwargs"): "as above",
    ("VideoPredictor", "__init__", "kwargs"): "the modules of a SAM2Base, here part of `model`",
}
OWN = {each.__name__: each for each in (AutomaticMaskGenerator, ImagePredictor, VideoPredictor)}
OURS = {"model", "params"}  # in place of `sam_model`, or of the base class of the original
METHODS = [
    *[("ImagePredictor", name) for name in ("__init__", "from_pretrained", "set_image", "predict")],
    *[("ImagePredictor", name) for name in ("set_image_batch", "predict_batch")],
    *[("ImagePredictor", name) for name in ("get_image_embedding", "reset_predictor")],
    *[("AutomaticMaskGenerator", name) for name in ("__init__", "from_pretrained", "generate")],
    *[("VideoPredictor", name) for name in ("__init__", "from_pretrained", "init_state", "add_new_points_or_box")],
    *[("VideoPredictor", name) for name in ("add_new_points", "add_new_mask", "propagate_in_video")],
    *[("VideoPredictor", name) for name in ("clear_all_prompts_in_frame", "remove_object", "reset_state")],
]


NANO = build("nano")


def original(name: str) -> type:
    define_torchvision_operators()
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    return {
        "AutomaticMaskGenerator": SAM2AutomaticMaskGenerator,
        "ImagePredictor": SAM2ImagePredictor,
        "VideoPredictor": SAM2VideoPredictor,
    }[name]


def parameters(owner: type, method: str) -> list[tuple]:
    """[(name, default, kind)] without `self` and `cls`, in order."""
    signature = inspect.signature(getattr(owner, method))
    return [(p.name, p.default, p.kind) for p in signature.parameters.values() if p.name not in ("self", "cls")]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_arguments_are_those_of_sam2(name, method):
    theirs = parameters(original(name), method)
    expected = [row for row in theirs if (name, method, row[0]) not in NOT_APPLICABLE]
    got = parameters(OWN[name], method)
    if method == "__init__":
        assert {row[0] for row in got[:2]} == OURS
        got = got[2:]
    extra = [row for row in got if row[2] == inspect.Parameter.KEYWORD_ONLY]  # cannot shift a position
    assert [row for row in got if row not in extra] == expected


def test_one_conditioning_frame_before_and_one_after_are_the_fewest():
    for count in (0, 1, -2):
        with pytest.raises(UserError, match=f"max_cond_frames_in_attn {count}: it must be -1, for all, or at least 2"):
            VideoPredictor(NANO, abstract_params(NANO), max_cond_frames_in_attn=count)


@pytest.mark.parametrize("predictor", OWN.values())
@pytest.mark.parametrize("dtype", ["int8", "float8", "half a float"])
def test_an_unknown_dtype_is_refused(predictor, dtype):
    with pytest.raises(UserError, match="allowed: auto, float32, bfloat16, float16"):
        predictor(NANO, abstract_params(NANO), dtype=dtype)


@pytest.mark.parametrize("predictor", OWN.values())
def test_from_pretrained_loads_the_model_and_passes_options_on(predictor, monkeypatch):
    calls = []

    def load(source, *, name=None, version=None, image_size=None):
        calls.append((source, name, version, image_size))
        return NANO, abstract_params(NANO)

    monkeypatch.setitem(sys.modules, "sam2jq.api", SimpleNamespace(load=load))
    made = predictor.from_pretrained("tiny.pt", name="tiny", image_size=512, dtype="bfloat16")
    assert calls == [("tiny.pt", "tiny", None, 512)]
    assert (made.model, made.params, made.dtype) == (NANO, abstract_params(NANO), "bfloat16")
    assert isinstance(made, predictor)


@pytest.mark.parametrize("value", [False, True])
def test_options_of_memory_and_speed_are_accepted(value):
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    state = VideoPredictor(NANO, abstract_params(NANO)).init_state(frames, value, value, value)
    assert state.num_frames == 2

"""vanilla.pt of the demo model in the original code."""

import numpy as np
import pytest
import torch
from PIL import Image

from converters.checkpoint import load_checkpoint
from converters.exports.vanilla import build_original, define_torchvision_operators, save_vanilla
from sam2jq import ImagePredictor, QuantSpec, VideoPredictor, build, layers
from sam2jq.data.synthetic.scenes import draw_clip, draw_scene
from sam2jq.eval.image_benchmark import corners, interior_point
from sam2jq.eval.metrics import iou
from sam2jq.quant.algorithms.rtn import round_weights

LIMIT = 0.99


@pytest.fixture(scope="module")
def demo():
    model = build("nano")
    return model, load_checkpoint("demo", model).params


def test_the_original_image_predictor_draws_the_same_masks(demo, tmp_path):
    """50 prompts, half boxes and half clicks, on a quantized model."""
    model, params = demo
    small = round_weights(params, dict.fromkeys(layers(params), QuantSpec(4)))
    save_vanilla(tmp_path / "vanilla.pt", small)
    define_torchvision_operators()
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    original = SAM2ImagePredictor(build_original("nano", checkpoint=tmp_path / "vanilla.pt"))
    original._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # it hard-codes those of 1024 pixels
    ours = ImagePredictor(model, small)
    ious, seed = [], 0
    while len(ious) < 50:
        image, masks = draw_scene(seed)
        original.set_image(image)
        ours.set_image(image)
        for mask in masks:
            (x, y), _ = interior_point(mask)
            for prompt in ({"point_coords": np.array([[x, y]]), "point_labels": np.array([1])}, {"box": corners(mask)}):
                expected, *_ = original.predict(**prompt, multimask_output=False)
                got, *_ = ours.predict(**prompt, multimask_output=False)
                ious.append(iou(got[0] > 0, expected[0] > 0))
        seed += 1
    assert min(ious) >= LIMIT


@torch.no_grad()
def test_the_original_video_predictor_tracks_the_same_masks(demo, tmp_path):
    model, params = demo
    save_vanilla(tmp_path / "vanilla.pt", params)
    original = build_original("nano", checkpoint=tmp_path / "vanilla.pt", video=True)
    clip = draw_clip(5, 8)
    for i, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(tmp_path / f"{i:05d}.jpg", quality=95)
    tracked = []
    for predictor in (original, VideoPredictor(model, params)):
        state = predictor.init_state(str(tmp_path))
        for obj_id, mask in enumerate(clip.masks[0][:2]):
            predictor.add_new_mask(state, 0, obj_id, mask)
        tracked.append(np.stack([np.asarray(masks)[:, 0] > 0 for *_, masks in predictor.propagate_in_video(state)]))
    assert tracked[0].any()
    assert iou(tracked[1], tracked[0]).min() >= LIMIT

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import QuantSpec
from sam2jq.config.run import MeasureConfig, ModelConfig
from sam2jq.errors import UserError
from sam2jq.eval import fidelity
from sam2jq.eval.fidelity import kernel_errors, layer_errors, part, score_clips
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.stats import Stats

TREE = {
    "image_encoder": {"trunk": {"blocks.1": {"attn": {"qkv": {"kernel": jnp.eye(4)}}},
                                "blocks.0": {"attn": {"qkv": {"kernel": jnp.arange(8.0).reshape(4, 2)}}}}},
    "sam_mask_decoder": {"conv_s0": {"kernel": jnp.ones((1, 1, 4, 2))}},
}  # fmt: skip


def test_the_output_error_is_that_of_the_calibration_inputs():
    rng = np.random.default_rng(0)
    w, noise, x = rng.standard_normal((6, 3)), 0.1 * rng.standard_normal((6, 3)), rng.standard_normal((50, 6))
    stats = Stats(x.mean(0), x.min(0), x.max(0), x.T @ x / len(x))
    errors = kernel_errors(w + noise, w, stats)
    assert errors["output_error"] == pytest.approx(np.linalg.norm(x @ noise) / np.linalg.norm(x @ w))
    assert errors["relative_error"] == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(w))
    assert kernel_errors(w + noise, w, None)["output_error"] is None
    assert kernel_errors(np.zeros((6, 3)), np.zeros((6, 3)), stats)["output_error"] is None


def test_only_quantized_layers_are_listed_in_the_order_of_the_forward_pass():
    first, second = (f"image_encoder.trunk.blocks.{i}.attn.qkv" for i in (0, 1))
    quantized = round_weights(TREE, dict.fromkeys((second, first), QuantSpec(3)))
    errors = layer_errors(TREE, quantized, {})
    assert list(errors) == [first, second]
    assert errors[first]["part"] == "trunk"
    assert part("sam_mask_decoder.conv_s0") == "decoder"
    assert part("obj_ptr_tpos_proj") == "memory attention"


def test_memory_in_fewer_bits_is_measured_with_the_last_params(monkeypatch):
    monkeypatch.setattr(fidelity, "VideoPredictor", lambda model, params, dtype, memory_bits: (params, memory_bits))
    counts = {"f": 0, "j&f": 0, "clips": 1, "objects": 2, "left_out": {}}
    monkeypatch.setattr(fidelity, "evaluate_clips", lambda found, clips: counts | {"j": found.workers[0]})
    measured = MeasureConfig(clips="scenes:1", num_clips=1, memory_bits=[8, 4])
    config = SimpleNamespace(measure=measured, model=ModelConfig("nano"))
    video = score_clips(None, {"full precision": "full", "weights": "small"}, [], config)["video"]
    assert {name: scores["j"] for name, scores in video.items()} == {
        "full precision": ("full", None),
        "weights": ("small", None),
        "memory in 8 bits": ("small", 8),
        "memory in 4 bits": ("small", 4),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"memory_bits": [8]}, "set clips too"), ({"clips": "sa-v", "memory_bits": [3]}, "memory_bits must be 8, 4")],
)
def test_memory_bits_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MeasureConfig(**settings)

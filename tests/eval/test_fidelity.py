import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import QuantSpec
from sam2jq.eval.fidelity import kernel_errors, layer_errors, part
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

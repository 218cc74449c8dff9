import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import QuantSpec
from sam2jq.eval.fidelity import figures_of, layer_figures, part
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.stats import Stats

TREE = {
    "image_encoder": {"trunk": {"blocks.1": {"attn": {"qkv": {"kernel": jnp.eye(4)}}},
                                "blocks.0": {"attn": {"qkv": {"kernel": jnp.arange(8.0).reshape(4, 2)}}}}},
    "sam_mask_decoder": {"conv_s0": {"kernel": jnp.ones((1, 1, 4, 2))}},
}  # fmt: skip


def test_the_output_error_is_that_of_the_inputs_that_were_seen():
    rng = np.random.default_rng(0)
    w, noise, x = rng.standard_normal((6, 3)), 0.1 * rng.standard_normal((6, 3)), rng.standard_normal((50, 6))
    stats = Stats(x.mean(0), x.min(0), x.max(0), x.T @ x / len(x))
    found = figures_of(w + noise, w, stats)
    assert found["output_error"] == pytest.approx(np.linalg.norm(x @ noise) / np.linalg.norm(x @ w))
    assert found["relative_error"] == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(w))
    assert figures_of(w + noise, w, None)["output_error"] is None
    assert figures_of(np.zeros((6, 3)), np.zeros((6, 3)), stats)["output_error"] is None


def test_layers_come_as_data_runs_and_those_left_alone_do_not():
    first, second = (f"image_encoder.trunk.blocks.{i}.attn.qkv" for i in (0, 1))
    quantized = round_weights(TREE, dict.fromkeys((second, first), QuantSpec(3)))
    found = layer_figures(TREE, quantized, {})
    assert list(found) == [first, second]
    assert found[first]["part"] == "trunk"
    assert part("sam_mask_decoder.conv_s0") == "decoder"
    assert part("obj_ptr_tpos_proj") == "memory attention"

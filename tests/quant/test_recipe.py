import numpy as np
import pytest

from sam2jq.config import WeightsConfig
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.recipe import layers, round_weights, weight_specs
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten

LAYERS = ["t.blocks.1.attn", "t.blocks.1.mlp", "t.blocks.10.attn", "neck.conv"]


def specs(**settings) -> dict[str, QuantSpec]:
    return weight_specs(WeightsConfig(**settings), LAYERS)


def test_skips_end_at_a_dot():
    assert list(specs(skips=["t.blocks.1"])) == ["t.blocks.10.attn", "neck.conv"]


def test_the_longest_prefix_sets_the_bits():
    got = specs(dtype="sint4", bits={"t": 3, "t.blocks.1": 6, "t.blocks.1.mlp.weight": 8})
    assert [spec.bits for spec in got.values()] == [6, 8, 3, 4]


@pytest.mark.parametrize(
    ("shapes", "spec"),
    [([[1, 64]], QuantSpec(5, symmetric=False, group_size=64)), ([[1, -1]], QuantSpec(5, symmetric=False))]
    + [([[-1, -1]], QuantSpec(5, symmetric=False, per_tensor=True))],
)
def test_group_shapes_mean_what_the_schema_says(shapes, spec):
    assert set(specs(dtype="uint5", group_shapes=shapes).values()) == {spec}


@pytest.mark.parametrize("where", [{"skips": ["t.blocks.2"]}, {"bits": {"t.blocks.2": 4}}])
def test_a_prefix_that_matches_nothing_is_an_error(where):
    with pytest.raises(ValueError, match=r"no layer under t\.blocks\.2; did you mean 't\.blocks\.1"):
        specs(**where)


def test_only_chosen_kernels_are_rounded():
    kernel = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    params = {name: {"kernel": kernel, "bias": kernel[0]} for name in ("a", "b")}
    assert layers(params) == ["a", "b"]
    flat = flatten(round_weights(params, {"b": QuantSpec(4)}))
    assert flat["a/kernel"] is kernel
    assert flat["b/bias"] is params["b"]["bias"]
    assert isinstance(flat["b/kernel"], QTensor)
    np.testing.assert_array_equal(dequantize(flat["b/kernel"]), dequantize(quantize(kernel, QuantSpec(4))))

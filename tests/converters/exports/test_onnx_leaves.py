"""Weight leaves as ONNX operators, layer by layer: each engine computes what jax does."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.deploy.engines import ENGINES, open_graph
from sam2jq.quant import leaves as ours
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import rotate_kernel
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from tests.conftest import relative

pytest.importorskip("onnx")
from converters.exports.onnx import layers
from converters.exports.onnx.graph import Graph
from converters.exports.onnx.leaves import STATIC, nearest_leaf, why_refused

WIDTH, OUTPUTS = 72, 24  # WIDTH is no multiple of most group sizes
RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.standard_normal((WIDTH, OUTPUTS)), jnp.float32)
BIAS = RNG.standard_normal(OUTPUTS).astype(np.float32)
SPECS = {
    **{f"sint{bits}": QuantSpec(bits) for bits in range(2, 9)},
    **{f"uint{bits} groups of 16": QuantSpec(bits, False, 16) for bits in (2, 4, 8)},
    "sint4 groups of 32": QuantSpec(4, group_size=32),
    "uint4 groups of 10": QuantSpec(4, False, 10),
    "uint8 per tensor": QuantSpec(8, False, per_tensor=True),
    "nvfp4": QuantSpec(4, group_size=16, codes="float", scales="e4m3"),
    "fp4": QuantSpec(4, codes="float"),
    "fp8": QuantSpec(8, codes="float"),
}


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    pytest.importorskip(request.param)
    return request.param


def compute(engine, path, x, build) -> np.ndarray:
    """The output of a graph of one layer on x; build(graph, "x") adds it."""
    graph = Graph({"x": ("float32", x.shape)})
    graph.write(path / "layer.onnx", "layer", {"y": build(graph, "x")})
    return open_graph(path / "layer.onnx", engine, "float32")({"x": x})["y"]


def dense(engine, path, x, leaf) -> np.ndarray:
    return compute(engine, path, x, lambda g, x: layers.dense(g, {"kernel": leaf, "bias": BIAS}, x))


def codes_of(scale, zero_point, shape) -> np.ndarray:
    """Inputs next to the points of a grid, and beyond its ends: no rounding error moves one to another point."""
    codes = RNG.integers(-20, 276, shape) + RNG.uniform(-0.4, 0.4, shape) - zero_point
    return (codes * scale).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_weight_in_codes_is_the_weight_that_they_stand_for(tmp_path, engine, spec):
    x, leaf = RNG.standard_normal((1, 5, WIDTH)).astype(np.float32), quantize(KERNEL, spec)
    assert relative(dense(engine, tmp_path, x, leaf), ours.matmul(leaf, x) + BIAS) < 1e-6


@pytest.mark.parametrize(
    "inputs", [QuantSpec(8, False, per_tensor=True), QuantSpec(8, per_tensor=True), QuantSpec(6, False)]
)
@pytest.mark.parametrize("weights", [QuantSpec(8), QuantSpec(4, False), QuantSpec(4, group_size=32)])
def test_a_static_layer_equals_the_product_of_rounded_inputs(tmp_path, engine, inputs, weights):
    scale, zero_point = np.float32(0.03), np.float32(0 if inputs.symmetric else 2 ** (inputs.bits - 1) - 7)
    leaf = ActQuantized(quantize(KERNEL, weights), scale, zero_point, inputs)
    x = codes_of(scale, zero_point, (1, 5, WIDTH))
    assert relative(dense(engine, tmp_path, x, leaf), ours.matmul(leaf, x) + BIAS) < 1e-6


def test_leaves_around_a_weight_change_the_input_as_in_jax(tmp_path, engine):
    inner = LowRank(quantize(KERNEL, QuantSpec(4)), KERNEL[:, :4], KERNEL[:4])
    rotated = rotate_kernel(KERNEL, seed=1)
    leaf = Smoothed(type(rotated)(inner, rotated.signs), jnp.linspace(0.5, 2, WIDTH))
    x = RNG.standard_normal((1, 5, WIDTH)).astype(np.float32)
    assert relative(dense(engine, tmp_path, x, leaf), ours.matmul(leaf, x) + BIAS) < 1e-6


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("spec", [None, QuantSpec(4, group_size=16), QuantSpec(8, False)])
def test_a_convolution_with_a_weight_in_codes_equals_ours(tmp_path, engine, groups, spec):
    kernel = jnp.asarray(RNG.standard_normal((3, 3, 4, OUTPUTS)), jnp.float32)
    leaf = kernel if spec is None else quantize(kernel, spec)
    x = RNG.standard_normal((1, 8, 8, 4 * groups)).astype(np.float32)
    settings = {"stride": 2, "padding": 1, "groups": groups}
    p = {"kernel": leaf, "bias": BIAS}
    got = compute(engine, tmp_path, x, lambda g, x: layers.conv(g, p, x, size=3, **settings))
    assert relative(got, ours.conv(leaf, x, **settings) + BIAS) < 1e-6


def test_a_transposed_convolution_with_all_leaves_equals_ours(tmp_path, engine):
    kernel = jnp.asarray(RNG.standard_normal((2, 2, 4, OUTPUTS)), jnp.float32)
    branch = LowRank(quantize(kernel, QuantSpec(4)), kernel[..., :3], kernel[0, 0, :3])
    leaf = ActQuantized(branch, np.float32(0.03), np.float32(120), QuantSpec(8, False, per_tensor=True))
    x = codes_of(0.03, 120, (1, 4, 4, 4))
    got = compute(engine, tmp_path, x, lambda g, x: layers.conv_transpose(g, {"kernel": leaf, "bias": BIAS}, x, 4))
    assert relative(got, ours.conv_transpose(leaf, x, stride=2) + BIAS) < 1e-6


def test_what_has_no_kernel_is_refused_with_the_way_out():
    dynamic = partial(ActQuantized, KERNEL, None, None)
    fixed = partial(ActQuantized, KERNEL, np.float32(1), np.float32(0))
    assert why_refused(fixed(QuantSpec(8))) == ""
    assert STATIC in why_refused(Smoothed(dynamic(QuantSpec(8)), KERNEL[:, 0]))
    assert STATIC in why_refused(OutQuantized(KERNEL, QuantSpec(8)))
    assert "dtype uint8" in why_refused(fixed(QuantSpec(8, codes="float")))


@pytest.mark.parametrize(
    "leaf",
    [
        Smoothed(ActQuantized(quantize(KERNEL, QuantSpec(4)), None, None, QuantSpec(8)), KERNEL[:, 0]),
        OutQuantized(LowRank(quantize(KERNEL, QuantSpec(4)), KERNEL[:, :4], KERNEL[:4]), QuantSpec(8)),
        ActQuantized(KERNEL, np.float32(1), np.float32(0), QuantSpec(8, codes="float")),
    ],
)
def test_the_nearest_form_has_the_same_weight_and_inputs_in_float32(leaf):
    nearest = nearest_leaf(leaf)
    assert why_refused(nearest) == ""
    assert not {ActQuantized, OutQuantized} & ours.unwrap(nearest)[1].keys()
    np.testing.assert_array_equal(ours.materialize(nearest), ours.materialize(leaf))


def test_the_nearest_form_keeps_inputs_on_a_fixed_grid():
    inner = ActQuantized(quantize(KERNEL, QuantSpec(4)), np.float32(1), np.float32(0), QuantSpec(8))
    assert nearest_leaf(OutQuantized(inner, QuantSpec(8))) == inner


@dataclass(frozen=True)
class NewLeaf:
    inner: object


def test_a_leaf_without_operators_is_refused_by_name():
    assert "no operators are known for its leaf NewLeaf" in why_refused(NewLeaf(KERNEL))

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.models.layers import Conv, ConvTranspose, Dense, gelu
from sam2jq.quant.algorithms.activations import (
    ActQuantized,
    OutQuantized,
    fake_quantize,
    is_nonnegative,
    materialize_weights,
    quantize_inputs,
)
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.qtensor import QTensor, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import map_base_weight

TOKENS, WIDTH, OUTPUTS = 50, 96, 7
GROUPS = [None, 16, 40, 64]  # 40 and 64 leave a ragged last group
INPUTS = [QuantSpec(b, symmetric, g) for b in (4, 8) for symmetric in (True, False) for g in GROUPS]
INPUTS += [QuantSpec(8, symmetric, per_tensor=True) for symmetric in (True, False)]
name = lambda spec: f"{spec.dtype}-{spec.group}"


@pytest.fixture
def x():
    return jnp.array(np.random.default_rng(0).standard_normal((5, TOKENS // 5, WIDTH)) + 0.3, jnp.float32)


@pytest.fixture
def w():
    return jnp.array(np.random.default_rng(1).standard_normal((WIDTH, OUTPUTS)), jnp.float32)


@pytest.mark.parametrize("spec", INPUTS, ids=name)
def test_an_input_moves_by_half_a_step_at_most(x, spec):
    """A step is the range of what shares a scale, and 0, over the number of steps; zero points are rounded too."""
    size = spec.group_size or WIDTH
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -WIDTH % size))).reshape(*x.shape[:2], -1, size)
    axes = None if spec.per_tensor else -1
    low, high = jnp.minimum(padded.min(axes, keepdims=True), 0), jnp.maximum(padded.max(axes, keepdims=True), 0)
    step = jnp.maximum(-low, high) / spec.qmax if spec.symmetric else (high - low) / spec.qmax
    moved = jnp.pad(fake_quantize(x, spec) - x, ((0, 0), (0, 0), (0, -WIDTH % size))).reshape(padded.shape)
    assert jnp.all(jnp.abs(moved) <= (0.5 if spec.symmetric else 1.0) * step * (1 + 1e-5))


def test_gradients_pass_straight_through_rounding_by_the_range_of_a_token():
    """The range is a constant: a gradient by way of minimum and maximum would be the rounding error of all others."""
    x, upstream = jax.random.normal(jax.random.key(0), (2, 5, 16))
    got = jax.grad(lambda x: (fake_quantize(x, QuantSpec(8)) * upstream).sum())(x)
    np.testing.assert_allclose(got, upstream, rtol=1e-6)


def test_tokens_of_zeros_stay_zeros():
    assert not fake_quantize(jnp.zeros((3, 8)), QuantSpec(4)).any()


@pytest.mark.parametrize("inputs", INPUTS, ids=name)
@pytest.mark.parametrize(
    "weights", [QuantSpec(4), QuantSpec(8, False), QuantSpec(4, False, 32), QuantSpec(8, True, 40)]
)
def test_integer_products_equal_simulated_ones(x, w, weights, inputs):
    """To 1e-5 of the largest output: both add up the same numbers, in float32 in other orders."""
    layer = quantize_inputs(quantize(w, weights), None, inputs)
    materialize_weights, integer = matmul(layer, x), matmul(replace(layer, integer=True), x)
    assert jnp.abs(materialize_weights - integer).max() <= 1e-5 * jnp.abs(materialize_weights).max()


def test_the_integer_product_multiplies_int8_and_adds_int32(x, w):
    layer = ActQuantized(quantize(w, QuantSpec(4)), None, None, QuantSpec(8, False), integer=True)
    program = jax.jit(matmul).lower(layer, x).as_text()
    assert "(tensor<50x96xi8>, tensor<96x7xi8>) -> tensor<50x7xi32>" in program  # inputs, weight -> outputs


def test_a_static_grid_spans_what_calibration_saw_and_clips_the_rest(w):
    stats = Stats(jnp.zeros(WIDTH), jnp.full(WIDTH, -1.0), jnp.linspace(0, 3, WIDTH))
    layer = quantize_inputs(w, stats, QuantSpec(8, False, per_tensor=True), static=True)
    rounded = lambda value: fake_quantize(jnp.full((1, 4), value), layer.spec, layer.scale, layer.zero_point)
    np.testing.assert_allclose(rounded(2.0), 2.0, atol=4 / 255)
    np.testing.assert_allclose(rounded(9.0), 3.0, atol=4 / 255)
    np.testing.assert_allclose(rounded(-9.0), -1.0, atol=4 / 255)


def test_static_and_dynamic_agree_on_the_tokens_that_were_seen(x, w):
    rows, spec = x.reshape(-1, WIDTH), QuantSpec(8, False, per_tensor=True)
    stats = Stats(rows.mean(0), rows.min(0), rows.max(0))
    np.testing.assert_array_equal(
        matmul(quantize_inputs(w, stats, spec, static=True), x), matmul(quantize_inputs(w, None, spec), x)
    )


def test_the_leaf_stands_for_its_weight_and_lets_others_in(w):
    layer = quantize_inputs(w, None, QuantSpec(8))
    np.testing.assert_array_equal(materialize(layer), w)
    inner = map_base_weight(layer, None, lambda w, _: quantize(w, QuantSpec(4)))
    assert isinstance(inner, ActQuantized)
    assert isinstance(inner.inner, QTensor)


@pytest.mark.parametrize("layer", [Dense(5), Conv(5, size=3, padding=1), ConvTranspose(5)], ids=["dense", "3x3", "up"])
def test_what_leaves_a_layer_is_rounded_with_its_bias(layer):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    shaped = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), shaped)
    spec, inner = QuantSpec(4), quantize_inputs(params["kernel"], None, QuantSpec(8))
    plain = layer.apply({"params": params | {"kernel": inner}}, x)
    rounded = layer.apply({"params": params | {"kernel": OutQuantized(inner, spec)}}, x)
    np.testing.assert_array_equal(rounded, fake_quantize(plain, spec))
    assert jnp.abs(rounded - plain).max() > 0
    np.testing.assert_array_equal(materialize(OutQuantized(inner, spec)), params["kernel"])


@pytest.mark.parametrize(
    ("fn", "expected"),
    [(jax.nn.relu, True), (gelu, True), (jax.nn.sigmoid, True), (jnp.tanh, False), (jnp.negative, False)],
)
def test_inputs_are_one_sided_after_relu_and_gelu(fn, expected):
    rows = fn(4 * jax.random.normal(jax.random.key(0), (500, 8)))
    assert is_nonnegative(Stats(rows.mean(0), jnp.minimum(rows.min(0), 0), jnp.maximum(rows.max(0), 0))) == expected


def test_an_unsigned_grid_of_one_sided_inputs_has_half_the_step():
    rows = jax.nn.relu(jax.random.normal(jax.random.key(0), (500, 8)))
    error = lambda spec: jnp.square(fake_quantize(rows, spec) - rows).mean()
    assert error(QuantSpec(8, symmetric=False)) < error(QuantSpec(8)) / 3


def test_layers_that_multiply_integers_do_so_where_models_are_measured():
    leaf = lambda integer: quantize_inputs(
        quantize(jnp.ones((4, 2)), QuantSpec(4)), None, QuantSpec(8), integer=integer
    )
    found = materialize_weights({"a": {"kernel": leaf(True)}, "b": {"kernel": leaf(False)}})
    assert isinstance(found["a"]["kernel"].inner, QTensor)
    assert isinstance(found["b"]["kernel"].inner, jax.Array)

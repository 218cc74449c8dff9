import operator
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.activations import ActQuantized, materialize_weights, quantize_inputs
from sam2jq.quant.algorithms.fake_quant import (
    bits_of,
    fake_quant_layers,
    init_fake_quant,
    materialize_fake_quant,
    stop_gradient_where,
    to_fake_quant,
    to_qtensor,
    to_quantized_params,
    trainable_mask,
    with_bits,
)
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten

SPECS = [
    QuantSpec(4),
    QuantSpec(4, symmetric=False),
    QuantSpec(4, group_size=16),
    QuantSpec(4, group_size=24, symmetric=False),
    QuantSpec(4, group_size=16, scales="bfloat16"),
    QuantSpec(4, per_tensor=True),
]


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [pytest.param((40, 12), marks=pytest.mark.slow), (3, 3, 8, 12)])
def test_traced_bits_round_as_static_ones_to_the_bit(spec, shape):
    """A compiled program may add in another order: 1e-6."""
    w = weight(*shape)
    chex.clear_trace_counter()
    stands_for = lambda bits: materialize(replace(to_fake_quant(w, spec), bits=bits))
    compiled = jax.jit(chex.assert_max_traces(stands_for, 1))  # one program serves every width
    for bits in range(2, 9):
        expected = dequantize(quantize(w, replace(spec, bits=bits)))
        np.testing.assert_array_equal(stands_for(jnp.float32(bits)), expected)
        np.testing.assert_allclose(compiled(jnp.float32(bits)), expected, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_learned_weight_is_frozen_as_what_it_stood_for_to_the_bit(spec):
    w = to_fake_quant(weight(40, 12), spec)
    share = jnp.asarray(np.random.default_rng(1).uniform(0.4, 1.1, w.clip_ratio.shape), jnp.float32)
    w = replace(w, clip_ratio=share, bits=jnp.float32(3))
    q = to_qtensor(w)
    assert q.spec.bits == 3
    np.testing.assert_array_equal(dequantize(q), materialize(w))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_quantized_weight_starts_to_learn_where_it_stands(spec):
    """Within rounding of the scale's last digit."""
    q = quantize(weight(40, 12), spec)
    q = replace(q, scale=q.scale * 0.5)  # as a clipped range leaves it
    w = to_fake_quant(q, QuantSpec(8))
    assert w.spec == spec
    np.testing.assert_allclose(materialize(w), dequantize(q), rtol=1e-6, atol=1e-7)


def test_weights_that_are_rounded_together_are_those_rounded_alone():
    """Values and gradients, with incomplete groups, several specs and leaves around."""
    shapes = {"a": (40, 6), "b": (3, 3, 4, 8), "c": (64, 2), "d": (16, 5)}
    groups = QuantSpec(4, symmetric=False, group_size=16)
    specs = {"a": groups, "b": replace(groups, bits=3), "c": QuantSpec(3), "d": groups}
    one = lambda seed, name: to_fake_quant(weight(*shapes[name], seed=seed), specs[name])
    params = {name: {"kernel": one(seed, name)} for seed, name in enumerate(shapes)}
    params["d"]["kernel"] = ActQuantized(params["d"]["kernel"], None, None, QuantSpec(8))
    params["t"] = {"kernel": to_fake_quant(weight(7, 3), QuantSpec(4, per_tensor=True)), "bias": jnp.ones(3)}
    params["u"] = {"kernel": to_fake_quant(weight(7, 3), QuantSpec(4, per_tensor=True))}

    def total(materialize_all):
        def fn(params):
            leaves = flatten(materialize_all(params))
            return sum(jnp.sin(jnp.asarray(x) * (1 + i)).sum() for i, x in enumerate(jax.tree.leaves(leaves)))

        return jax.jit(jax.value_and_grad(fn))(params)

    together, alone = total(lambda p: materialize_weights(materialize_fake_quant(p))), total(materialize_weights)
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6), together, alone)


def test_every_weight_that_the_grid_reaches_gets_the_gradient_of_what_it_stands_for():
    w, aim = to_fake_quant(weight(32, 8), QuantSpec(3)), weight(32, 8, seed=1)
    grads = jax.grad(lambda w: (materialize(w) * aim).sum())(w)
    np.testing.assert_allclose(grads.kernel, aim, rtol=1e-6)
    w = replace(w, clip_ratio=w.clip_ratio / 2)
    inside = np.abs(w.kernel) <= 3.5 * np.asarray(to_qtensor(w).scale)
    grads = jax.grad(lambda w: (materialize(w) * aim).sum())(w)
    np.testing.assert_allclose(grads.kernel, np.where(inside, aim, 0), rtol=1e-6)


def test_the_share_of_the_range_learns_by_lsq_s_gradient():
    """Rounding error inside the grid, its end outside (arXiv 1902.08153, equation 3)."""
    w = replace(to_fake_quant(weight(32, 8), QuantSpec(3)), clip_ratio=jnp.full((1, 8), 0.6))
    grads = jax.grad(lambda w: materialize(w).sum())(w)
    step = np.abs(w.kernel).max(0) / 3
    scaled = np.asarray(w.kernel) / (0.6 * step)
    slope = np.where(np.abs(scaled) <= 3.5, np.round(scaled) - scaled, np.clip(np.round(scaled), -3, 3))
    np.testing.assert_allclose(grads.clip_ratio[0], (slope * step).sum(0), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_rounded_pass_their_gradient():
    spec = QuantSpec(4, symmetric=False)
    w, x, aim = weight(16, 4), weight(5, 16, seed=1), weight(5, 4, seed=2)
    scale = jnp.float32(0.5)
    leaf = ActQuantized(w, scale, jnp.float32(8), spec)
    inside = (np.asarray(x) / 0.5 + 8 >= 0) & (np.asarray(x) / 0.5 + 8 <= 15)
    grads = jax.grad(lambda x: (matmul(leaf, x) * aim).sum())(x)
    np.testing.assert_allclose(grads, np.where(inside, aim @ w.T, 0), rtol=1e-6)
    assert jax.grad(lambda s: (matmul(replace(leaf, scale=s), x) * aim).sum())(scale) != 0


def tree():
    plain = {"a": {"kernel": weight(16, 8), "bias": jnp.zeros(8)}, "b": {"kernel": weight(8, 4, seed=1)}}
    return plain | {"pe": {"positional_encoding_gaussian_matrix": weight(2, 4)}}


def test_a_student_learns_inside_the_leaves_that_it_was_given():
    params = tree()
    params["a"]["kernel"] = Smoothed(
        quantize_inputs(quantize(weight(16, 8), QuantSpec(4)), None, QuantSpec(8)), jnp.ones(16)
    )
    made = init_fake_quant(params, {"a": QuantSpec(8), "b": QuantSpec(8)})
    assert fake_quant_layers(made) == ["a", "b"]
    np.testing.assert_array_equal(bits_of(made), [4, 8])
    lower = with_bits(made, jnp.array([3.0, 5.0]))
    np.testing.assert_array_equal(bits_of(lower), [3, 5])
    done = to_quantized_params(lower)
    assert isinstance(done["a"]["kernel"].inner.inner, QTensor)
    assert (done["a"]["kernel"].inner.inner.spec.bits, done["b"]["kernel"].spec.bits) == (3, 5)


def test_what_learns_is_weights_and_plain_arrays_not_bits_nor_leaves_around():
    params = tree()
    params["a"]["kernel"] = Smoothed(
        ActQuantized(weight(16, 8), jnp.float32(1), jnp.float32(0), QuantSpec(8)), jnp.ones(16)
    )
    marks = trainable_mask(init_fake_quant(params, {"a": QuantSpec(8), "b": QuantSpec(8)}))
    a, b = marks["a"]["kernel"], marks["b"]["kernel"]
    assert (a.scale, a.inner.scale, a.inner.zero_point) == (False, True, False)
    assert (b.kernel, b.clip_ratio, b.bits) == (True, True, False)
    assert marks["a"]["bias"]
    assert not marks["pe"]["positional_encoding_gaussian_matrix"]
    assert not trainable_mask(init_fake_quant(params, {"b": QuantSpec(8)}), clipping=False)["b"]["kernel"].clip_ratio


def test_no_gradient_reaches_what_does_not_learn():
    made = init_fake_quant(tree(), {"a": QuantSpec(4), "b": QuantSpec(4, group_size=4)})
    marks = trainable_mask(made, clipping=False)
    frozen = jax.tree.map(operator.not_, marks)

    def total(params: dict):
        return sum(x.sum() for x in jax.tree.leaves(materialize_weights(stop_gradient_where(params, frozen))))

    grads = jax.grad(total)(made)
    assert [bool((x != 0).any()) for x in jax.tree.leaves(grads)] == jax.tree.leaves(marks)


def test_floats_have_no_bits_to_lower():
    with pytest.raises(ValueError, match="sintN and uintN"):
        to_fake_quant(weight(4, 4), QuantSpec(4, codes="float"))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sam2jq.quant import leaves as ops
from sam2jq.quant.error import relative_error
from sam2jq.quant.qtensor import by_group, dequantize, from_groups, quantize
from sam2jq.quant.spec import QuantSpec

BITS = range(2, 9)
GRANULARITY = [{}, {"group_size": 16}, {"group_size": 7}, {"per_tensor": True}]
every_spec = pytest.mark.parametrize(
    "spec", [QuantSpec(b, symmetric=s, **g) for b in BITS for s in (True, False) for g in GRANULARITY], ids=str
)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@every_spec
@pytest.mark.parametrize("shape", [(48, 5), (3, 3, 4, 6)])
def test_rounding_moves_no_weight_by_more_than_half_a_step(spec, shape):
    w = weights(*shape)
    q = quantize(w, spec)
    step = from_groups(jnp.broadcast_to(q.scale[:, None], by_group(w, spec).shape), shape)
    assert (abs(dequantize(q) - w) <= step / 2 * (1 + 1e-5)).all()
    assert q.qvalue.min() >= spec.qmin
    assert q.qvalue.max() <= spec.qmax


@every_spec
def test_a_weight_is_code_minus_zero_times_scale_to_the_bit(spec):
    q = quantize(weights(48, 5), spec)
    rows = np.arange(48) // (spec.group_size or 48)
    zero = 0 * q.scale if q.zero_point is None else q.zero_point
    scale, zero = (np.broadcast_to(np.asarray(x)[rows], (48, 5)) for x in (q.scale, zero))
    np.testing.assert_array_equal(dequantize(q), (np.asarray(q.qvalue, np.float32) - zero) * scale)


@pytest.mark.parametrize(
    "spec", [QuantSpec(b, s, group_size=16) for b in (2, 3, 4) for s in (True, False)] + [QuantSpec(4, codes="float")]
)
def test_devices_hold_two_codes_of_4_bits_in_a_byte_and_a_zero_point_in_two_bytes(spec):
    q = quantize(weights(48, 6), spec)
    held = jax.jit(lambda q: q).lower(q).compile().memory_analysis().argument_size_in_bytes
    assert held == 48 * 6 / 2 + q.scale.nbytes + (0 if spec.symmetric else 2 * q.scale.size)


@every_spec
def test_a_group_of_zeros_stays_zero(spec):
    w = np.zeros((48, 5), np.float32)
    q = quantize(w, spec)
    assert (q.scale == 1).all()
    np.testing.assert_array_equal(dequantize(q), w)


@pytest.mark.parametrize("size", [1, 5, 16, 48, 100])
def test_groups_come_back_whole_ragged_or_not(size):
    w = weights(4, 4, 3, 5)
    np.testing.assert_array_equal(from_groups(by_group(w, QuantSpec(4, group_size=size)), w.shape), w)


def test_a_ragged_last_group_has_its_own_scale():
    w = np.concatenate([np.full((16, 2), 8.0), np.full((3, 2), 0.7)]).astype(np.float32)
    q = quantize(w, QuantSpec(4, group_size=16))
    np.testing.assert_allclose(q.scale, [[8 / 7] * 2, [0.1] * 2], rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_rounding_equals_op_by_op_rounding(symmetric):
    w, spec = weights(512, 96), QuantSpec(4, symmetric=symmetric)
    compiled = jax.jit(quantize, static_argnums=1)(w, spec)
    jax.tree.map(np.testing.assert_array_equal, compiled, quantize(w, spec))


@pytest.mark.parametrize("kind", ["", ".outlier"])
@pytest.mark.parametrize(("name", "symmetric"), [("rtn_s4", True), ("rtn_u4_prescale", False)])
def test_codes_and_scales_equal_the_reference_library(shared, kind, name, symmetric):
    folder = shared / "golden" / "ptq"
    inputs, peer = (np.load(folder / f"blocks.0.attn.qkv{kind}.{part}.npz") for part in ("inputs", "peer"))
    q = quantize(inputs["w"].T, QuantSpec(4, symmetric=symmetric, group_size=int(inputs["group"])))
    np.testing.assert_array_max_ulp(np.asarray(q.scale).T, peer[f"{name}.scale"], maxulp=1)
    np.testing.assert_array_equal(np.asarray(q.qvalue).T, peer[f"{name}.codes"])
    if not symmetric:
        np.testing.assert_array_equal(np.asarray(q.zero_point).T, peer[f"{name}.zero"])


@pytest.mark.parametrize("size", ["tiny", "small", "base_plus", "large"])
def test_real_weights_lose_less_with_every_bit(shared, size):
    tensors = load_file(shared / "data" / "sam2.1_fragments" / f"sam2.1_hiera_{size}_partial.safetensors")
    kernels = {name: t.T for name, t in tensors.items() if t.ndim == 2 and "blocks" in name}
    assert kernels
    for kernel in kernels.values():
        errors = [relative_error(dequantize(quantize(kernel, QuantSpec(bits))), kernel) for bits in BITS]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < 0.02
        assert errors[-1] < errors[0] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 1}, "2..8, got 1"), ({"bits": 9}, "2..8, got 9"), ({"bits": 4, "group_size": 0}, "at least 1, got 0")]
    + [({"bits": 4, "group_size": 8, "per_tensor": True}, "per_tensor is one scale for all: leave group_size out")],
)
def test_an_impossible_spec_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


def test_layers_compute_with_what_a_leaf_stands_for():
    x, w = weights(2, 8, 8, 12), weights(3, 3, 12, 5)
    q = quantize(w, QuantSpec(4))
    conv = lambda w: ops.conv(w, x, stride=1, padding=1, groups=1)
    np.testing.assert_array_equal(conv(q), conv(dequantize(q)))
    q = quantize(w[0, 0], QuantSpec(4))
    np.testing.assert_array_equal(ops.matmul(q, x), ops.matmul(dequantize(q), x))
    params = {"a": {"kernel": q, "bias": x}}
    np.testing.assert_array_equal(ops.materialize_params(params)["a"]["kernel"], dequantize(q))


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4), QuantSpec(4, group_size=64), QuantSpec(3, False, 32), QuantSpec(2, per_tensor=True)]
    + [QuantSpec(4, group_size=32, scales="bfloat16"), QuantSpec(8, codes="float")],
    ids=lambda spec: f"{spec.dtype}-{spec.group}",
)
def test_eager_and_jitted_calls_give_the_same_bits(spec):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((128, 128)), jnp.float32)
    eager, jitted = quantize(w, spec), jax.jit(quantize, static_argnums=1)(w, spec)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


@pytest.mark.parametrize("bits", [4, 8])
def test_code_minus_zero_point_does_not_wrap_around(bits):
    """As users compute it from the two arrays: codes of 0 below zero points of 255."""
    q = quantize(np.array([[-2.0], [0.5], [-1.0]], np.float32), QuantSpec(bits, symmetric=False))
    difference = np.asarray(q.qvalue) - np.asarray(q.zero_point)
    np.testing.assert_array_equal(difference * np.asarray(q.scale), dequantize(q))
    assert difference.min() < 0

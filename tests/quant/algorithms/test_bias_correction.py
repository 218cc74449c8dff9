import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.bias_correction import bias_correction, bias_shift
from sam2jq.quant.algorithms.rtn import rtn
from sam2jq.quant.leaves import matmul
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats

K, N = 24, 7
W = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)


def inputs(rank: int) -> np.ndarray:
    """400 inputs [400, K] with a mean, of which `rank` directions are excited."""
    rng = np.random.default_rng(1)
    return ((rng.standard_normal((400, rank)) + 1) @ rng.standard_normal((rank, K))).astype(np.float32)


def stats_of(x: np.ndarray) -> Stats:
    return Stats(jnp.asarray(x.mean(0)), jnp.asarray(x.min(0)), jnp.asarray(x.max(0)), jnp.asarray(x.T @ x / len(x)))


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(4, symmetric=False, group_size=8)], ids=str)
def test_with_the_shift_in_the_bias_outputs_keep_their_mean(spec):
    x, q = inputs(K), quantize(W, spec)
    wrong = (matmul(q, x) - x @ W).mean(0)
    shift = bias_shift(W, q, stats_of(x))
    assert abs(wrong).max() > 0.1
    np.testing.assert_allclose(wrong + shift, np.zeros(N), atol=1e-5 * abs(x @ W).max())


def test_the_shift_of_a_convolution_is_that_of_its_matrix():
    stats, q = stats_of(inputs(K)), quantize(W, QuantSpec(3))
    kernel = W.reshape(2, 2, 6, N)
    np.testing.assert_array_equal(bias_shift(kernel, quantize(kernel, QuantSpec(3)), stats), bias_shift(W, q, stats))


def test_as_a_transform_it_corrects_the_layers_that_were_rounded():
    x, bias = inputs(K), np.zeros(N, np.float32)
    params = {name: {"kernel": jnp.asarray(W), "bias": bias} for name in ("a", "b")}
    transform = bias_correction(rtn({"a": QuantSpec(2)}))
    assert transform.needs == {"range"}
    changed = transform.apply(params, {"a": stats_of(x)})
    outputs = matmul(changed["a"]["kernel"], x) + changed["a"]["bias"]
    np.testing.assert_allclose(outputs.mean(0), (x @ W).mean(0), atol=1e-5 * abs(x @ W).max())
    np.testing.assert_array_equal(changed["b"]["bias"], bias)

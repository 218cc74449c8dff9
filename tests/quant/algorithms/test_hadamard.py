import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.hadamard import factors, fast_hadamard, hadamard

HEADS = [32, 56, 64, 72, 96]
HIERA = [width << stage for width in (96, 112, 144) for stage in range(6)]  # stages double widths, an MLP has 4 times
OTHERS = [1, 2, 4, 8, 12, 20, 28, 36, 40, 44, 76, 128, 256, 1024, 2048]  # the rest of SAM 2, and each construction
every_width = pytest.mark.parametrize("n", sorted({*HEADS, *HIERA, *OTHERS}))


def inputs(*shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@every_width
def test_rows_are_orthogonal_and_the_matrix_is_symmetric(n):
    """Of integers, so exact; h h^T v = n v for 30 random v of zeros and ones is chance with probability 2^-30."""
    h = hadamard(n)
    v = np.random.default_rng(0).integers(2, size=(n, 30)).astype(np.float64)
    assert h.shape == (n, n)
    assert h.dtype == np.int8
    assert (abs(h) == 1).all()
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_array_equal(h @ (h.T @ v), n * v)


@pytest.mark.parametrize("n", [1, 2, 32, 56, 72, 96, 144, 448, 1024, 1536, 3584])
def test_the_fast_product_equals_the_dense_one(n):
    """Up to 1e-5 of the input, in float32."""
    x = inputs(2, 3, n)
    dense = np.asarray(x, np.float64) @ hadamard(n) / np.sqrt(n)
    assert np.linalg.norm(fast_hadamard(x) - dense) <= 1e-5 * np.linalg.norm(x)


@pytest.mark.parametrize("n", [96, 448, 1024])
def test_the_product_undoes_itself(n):
    x = inputs(5, n)
    np.testing.assert_allclose(fast_hadamard(fast_hadamard(x)), x, atol=1e-5)


@pytest.mark.parametrize("n", [384, 448, 1152, 1024, 3072, 4608])
def test_a_row_takes_far_fewer_products_than_the_matrix_has_entries(n):
    x, (a, b) = jnp.zeros((64, n)), map(len, factors(n))
    cost = jax.jit(fast_hadamard).lower(x).compile().cost_analysis()["flops"] / len(x)
    assert a * b == n
    assert cost <= 2 * n * (a + b + 1)  # a product and a sum, and one more for the scale
    assert a + b <= n / 8


@pytest.mark.parametrize(("n", "core"), [(64, 1), (2048, 1), (384, 12), (3072, 12), (1792, 28), (4608, 36)])
def test_what_is_common_to_all_channels_is_not_gathered_in_one(n, core):
    """Sylvester's matrix makes it one channel sqrt(n) times as large; here only core and TWO do so."""
    gathered = jnp.abs(fast_hadamard(jnp.ones(n))).max()
    assert gathered <= np.sqrt(2 * core) * (1 + 1e-5)


def test_the_product_is_its_own_gradient_compiled_or_not():
    x, c = inputs(4, 96), inputs(2, 4, 96)[1]
    gradient = jax.jit(jax.grad(lambda x: (fast_hadamard(x) * c).sum()))(x)
    np.testing.assert_allclose(gradient, fast_hadamard(c), atol=1e-6)


def test_half_precision_comes_back_in_its_dtype_and_is_rounded_once():
    x = inputs(4, 384).astype(jnp.bfloat16)
    y = fast_hadamard(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, fast_hadamard(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_matrix_is_made_once_and_cannot_be_written_to():
    assert hadamard(96) is hadamard(96)
    with pytest.raises(ValueError, match="read-only"):
        hadamard(96)[0, 0] = 0


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 50, 52, 97])
def test_a_size_that_has_none_is_named_with_those_there_are(n):
    with pytest.raises(ValueError, match=rf"size {n}: leave .* m 2\^k where m is 1, or p \+ 1"):
        hadamard(n)

import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.ridge import ridge, ridge_kernel
from sam2jq.quant.stats import Stats

K, N, RANK = 24, 7, 16
W = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)


def inputs(rank: int) -> np.ndarray:
    """400 inputs [400, K] with a mean, of which `rank` directions are excited."""
    rng = np.random.default_rng(1)
    return ((rng.standard_normal((400, rank)) + 1) @ rng.standard_normal((rank, K))).astype(np.float32)


def stats_of(x: np.ndarray) -> Stats:
    return Stats(jnp.asarray(x.mean(0)), jnp.asarray(x.min(0)), jnp.asarray(x.max(0)), jnp.asarray(x.T @ x / len(x)))


@pytest.mark.parametrize("lam", [1e-3, 0.1, 10])
def test_a_ridge_solves_its_normal_equations(lam):
    stats = stats_of(inputs(K))
    gram = np.asarray(stats.gram, np.float64)
    expected = np.linalg.solve(gram + lam * np.diag(gram).mean() * np.eye(K), gram @ W)
    np.testing.assert_allclose(
        ridge_kernel(W, stats, lam), expected, atol=1e-4
    )  # condition 1e4 * eps of float32, at most


def test_no_ridge_changes_nothing():
    np.testing.assert_array_equal(ridge_kernel(W, stats_of(inputs(K)), 0.0), W)


def test_a_slight_ridge_keeps_the_outputs_and_drops_what_no_input_excites():
    x = inputs(RANK)
    shrunk = np.asarray(ridge_kernel(W, stats_of(x), 1e-3))
    assert np.linalg.norm(x @ (shrunk - W)) < 1e-2 * np.linalg.norm(x @ W)
    unseen = np.linalg.svd(x)[2][RANK:]  # [K - RANK, K], directions in which no input lies
    assert np.linalg.norm(unseen @ W) > 1
    assert np.linalg.norm(unseen @ shrunk) < 1e-2  # what float32 leaves of a Gram matrix' zeros, over lambda
    assert np.linalg.norm(shrunk) < np.linalg.norm(W)


def test_the_ridge_of_a_convolution_is_that_of_its_matrix():
    stats = stats_of(inputs(K))
    kernel = W.reshape(2, 2, 6, N)
    np.testing.assert_array_equal(ridge_kernel(kernel, stats, 0.1), ridge_kernel(W, stats, 0.1).reshape(kernel.shape))
    changed = ridge(0.1, layers=["a"]).apply({"a": {"kernel": kernel}}, {"a": stats})
    np.testing.assert_array_equal(changed["a"]["kernel"], ridge_kernel(kernel, stats, 0.1))


@pytest.mark.parametrize("lam", [-0.1, np.nan])
def test_a_negative_ridge_is_refused(lam):
    with pytest.raises(ValueError, match="must not be negative, got"):
        ridge_kernel(W, stats_of(inputs(K)), lam)


@pytest.mark.parametrize("gram", [np.zeros((K, K)), np.full((K, K), np.nan)], ids=["zero", "nan"])
def test_a_gram_matrix_that_cannot_be_solved_is_refused(gram):
    with pytest.raises(ValueError, match="singular: then raise the ridge, now 0.1"):
        ridge_kernel(W, stats_of(inputs(K))._replace(gram=jnp.asarray(gram, jnp.float32)), 0.1)

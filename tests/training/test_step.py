import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam2jq.training.step import fit, init_state, make_train_step

PARAMS = {"w": np.ones((4, 2), np.float32)}


def loss(params, batch, key):
    x, y = batch
    noise = 0.01 * jax.random.normal(key, y.shape)
    value = jnp.square(x @ params["w"] + noise - y).mean()
    return value, {"noise": noise.mean()}


def batches(first):
    for i in range(first, 10**6):
        x = np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32)
        yield x, x[:, :2]


def run(folder, steps, every=5):
    optimizer = optax.adam(0.1)
    step = make_train_step(loss, optimizer)
    state = init_state(jax.tree.map(jnp.array, PARAMS), optimizer, seed=3)
    return list(fit(step, state, batches, steps, folder, every))


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path):
    """To the bit: batches, keys and the optimizer go on where they were."""
    run(tmp_path / "cut", 5)
    *_, (cut, _) = run(tmp_path / "cut", 20)
    *_, (replicated, _) = run(tmp_path / "whole", 20)
    assert int(cut.step) == int(replicated.step) == 20
    np.testing.assert_array_equal(cut.params["w"], replicated.params["w"])


def test_a_finished_run_is_not_trained_further(tmp_path):
    *_, (state, _) = run(tmp_path, 10)
    ((again, metrics),) = run(tmp_path, 10)
    assert metrics == {}
    np.testing.assert_array_equal(again.params["w"], state.params["w"])


def test_metrics_are_means_over_the_steps_between(tmp_path):
    rows = [metrics for _, metrics in run(tmp_path, 20)]
    assert len(rows) == 4
    assert set(rows[0]) == {"loss", "gradient", "noise"}
    assert rows[-1]["loss"] < rows[0]["loss"] / 2

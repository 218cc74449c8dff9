import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import cdpq, init_params
from sam2jq import config as settings
from sam2jq.data.reader import find_items
from sam2jq.distill import affinity, mask_distance, moment_losses
from sam2jq.models.sam2 import SAM2, Variant
from sam2jq.quant.fake_quant import bits_of, frozen, innermost, learning, student
from sam2jq.quant.recipe import layers
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, layer_name

SMALL = Variant(
    8, 1, (1, 1, 1, 1), (2,), (4, 4, 4, 2), features=32, memory_features=16, memory_layers=1, memory_hidden=32,
    image_size=64,
)  # fmt: skip
LARGE = replace(SMALL, embed_dim=16, stages=(1, 2, 1, 1), global_blocks=(3,))


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_layer_s_loss_sees_its_channels():
    """The original took the width for the channels: to permute them cost nothing there."""
    moments = jnp.stack([array(6), jnp.abs(array(6, seed=1))])[None]
    assert moment_losses({"a": moments}, {"a": moments})["a"] == 0
    assert moment_losses({"a": moments[..., ::-1]}, {"a": moments})["a"] > 0.1


def test_calls_of_a_layer_do_not_cancel():
    wanted = jnp.zeros((2, 2, 4)).at[:, 1].set(1)
    got = wanted.at[0, 0].set(1).at[1, 0].set(-1)
    assert moment_losses({"a": got}, {"a": wanted})["a"] == pytest.approx(1)


def test_layers_that_only_one_has_or_of_another_width_are_left_out():
    got = {"a": jnp.ones((1, 2, 4)), "b": jnp.ones((1, 2, 4)), "c": jnp.ones((1, 2, 4))}
    wanted = {"a": jnp.ones((1, 2, 4)), "b": jnp.ones((1, 2, 8))}
    assert set(moment_losses(got, wanted)) == {"a"}


def test_a_layer_s_loss_is_relative_to_its_scale():
    got, wanted = array(1, 2, 8), array(1, 2, 8, seed=1)
    loss = lambda factor: moment_losses(
        {"a": got.at[:, 1].set(jnp.square(got[:, 1])) * jnp.array([factor, factor**2])[:, None]},
        {"a": wanted.at[:, 1].set(jnp.square(wanted[:, 1])) * jnp.array([factor, factor**2])[:, None]},
    )["a"]
    np.testing.assert_allclose(loss(1e-3), loss(1.0), rtol=1e-3)


def test_affinity_does_not_depend_on_width_nor_rotation():
    x = array(1, 16, 16, 6)
    turn = jnp.linalg.qr(array(24, 24))[0][:6]
    np.testing.assert_allclose(affinity(x), affinity(x @ turn), atol=1e-5)
    assert jnp.abs(affinity(x) - affinity(x[:, ::-1])).max() > 0.1


def test_masks_are_at_no_distance_from_themselves_and_the_gradient_leads_there():
    wanted = 5 * array(3, 2, 8, 8)
    assert mask_distance(wanted, wanted) == pytest.approx(0, abs=1e-6)
    assert mask_distance(wanted + 1, wanted) > 1e-3
    np.testing.assert_allclose(jax.grad(mask_distance)(wanted, wanted), 0, atol=1e-6)


def settings_of(folder, **train):
    return settings.DistillConfig(
        teacher=settings.ModelConfig("nano"),
        student=settings.ModelConfig("nano"),
        data=settings.DataConfig("scenes:1", "scenes:2", 4, 2),
        quant=settings.StudentConfig(settings.WeightsConfig(dtype="sint4"), min_bits=2),
        distill=settings.LessonConfig(
            prompts=2, objects=1, window=2, layer_threshold=1e3, impact_threshold=1e3, impact_budget=1e6,
            candidates=5, affinity=1.0, cache_teacher=True,
        ),
        train=settings.TrainConfig(**{"epochs": 2, "batch_size": 2, "checkpoint_every": 1, "log_interval": 1,
                                      "learning_rate": 1e-2} | train),
        cache=settings.CacheConfig(str(folder / "cache")),
    )  # fmt: skip


def study(folder, config, tell=lambda row: None):
    """The best student of a run, and the one it began as."""
    small, large = SAM2(SMALL), SAM2(LARGE)
    params = init_params(small, 1)
    begin = student(params, dict.fromkeys(layers(params), QuantSpec(4)))
    teacher = cdpq.Teacher(large, init_params(large, 0))
    find = partial(find_items, seed=0)
    items = cdpq.Study(find("scenes:1", 4), find("scenes:2", 2))
    return cdpq.distill(small, begin, teacher, items, config, folder, tell), begin


class Killed(Exception):
    pass


def dies_at(step):
    def tell(row):
        if row["step"] == step and "train/loss" in row:
            raise Killed

    return tell


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    config = settings_of(folder)
    return *study(folder, config), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(params):
    return {layer_name(path): innermost(node).kernel for path, node in kernels(flatten(params)).items()}


def test_every_weight_that_may_learn_changes(whole):
    """In the original none did. The teacher is wider and deeper than its student here."""
    best, begin, _ = whole
    after, before = weights(best), weights(begin)
    same = [layer for layer in before if np.array_equal(after[layer], before[layer])]
    assert len(before) == len(learning(begin)) > 90
    assert same == []


def test_layers_lose_bits_and_every_decision_is_told(whole):
    best, _, rows = whole
    decisions = [one for row in rows for one in row.get("decisions", ())]
    assert len(decisions) == 5
    lowered = {one["layer"] for one in decisions if one["accepted"]}
    assert {layer for layer, bits in zip(learning(best), bits_of(best)) if bits == 3} == lowered
    (row,) = [row for row in rows if "bits" in row]
    assert row["quant/candidates"] == 5
    assert row["quant/updated_layers"] == len(lowered)
    widths = {innermost(node).spec.bits for node in kernels(flatten(frozen(best))).values()}
    assert widths == ({3, 4} if lowered else {4})


def test_a_killed_run_ends_as_one_that_was_not(whole, tmp_path):
    """To the bit; the second start reads the teacher's answers from disk."""
    config = settings_of(tmp_path)
    with pytest.raises(Killed):
        study(tmp_path, config, dies_at(2))
    best, _ = study(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, frozen(best), frozen(whole[0]))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == whole[2]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is nan at step \d, first in layer .*lower train.learning_rate"):
        study(tmp_path, settings_of(tmp_path, learning_rate=1e30, warmup_steps=0))

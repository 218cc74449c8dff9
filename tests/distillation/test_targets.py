from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import abstract_params, init_params
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig, DistillLossConfig
from sam2jq.distillation import losses
from sam2jq.distillation.bit_trials import bits_program
from sam2jq.distillation.losses import PARTS, distillation_loss, mask_distance, moment_losses
from sam2jq.distillation.target_cache import Teacher, target_program
from sam2jq.distillation.targets import DistillBatch, ModelOutputs, affinity, make_targets
from sam2jq.distillation.trainer import make_student_loss
from sam2jq.models.sam2 import SAM2, Variant
from sam2jq.ptq.recipe import layers
from sam2jq.quant.algorithms.fake_quant import fake_quant_layers, init_fake_quant
from sam2jq.quant.leaves import base_weight
from sam2jq.quant.spec import QuantSpec
from sam2jq.training.state import init_state
from sam2jq.training.step import sharded_step, train_step
from sam2jq.tree import flatten, kernels, layer_name

SMALL = Variant(
    8, 1, (1, 1, 1, 1), (2,), (4, 4, 4, 2), features=32, memory_features=16, memory_layers=1, memory_hidden=32,
    image_size=64,
)  # fmt: skip
CONFIG = ["--teacher.name", "nano", "--student.name", "nano", "--data.train", "scenes:1", "--data.val", "scenes:2"]
LARGE = replace(SMALL, embed_dim=16, stages=(1, 2, 1, 1), global_blocks=(3,))


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def losses_of(student, teacher):
    """{layer: []}: `moment_losses` of one example."""
    batched = lambda moments: {layer: tuple(x[None] for x in one) for layer, one in moments.items()}
    names, losses = moment_losses(batched(student), batched(teacher))
    return dict(zip(names, losses[0])) if names else {}


def test_a_layer_s_loss_sees_its_channels():
    """The original took the width for the channels: to permute them cost nothing there."""
    moments = array(6)[None], jnp.abs(array(6, seed=1))[None]
    assert losses_of({"a": moments}, {"a": moments})["a"] == 0
    assert losses_of({"a": tuple(x[:, ::-1] for x in moments)}, {"a": moments})["a"] > 0.1


def test_calls_of_a_layer_do_not_cancel():
    expected = jnp.zeros((2, 4)), jnp.ones((2, 4))
    got = jnp.array([[1.0], [-1.0]]) * jnp.ones((2, 4)), expected[1]
    assert losses_of({"a": got}, {"a": expected})["a"] == pytest.approx(1)


def test_layers_that_only_one_has_or_of_another_width_are_left_out():
    four, eight = (jnp.ones((1, 4)),) * 2, (jnp.ones((1, 8)),) * 2
    assert set(losses_of({"a": four, "b": four, "c": four}, {"a": four, "b": eight})) == {"a"}
    assert losses_of({"a": four}, {"b": four}) == {}


def test_a_layer_s_loss_is_relative_to_its_scale():
    scaled = lambda seed, factor: (factor * array(1, 8, seed=seed), jnp.square(factor * array(1, 8, seed=seed + 2)))
    loss = lambda factor: losses_of({"a": scaled(0, factor)}, {"a": scaled(1, factor)})["a"]
    np.testing.assert_allclose(loss(1e-3), loss(1.0), rtol=1e-3)


def test_the_losses_of_layers_of_any_width_are_those_of_each_layer_alone():
    moments = lambda seed: {
        name: (array(3, *shape, seed=seed), jnp.abs(array(3, *shape, seed=seed + 1)))
        for name, shape in {"a": (2, 5), "b": (1, 7), "c": (2, 3)}.items()
    }
    student, teacher = moments(0), moments(2)
    names, losses = moment_losses(student, teacher)
    assert names == ["a", "b", "c"]
    for name, got in zip(names, losses.T):
        (mean, variance), (mean_t, variance_t) = ([np.asarray(x) for x in of[name]] for of in (student, teacher))
        error = (mean - mean_t) ** 2 + (variance**0.5 - variance_t**0.5) ** 2
        np.testing.assert_allclose(got, error.sum((1, 2)) / (mean_t**2 + variance_t).sum((1, 2)), rtol=1e-5)


def test_affinity_does_not_depend_on_width_nor_rotation():
    x = array(1, 16, 16, 6)
    turn = jnp.linalg.qr(array(24, 24))[0][:6]
    np.testing.assert_allclose(affinity(x), affinity(x @ turn), atol=1e-5)
    assert jnp.abs(affinity(x) - affinity(x[:, ::-1])).max() > 0.1


def test_masks_are_at_no_distance_from_themselves_and_the_gradient_leads_there():
    expected = 5 * array(3, 2, 8, 8)
    assert mask_distance(expected, expected) == pytest.approx(0, abs=1e-6)
    assert mask_distance(expected + 1, expected) > 1e-3
    np.testing.assert_allclose(jax.grad(mask_distance)(expected, expected), 0, atol=1e-6)


def test_targets_are_computed_in_the_teacher_s_dtype_and_are_float32():
    small = SAM2(SMALL)
    run = target_program(Teacher(small, {}, "bfloat16"), DistillLossConfig(prompts=2, objects=1), 0)
    args = abstract_params(small), jnp.zeros((1, 1, 64, 64, 3)), jnp.zeros(1, jnp.uint32)
    traced = run.trace(*args)
    assert "bf16[" in str(traced.jaxpr)
    assert {leaf.dtype for leaf in jax.tree.leaves(traced.out_info)} == {np.dtype("float32"), np.dtype("int32")}


@pytest.mark.slow  # compiles a whole SAM 2 twice
def test_a_teacher_in_bfloat16_gives_slightly_different_targets_in_float32():
    small, frames = SAM2(SMALL), np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    config = DistillLossConfig(prompts=2, objects=1)
    teachers = (Teacher(small, init_params(small, 0), dtype) for dtype in ("float32", "bfloat16"))
    full, low = (
        target_program(teacher, config, 0)(teacher.params, frames[None], np.zeros(1, np.uint32)) for teacher in teachers
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {np.dtype("float32"), np.dtype("int32")}
    np.testing.assert_array_equal(low.frames, full.frames)
    for got, expected in zip(low.outputs.features, full.outputs.features):
        error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
        assert 1e-4 < error < 0.05  # bfloat16 has 8 bits of mantissa: 0.4 % a rounding, over tens of layers


def test_the_training_step_and_the_evaluation_of_bits_trace_the_loss_once(monkeypatch):
    ones = lambda *shape: jnp.ones(shape, jnp.float32)
    tracked = ones(1, 4, 2, 2), ones(1, 4), ones(1, 1)
    outputs = ModelOutputs([ones(1, 2, 2, 3)], ones(3, 4, 2, 2), ones(3, 4), ones(3, 1), tracked, ones(1, 3), None,
                           {"a": (ones(1, 2), ones(1, 2))})  # fmt: skip
    traced = []

    def forward(model, params, frames, prompts, capture):
        traced.append(1)
        return jax.tree.map(lambda x: x * params["a"]["kernel"].mean(), outputs)

    monkeypatch.setattr(losses, "forward_with_capture", forward)
    config = loader.load(None, CONFIG, DistillConfig)
    batch = DistillBatch(ones(2, 1, 4, 4, 3), None, jax.tree.map(lambda x: jnp.stack([x, x]), outputs))
    student = init_fake_quant({"a": {"kernel": ones(4, 2), "bias": ones(2)}}, {"a": QuantSpec(4)})
    loss = distillation_loss(None, dict.fromkeys(PARTS, 1.0))
    bits_program(loss).trace(student, ones(jax.device_count(), 1), batch)
    trained, optimizer = make_student_loss(student, loss, config, 20)
    sharded_step(train_step(trained, optimizer)).trace(init_state(student, optimizer, 0), batch)
    assert len(traced) == 1


@pytest.mark.slow  # compiles the gradient of a whole SAM 2
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_weight_that_may_learn_gets_a_gradient_from_a_teacher_of_another_size(dtype):
    """In the original none did; there a student had to be as wide as its teacher."""
    small, large = SAM2(SMALL), SAM2(LARGE)
    params = init_params(small, 1)
    student = init_fake_quant(params, dict.fromkeys(layers(params), QuantSpec(4)))
    ask = partial(make_targets, large, num_prompts=2, num_objects=1)
    shapes = jax.eval_shape(ask, init_params(large, 0), jnp.zeros((2, 64, 64, 3)), jax.random.key(0))
    rng = np.random.default_rng(0)  # random arrays instead of model outputs: no model is compiled
    batch = jax.tree.map(lambda leaf: np.abs(rng.normal(size=(1, *leaf.shape))).astype(leaf.dtype), shapes)
    loss = distillation_loss(small, dict.fromkeys(PARTS, 1.0), dtype)
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(student, batch)
    sizes = {
        layer_name(path): float(jnp.abs(base_weight(node).kernel).max())
        for path, node in kernels(flatten(grads)).items()
    }
    assert len(sizes) == len(fake_quant_layers(student)) > 90
    assert [layer for layer, size in sizes.items() if not size > 0] == []
    assert set(metrics["parts"]) == set(PARTS)
    assert all(np.isfinite(value) and value > 0 for value in metrics["parts"].values())
    by_layer = dict(zip(fake_quant_layers(student), metrics["layers"]))
    assert by_layer["image_encoder.trunk.blocks.0.attn.qkv"] == metrics["parts"]["features"]  # of another width
    assert by_layer["sam_mask_decoder.transformer.layers.0.self_attn.q_proj"] != metrics["parts"]["features"]

"""The distillation loss: distances between the outputs of a student and of its teacher.

Letters as in targets.py; h x h mask logits, C channels.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam2jq.distillation.targets import DistillBatch, ModelOutputs, forward_with_capture
from sam2jq.models.sam2 import SAM2
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.fake_quant import fake_quant_layers, materialize_fake_quant
from sam2jq.training.losses import soft_dice

Array = jax.Array
Moments = tuple[Array, Array]
PARTS = ("layers", "affinity", "features", "masks", "ious", "memory")


def relative_square_error(student: Array, teacher: Array) -> Array:
    """[]: |student - teacher|^2 / |teacher|^2."""
    return jnp.square(student - teacher).sum() / (jnp.square(teacher).sum() + 1e-12)


def moment_losses(student: Mapping[str, Moments], teacher: Mapping[str, Moments]) -> tuple[list[str], Array]:
    """The names of L layers, and [B, L]: the relative square error of mean and deviation of each layer's outputs.

    student, teacher: {layer: mean and variance, each [B, calls, C]}. The error is relative to the mean square of the
    teacher's outputs. Layers that only one of the two has, or that differ in calls or width, are left out.
    """
    shared = [layer for layer in student if layer in teacher and student[layer][0].shape == teacher[layer][0].shape]
    if not shared:
        return [], jnp.zeros((0, 0))
    # all layers as one array, since operations on each layer alone are hundreds of kernels to compile
    row = lambda moment: moment.reshape(len(moment), -1)  # [B, calls * C]
    joined = lambda moments, i: jnp.concatenate([row(moments[layer][i]) for layer in shared], 1)
    (mean, variance), (mean_t, variance_t) = ((joined(of, 0), joined(of, 1)) for of in (student, teacher))
    deviation, deviation_t = jnp.sqrt(variance + 1e-12), jnp.sqrt(variance_t + 1e-12)
    energy = jnp.square(mean_t) + jnp.square(deviation_t)
    error = jnp.square(mean - mean_t) + jnp.square(deviation - deviation_t)
    layers = np.repeat(np.arange(len(shared)), [student[layer][0][0].size for layer in shared])
    by_layer = lambda x: jax.ops.segment_sum(x.T, layers, len(shared), indices_are_sorted=True).T
    return shared, by_layer(error) / (by_layer(energy) + 1e-12)


def mask_distance(student: Array, teacher: Array) -> Array:
    """[]: the mean distance of mask logits [..., h, h]; 0 where they are equal.

    It is the Kullback-Leibler divergence of the pixels' object probabilities plus `soft_dice` of these.
    """
    target = jax.nn.sigmoid(teacher)
    cross_entropy = optax.sigmoid_binary_cross_entropy
    divergence = cross_entropy(student, target) - cross_entropy(teacher, target)
    return divergence.mean() + soft_dice(jax.nn.sigmoid(student), target).mean()


def score_distance(student: Array, teacher: Array) -> Array:
    """[]: the mean square difference of the probabilities of object score logits."""
    return jnp.square(jax.nn.sigmoid(student) - jax.nn.sigmoid(teacher)).mean()


def affinity_distance(student: Array | None, teacher: Array | None) -> Array:
    """[]: the mean square difference of affinities; 0 where they were not captured or the stages differ in number."""
    if student is None or student.shape != teacher.shape:
        return jnp.float32(0)
    return jnp.square(student - teacher).mean()


def distances(student: ModelOutputs, teacher: ModelOutputs) -> dict[str, Array]:
    """{part: []} for each of PARTS but "layers", which is the mean of `moment_losses`."""
    features = sum(relative_square_error(a, b) for a, b in zip(student.features, teacher.features))
    (masks, ious, scores), (masks_t, ious_t, scores_t) = student.tracked, teacher.tracked
    return {
        "affinity": affinity_distance(student.affinity, teacher.affinity),
        "features": features / len(student.features),
        "masks": mask_distance(student.masks, teacher.masks),
        "ious": jnp.square(student.ious - teacher.ious).mean() + score_distance(student.scores, teacher.scores),
        "memory": mask_distance(masks, masks_t)
        + jnp.square(ious - ious_t).mean()
        + score_distance(scores, scores_t)
        + relative_square_error(student.pointers, teacher.pointers),
    }


def distillation_loss(model: SAM2, weights: Mapping[str, float], dtype=jnp.float32, capture: bool = True) -> Callable:
    """loss(params, batch [B, ...]) -> the mean of sum(weights * parts), and its {"parts", "layers"}.

    weights: {part of PARTS: factor}; dtype: of the student's computation. Without `capture` the parts "layers" and
    "affinity" are 0, and layers may run in chunks. "layers" [L]: the loss of each of the L fake-quantized layers, as
    `moment_losses`; that of the feature maps for a layer without a counterpart in the teacher.
    """

    def example_distances(params: dict, example: DistillBatch):
        outputs = forward_with_capture(model, params, example.frames.astype(dtype), example.prompts, capture)
        return distances(outputs, example.outputs), outputs.moments

    @jax.jit  # so that the training step and the evaluation of bits trace it once
    def loss(params: dict, batch: DistillBatch):
        plain = materialize_weights(materialize_fake_quant(params))
        parts, moments = jax.vmap(partial(example_distances, plain))(batch)
        parts = jax.tree.map(jnp.mean, parts)
        names, by_layer = moment_losses(moments, batch.outputs.moments)
        losses = by_layer.mean(0) if names else jnp.zeros(1)
        parts["layers"] = losses.mean()
        index = [names.index(name) if name in names else -1 for name in fake_quant_layers(params)]
        layers = jnp.append(losses, parts["features"])[np.array(index, int)]
        return sum(weights[part] * parts[part] for part in PARTS), {"parts": parts, "layers": layers}

    return loss

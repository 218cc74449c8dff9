"""Mask losses for training and distillation (SAM 2, arXiv 2408.00714, appendix D.2).

Letters: P prompts, M masks a prompt, H x W pixels. Masks are [..., H, W]; logits are before the sigmoid.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def focal(logits: Array, targets: Array, gamma: float = 2.0, alpha: float = 0.25) -> Array:
    """[...]: the focal loss of masks [..., H, W], averaged over pixels (arXiv 1708.02002).

    targets: the share of each pixel that the object covers, 0..1. |p - target| replaces the paper's 1 - p_t, which it
    equals for targets of 0 and 1.
    """
    modulation = jnp.abs(jax.nn.sigmoid(logits) - targets) ** gamma
    class_weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (class_weight * modulation * optax.sigmoid_binary_cross_entropy(logits, targets)).mean((-2, -1))


def dice(logits: Array, targets: Array) -> Array:
    """[...]: 1 - the Dice coefficient of masks [..., H, W], smoothed by one pixel."""
    p = jax.nn.sigmoid(logits)
    return 1 - (2 * (p * targets).sum((-2, -1)) + 1) / ((p + targets).sum((-2, -1)) + 1)


def soft_dice(p: Array, q: Array) -> Array:
    """[...]: 1 - the Dice coefficient with squared norms of masks in 0..1 [..., H, W]; 0 where p == q, also for masks
    that are not binary."""
    intersection = (p * q).sum((-2, -1))
    return 1 - (2 * intersection + 1) / (jnp.square(p).sum((-2, -1)) + jnp.square(q).sum((-2, -1)) + 1)


def soft_iou(logits: Array, targets: Array) -> Array:
    """[...]: the IoU of `logits` > 0 with `targets` > 1/2 for masks [..., H, W]; 1 where both are empty."""
    predicted, target = logits > 0, targets > 0.5
    union = (predicted | target).sum((-2, -1))
    return jnp.where(union > 0, (predicted & target).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)


def focal_dice(logits: Array, targets: Array) -> Array:
    """[...]: focal and dice loss of masks [..., H, W], weighted 20 : 1 as in SAM 2, with alpha = 1/2.

    SAM 2's alpha of 1/4 makes a model that is still uncertain predict masks that are too small.
    """
    return 40 * focal(logits, targets, alpha=0.5) + dice(logits, targets)


def balanced_dice(logits: Array, targets: Array) -> Array:
    """[...]: cross-entropy of masks [..., H, W], half of it from the object's pixels whatever their number, + dice.

    It is for the start of training, where 20 focal + dice has a local minimum at the empty mask.
    """
    entropy = optax.sigmoid_binary_cross_entropy(logits, targets)
    mean_over = lambda region: (entropy * region).sum((-2, -1)) / (region.sum((-2, -1)) + 1)
    return mean_over(targets) + mean_over(1 - targets) + dice(logits, targets)


def mask_loss(masks: Array, ious: Array, targets: Array, shape: Callable = focal_dice) -> Array:
    """[P]: the loss of mask logits [P, M, H, W] and estimated IoUs [P, M] for targets [P, H, W].

    Of the M masks only the one with the smallest `shape` loss gets a gradient from it (SAM, arXiv 2304.02643, section
    3). All M estimated IoUs are trained towards the actual ones.
    """
    targets = targets[:, None]
    iou_errors = jnp.abs(ious - jax.lax.stop_gradient(soft_iou(masks, targets)))
    return shape(masks, targets).min(-1) + iou_errors.mean(-1)

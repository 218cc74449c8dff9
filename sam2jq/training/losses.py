"""What training and distillation minimize: the mask losses of SAM 2 (arXiv 2408.00714, appendix D.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def focal(logits: Array, targets: Array, gamma: float = 2.0, alpha: float = 0.25) -> Array:
    """[...] of masks [..., H, W]: cross-entropy weighed by how wrong a pixel is (arXiv 1708.02002).

    targets: what part of each pixel is object, 0..1; for parts between, |p - target| is how wrong it is.
    """
    wrong = jnp.abs(jax.nn.sigmoid(logits) - targets) ** gamma
    side = alpha * targets + (1 - alpha) * (1 - targets)
    return (side * wrong * optax.sigmoid_binary_cross_entropy(logits, targets)).mean((-2, -1))


def dice(logits: Array, targets: Array) -> Array:
    """[...] of masks [..., H, W]: 1 - the Dice coefficient, smoothed by one pixel."""
    p = jax.nn.sigmoid(logits)
    return 1 - (2 * (p * targets).sum((-2, -1)) + 1) / ((p + targets).sum((-2, -1)) + 1)


def soft_dice(p: Array, q: Array) -> Array:
    """[...] of masks in 0..1 [..., H, W]: 1 - a Dice coefficient that is 1 where p equals q, be they 0 and 1 or not."""
    both = (p * q).sum((-2, -1))
    return 1 - (2 * both + 1) / (jnp.square(p).sum((-2, -1)) + jnp.square(q).sum((-2, -1)) + 1)


def soft_iou(logits: Array, targets: Array) -> Array:
    """[...] of masks [..., H, W]: the IoU of `logits` > 0 with `targets` > 1/2; 1 where both are empty."""
    got, wanted = logits > 0, targets > 0.5
    union = (got | wanted).sum((-2, -1))
    return jnp.where(union > 0, (got & wanted).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)


def focal_dice(logits: Array, targets: Array) -> Array:
    """[...] of masks [..., H, W]: focal and dice as SAM 2 weighs them, 20 : 1, but object and background alike.

    SAM 2's alpha of 1/4 makes a model that is not sure yet draw its objects too small.
    """
    return 40 * focal(logits, targets, alpha=0.5) + dice(logits, targets)


def balanced_dice(logits: Array, targets: Array) -> Array:
    """[...] of masks [..., H, W]: cross-entropy, half of it for the object however small it is, + dice.

    For the start of training, where 20 focal + dice finds that an empty mask is a cheap answer to every prompt.
    """
    entropy = optax.sigmoid_binary_cross_entropy(logits, targets)
    share = lambda part: (entropy * part).sum((-2, -1)) / (part.sum((-2, -1)) + 1)
    return share(targets) + share(1 - targets) + dice(logits, targets)


def mask_loss(masks: Array, ious: Array, targets: Array, shape: Callable = focal_dice) -> Array:
    """[P] of a prompt's mask logits [P, M, H, W], estimated IoUs [P, M] and target [P, H, W].

    Of M masks only the one with the least loss learns its shape (SAM, arXiv 2304.02643, section 3); all M learn to
    tell their IoU.
    """
    targets = targets[:, None]
    told = jnp.abs(ious - jax.lax.stop_gradient(soft_iou(masks, targets)))
    return shape(masks, targets).min(-1) + told.mean(-1)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.training.losses import balanced_dice, dice, focal, focal_dice, mask_loss, soft_iou

TARGET = np.zeros((8, 8), np.float32)
TARGET[2:6, 1:5] = 1
LOGITS = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)


def test_focal_is_the_papers_formula():
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    p_t, alpha = np.where(TARGET, p, 1 - p), np.where(TARGET, 0.25, 0.75)
    expected = (-alpha * (1 - p_t) ** 2 * np.log(p_t)).mean((1, 2))
    np.testing.assert_allclose(focal(LOGITS, TARGET), expected, rtol=1e-5)


def test_dice_of_the_right_mask_is_nothing_and_of_the_opposite_one_all():
    sure = 50 * (2 * TARGET - 1)
    assert float(dice(sure, TARGET)) == pytest.approx(0, abs=1e-6)
    assert float(dice(-sure, TARGET)) == pytest.approx(1 - 1 / 65)  # smoothed by one pixel


def test_iou_of_logits_and_coverage():
    logits = np.where(TARGET, 1, -1)
    assert float(soft_iou(logits, TARGET)) == 1
    assert float(soft_iou(np.roll(logits, 2, 1), TARGET)) == pytest.approx(8 / 24)
    assert float(soft_iou(-np.ones((8, 8)), np.zeros((8, 8)))) == 1


@pytest.mark.parametrize("shape", [focal_dice, balanced_dice])
def test_only_the_best_mask_learns_its_shape(shape):
    grads = jax.grad(lambda masks: mask_loss(masks, jnp.zeros((1, 3)), TARGET[None], shape).sum())(LOGITS[None])
    best = int(shape(LOGITS, TARGET).argmin())
    assert [bool(np.any(g)) for g in grads[0]] == [i == best for i in range(3)]


def test_every_mask_learns_to_tell_its_iou():
    ious = soft_iou(LOGITS, TARGET)[None]
    grads = jax.grad(lambda estimated: mask_loss(LOGITS[None], estimated, TARGET[None]).sum())(ious + 0.1)
    np.testing.assert_allclose(grads, 1 / 3, rtol=1e-6)


def test_an_empty_mask_is_cheap_to_focal_dice_and_dear_to_balanced_dice():
    """Why training starts with the latter: a guess of the right region must beat no mask. With SAM 2's alpha."""
    focal_dice = lambda logits, targets: 20 * focal(logits, targets) + dice(logits, targets)
    empty, guess = np.full((64, 64), -4.0), np.full((64, 64), -4.0)
    target = np.zeros((64, 64), np.float32)
    target[10:16, 10:16] = 1
    guess[5:25, 5:25] = 0.5
    assert focal_dice(empty, target) < focal_dice(guess, target)
    assert balanced_dice(guess, target) < balanced_dice(empty, target)

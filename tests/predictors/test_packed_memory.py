"""Memories in 8 and 4 bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import VideoPredictor
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.errors import UserError
from sam2jq.predictors.packed_memory import check_memory_bits, pack_tokens, round_tokens, unpack_tokens
from tests.conftest import relative, twin

STEP = {8: 127, 4: 7}  # codes on each side of 0


def tokens(seed: int, channels: int = 64) -> np.ndarray:
    """Normal numbers with an outlier channel, and a token of zeros."""
    x = np.random.default_rng(seed).standard_normal((3, 5, channels)).astype(np.float32)
    x[..., 3] *= 20
    x[0, 0] = 0
    return x


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [16, 64])
def test_the_error_of_a_token_is_at_most_half_a_step(bits, channels):
    """|x_hat - x| <= sqrt(C) step / 2, the rotation keeps it; the scale is rounded to bfloat16, by 1/256."""
    x = tokens(0, channels)
    packed = pack_tokens(x, bits)
    assert (packed.dtype, packed.shape) == (np.uint8, (3, 5, channels * bits // 8 + 2))
    found = unpack_tokens(packed, channels)
    rotated = np.abs(np.linalg.norm(x, axis=-1))  # no coordinate is larger
    limit = channels**0.5 * rotated / STEP[bits] * (0.5 + STEP[bits] / 256)
    assert (np.linalg.norm(found - x, axis=-1) <= limit + 1e-6).all()
    assert (found[0, 0] == 0).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.007), (4, 0.13)])
def test_a_token_is_rotated_where_it_helps(bits, limit):
    """Without the rotation the step is that of the outlier: at 4 bits most other channels are rounded to 0. A token
    with one channel alone is exact without it."""
    x = tokens(1)[1:]
    found = unpack_tokens(pack_tokens(x, bits), 64)
    *_, error = round_tokens(x, bits)
    assert relative(found, x) < limit
    assert np.linalg.norm(found - x) < 0.5 * np.sqrt(error.sum())
    alone = np.zeros((1, 64), np.float32)
    alone[0, 5] = 0.5 * STEP[bits]
    np.testing.assert_array_equal(unpack_tokens(pack_tokens(alone, bits), 64), alone)


def test_floats_are_not_unpacked():
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert unpack_tokens(x, 64) is x


@pytest.mark.parametrize(("bits", "most"), [(8, 0.52), (4, 0.27)])
def test_bytes_of_a_frame(bits, most):
    """Of an object's memory and pointer in tiny at 1024, against bfloat16; 4 bits are a quarter and the scales."""
    plain = jax.ShapeDtypeStruct((1, 64, 64, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.float32)
    packed = [jax.eval_shape(partial(pack_tokens, bits=bits), part) for part in plain]
    size = lambda parts: sum(part.size * part.dtype.itemsize for part in parts)
    assert size(plain) == 525_312
    assert size(packed) == {8: 270_594, 4: 139_394}[bits] < most * size(plain)


def test_another_number_of_bits_is_refused():
    for bits in (2, 16, "8"):
        with pytest.raises(UserError, match=f"memory_bits {bits!r}: it must be 8, 4 or None"):
            check_memory_bits(bits)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.1)])
def test_masks_stay_near_those_of_full_memories(bits, limit):
    weights, masks, sizes = twin("nano", "2.1", 64), {}, {}
    for each in (None, bits):
        predictor = VideoPredictor(weights.model, weights.params, memory_bits=each)
        state = predictor.init_state(draw_clip(4, 6).frames)
        for obj in (1, 2, 3):
            predictor.add_new_points_or_box(state, 0, obj, points=[[60 * obj, 80]], labels=[1])
        masks[each] = np.stack([logits for _, _, logits in predictor.propagate_in_video(state)])
        predictor.add_new_points_or_box(state, 4, 1, points=[[80, 90]], labels=[1])  # conditioned on stored memories
        stored = [out for obj in state.objects.values() for out in (*obj.cond.values(), *obj.non_cond.values())]
        sizes[each] = sum(out.memory.nbytes + out.pointer.nbytes for out in stored)
    assert len(stored) == 18
    assert sizes[bits] == 18 * (16 * (16 * bits // 8 + 2) + 64 * bits // 8 + 2) < sizes[None]
    assert 0 < relative(masks[bits], masks[None]) < limit

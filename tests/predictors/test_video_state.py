"""The stored outputs of a clip, without any model."""

import numpy as np
import pytest

from sam2jq.predictors.bank_arrays import EMPTY, FrameOutput
from sam2jq.predictors.video_state import ObjectState, closest_cond_frames, memory_bank


def output(value: float) -> FrameOutput:
    """An output whose memory and pointer hold `value`."""
    full = lambda *shape: np.full(shape, value, np.float32)
    return FrameOutput(full(1, 8, 8), full(1, 4), full(1, 1), full(1, 2, 2, 3))


def outputs(frames) -> dict[int, FrameOutput]:
    return {frame: output(frame) for frame in frames}


@pytest.mark.parametrize("count", [-1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_the_closest_conditioning_frames_are_those_of_sam2(seed, count):
    from sam2.modeling.sam2_utils import select_closest_cond_frames

    rng = np.random.default_rng(seed)
    cond = dict.fromkeys(rng.permutation(30)[: rng.integers(1, 8)].tolist(), output(0))
    for frame in range(30):
        assert closest_cond_frames(cond, frame, count) == select_closest_cond_frames(frame, cond, count)[0]


def test_a_conditioning_frame_too_many_is_a_non_conditioning_one_if_it_is_near():
    obj = ObjectState(cond=outputs([2, 7, 9, 30]), non_cond=outputs([8, 6]))
    bank = memory_bank([obj], 10, False, max_cond=2)
    assert bank.cond_frames.tolist() == [[9, 30]]
    assert bank.cond_memory[0, :, 0, 0, 0].tolist() == [9, 30]
    assert np.flatnonzero(bank.non_cond_valid[0]).tolist() == [1, 2, 3, 7]  # frames 8, 7, 6 and 2
    assert bank.non_cond_memory[0, :, 0, 0, 0].tolist() == [0, 8, 7, 6, 0, 0]
    assert bank.non_cond_pointer[0, [1, 2, 3, 7], 0].tolist() == [8, 7, 6, 2]
    assert memory_bank([obj], 10, False).cond_frames.tolist() == [[2, 7, 9, 30]]
    assert memory_bank([ObjectState(cond=outputs([2, 4, 5]))], 10, False).cond_frames.tolist() == [[2, 4, 5, EMPTY]]


def test_memories_in_seven_frames_around_a_prompt_are_cleared():
    obj = ObjectState(non_cond=outputs(range(30)))
    obj.clear_non_cond_around(10)
    assert list(obj.non_cond) == [0, 1, 2, *range(18, 30)]

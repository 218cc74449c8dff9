"""The stored outputs of a clip, without any model."""

import numpy as np
import pytest

from sam2jq.errors import UserError
from sam2jq.files import WriteError
from sam2jq.predictors.bank_arrays import EMPTY, FrameOutput
from sam2jq.predictors.spilled_outputs import IN_MEMORY, SpilledOutputs
from sam2jq.predictors.video_state import ObjectState, closest_cond_frames, memory_bank
from tests.conftest import file_limit

from .plain_steps import PlainVideo, output


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


@pytest.mark.parametrize("seed", range(5))
def test_outputs_in_a_file_are_a_dict(seed):
    """After any order of writing, overwriting and deleting; the file is not larger than its entries ever were."""
    rng = np.random.default_rng(seed)
    spilled, expected, most = SpilledOutputs(), {}, 0
    for value in range(600):
        frame = int(rng.integers(100))
        if rng.random() < 0.3 and frame in expected:
            del spilled[frame], expected[frame]
        else:
            spilled[frame] = expected[frame] = output(value)
        most = max(most, len(expected))
    assert set(spilled) == set(expected)
    assert len(spilled) == len(expected) > IN_MEMORY
    assert not any(frame in spilled or spilled.get(frame) for frame in range(100) if frame not in expected)
    for frame, out in expected.items():
        for got, part in zip(spilled[frame], out):
            np.testing.assert_array_equal(got, part)
            assert got.dtype == part.dtype
    size = sum(part.nbytes for part in output(0))
    assert spilled._file._file.seek(0, 2) <= (most - IN_MEMORY + 1) * size


def test_a_full_disk_is_one_line():
    def fill():
        spilled = SpilledOutputs()
        for frame in range(100):
            spilled[frame] = output(frame)

    message = r"^cannot write outputs of earlier frames to [^:]*: File too large; set TMPDIR"
    with pytest.raises(WriteError, match=message), file_limit(5000):
        fill()


CLIP = np.random.default_rng(0).integers(0, 255, (120, 6, 8, 3), np.uint8)


def tracked(state, predictor, **options) -> list[np.ndarray]:
    return [masks for _, _, masks in predictor.propagate_in_video(state, **options)]


@pytest.mark.parametrize("reverse", [False, True])
def test_dropped_outputs_change_no_mask(reverse):
    """And 32 or 16 outputs are in memory at the end, of 120."""
    predictor, start = PlainVideo(), 119 if reverse else 0
    for keep in (True, False):
        state = predictor.init_state(CLIP, keep_outputs=keep)
        predictor.add_new_points_or_box(state, start, 1, points=[[3, 3]], labels=[1])
        masks = tracked(state, predictor, reverse=reverse)
        if keep:
            expected = masks
    np.testing.assert_array_equal(masks, expected)
    outputs = state.objects[1].non_cond
    assert len(outputs) == 16
    assert sum(out.memory is not None for out in outputs.values()) == 7
    assert len(state.objects[1].reverse) == 1


def test_a_state_that_drops_outputs_refuses_what_needs_them():
    predictor = PlainVideo()
    state = predictor.init_state(CLIP, keep_outputs=False)
    click = {"obj_id": 1, "points": [[3, 3]], "labels": [1]}
    predictor.add_new_points_or_box(state, 5, **click)
    next(predictor.propagate_in_video(state))
    with pytest.raises(UserError, match="this state drops outputs and was tracked: call init_state again"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(UserError, match="frame 4: this state drops outputs, so that only the frame tracked last, 5,"):
        predictor.add_new_points_or_box(state, 4, **click)
    predictor.add_new_points_or_box(state, 5, obj_id=2, points=[[1, 1]], labels=[1])  # the frame tracked last
    assert predictor.remove_object(state, 2)[1][0][0] == 5
    predictor.reset_state(state)
    predictor.add_new_points_or_box(state, 4, **click)
    predictor.add_new_points_or_box(state, 4, obj_id=2, points=[[1, 1]], labels=[1])
    assert len(tracked(state, predictor)) == 116
    assert predictor.remove_object(state, 2) == ([1], [])  # the masks of frame 4 were dropped

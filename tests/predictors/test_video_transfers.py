"""What goes to the device while a clip is tracked, and when results are waited for."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.data.images import MEAN, STD, normalize
from sam2jq.data.video import Video
from sam2jq.errors import UserError
from sam2jq.predictors import prompted_video
from sam2jq.predictors.video_steps import normalize_frame

from .plain_steps import PlainVideo

CLIP = np.random.default_rng(0).integers(0, 255, (40, 6, 8, 3), np.uint8)
CLICK = {"points": [[3, 3]], "labels": [1]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frame_is_normalized_on_the_device_to_the_bit(dtype):
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    got = normalize_frame(values, MEAN, STD, np.dtype(dtype))
    np.testing.assert_array_equal(got, normalize(values.astype(np.float32) / 255).astype(dtype))


class Ahead(PlainVideo):
    """Notes the frames that are encoded and the results that are waited for."""

    encodes_ahead = True

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def encode_frame(self, image):
        self.calls.append("encode")
        return super().encode_frame(image)

    def to_host(self, arrays):
        self.calls.append("wait")
        return super().to_host(arrays)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_next_frame_is_encoded_before_results_are_waited_for(reverse):
    results, start = [], 5 if reverse else 0
    for predictor in (PlainVideo(), Ahead()):
        state = predictor.init_state(CLIP[:6])
        predictor.add_new_points_or_box(state, start, 1, **CLICK)
        frames = predictor.propagate_in_video(state, reverse=reverse)
        results.append([masks for *_, masks in frames])
    np.testing.assert_array_equal(*results)
    in_order = [call for call, before in zip(predictor.calls, [None, *predictor.calls]) if call != before]
    assert in_order == ["encode", "wait"] * 6  # the clicked frame is encoded once


def test_a_frame_that_cannot_be_read_stops_the_clip_when_it_is_due():
    def read(index):
        if index == 3:
            raise UserError("frame 3 is broken")
        return CLIP[index]

    predictor, found = Ahead(), []
    state = predictor.init_state(Video([str(i) for i in range(6)], (6, 8), read))
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    with pytest.raises(UserError, match="frame 3 is broken"):
        found.extend(frame for frame, *_ in predictor.propagate_in_video(state))
    assert found == [0, 1, 2]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_bank_is_made_again_only_where_other_conditioning_frames_are_used(monkeypatch, reverse):
    """Of five, two are used: those of a frame change at each of the five, and halfway between the nearest two."""
    make, made, results = prompted_video.memory_bank, [], []
    monkeypatch.setattr(prompted_video, "memory_bank", lambda *args: (made.append(args[1]), make(*args))[1])
    for same in (prompted_video.same_cond_frames, lambda *_: False):
        monkeypatch.setattr(prompted_video, "same_cond_frames", same)
        predictor = PlainVideo(everywhere=True, max_cond=2)
        state = predictor.init_state(CLIP)
        for frame in (2, 5, 11, 19, 30):
            predictor.add_new_points_or_box(state, frame, 1, **CLICK)
        made.clear()
        tracked = predictor.propagate_in_video(state, 35 if reverse else 2, reverse=reverse)
        results.append(([masks for *_, masks in tracked], len(made)))
    (masks, banks), (expected, frames) = results
    np.testing.assert_array_equal(masks, expected)
    assert len(expected) == frames > 3 * banks

"""Options that choose or clear memories: the results of the original."""

from functools import partial

import numpy as np
import pytest

from sam2jq import VideoPredictor

from .pairs import both, compare, predictors

FINE = 1e-4  # at 64 pixels the memories of random weights change logits by 1e-3


def largest_difference(rows, others) -> float:
    return max(np.abs(masks - other).max() for (*_, masks), (*_, other) in zip(rows, others))


def with_options(monkeypatch, clear=None, **options):
    """The original and ours at 64 pixels with `options`; clear: what the original calls around prompted frames.

    The installed sam2 lacks that method: with clear_non_cond_mem_around_input it raises AttributeError.
    """
    original, ours = predictors("2.1", "nano", 64)
    for name, value in options.items():
        monkeypatch.setattr(original, name, value, raising=name != "clear_non_cond_mem_for_multi_obj")
    if clear:
        monkeypatch.setattr(original, "_clear_obj_non_cond_mem_around_input", partial(clear, original), raising=False)
    return original, VideoPredictor(ours.model, ours.params, **options)


def clear_all(original, state, frame, obj):
    """What the older predictor calls, with one memory for all objects, and still a method of the newer one."""
    original._clear_non_cond_mem_around_input(state, frame)


def clear_own(original, state, frame, obj):
    for near in range(frame - original.num_maskmem, frame + original.num_maskmem + 1):
        state["output_dict_per_obj"][obj]["non_cond_frame_outputs"].pop(near, None)


def corrected_twice(predictor, state):
    """One object prompted on frame 0 and corrected on 5 and 9, tracked after each prompt, and backwards."""
    yield predictor.add_new_points_or_box(state, 0, 1, points=[[60, 80]], labels=[1])
    yield from predictor.propagate_in_video(state, max_frame_num_to_track=10)
    for frame, x in ((5, 80), (9, 100)):
        yield predictor.add_new_points_or_box(state, frame, 1, points=[[x, 90]], labels=[1])
    yield from predictor.propagate_in_video(state, start_frame_idx=1)
    yield predictor.add_new_points_or_box(state, 3, 1, points=[[20, 30]], labels=[0])
    yield from predictor.propagate_in_video(state, start_frame_idx=8, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_cond_frames_in_attn": 2}, {"clear_non_cond_mem_around_input": True}])
def test_corrections_as_conditioning_frames_match_the_original(clip, monkeypatch, options):
    everywhere = {"add_all_frames_to_correct_as_cond": True}
    pair = with_options(monkeypatch, clear_all, **everywhere, **options)
    results = both(pair, clip, corrected_twice)
    compare(results, FINE)
    if options:
        plain = both(with_options(monkeypatch, **everywhere)[1:], clip, corrected_twice)[0]
        assert largest_difference(results[1], plain) > 5 * FINE


@pytest.mark.slow
def test_max_cond_frames_in_attn_matches_the_original(clip, monkeypatch):
    """Three prompted frames of which two are used; the third counts as a non-conditioning frame."""

    def run(predictor, state):
        for frame, x in ((0, 60), (2, 80), (6, 100)):
            yield predictor.add_new_points_or_box(state, frame, 1, points=[[x, 80]], labels=[1])
        yield from predictor.propagate_in_video(state, max_frame_num_to_track=9)

    results = both(with_options(monkeypatch, max_cond_frames_in_attn=2), clip, run)
    compare(results, FINE)
    assert largest_difference(results[1], both(predictors("2.1", "nano", 64)[1:], clip, run)[0]) > 5 * FINE


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_clear_non_cond_mem_around_input_matches_the_original(clip, monkeypatch, several):
    """With several objects nothing is cleared, unless an option says so."""

    def run(predictor, state):
        yield predictor.add_new_points_or_box(state, 0, 1, points=[[60, 80]], labels=[1])
        if several:
            yield predictor.add_new_points_or_box(state, 0, 2, points=[[100, 90]], labels=[1])
        yield predictor.add_new_points_or_box(state, 3, 1, points=[[80, 80]], labels=[1])
        yield from predictor.propagate_in_video(state, max_frame_num_to_track=6)

    cleared = {"clear_non_cond_mem_around_input": True}
    plain = both(predictors("2.1", "nano", 64)[1:], clip, run)[0]
    if several:
        compare([both(with_options(monkeypatch, **cleared)[1:], clip, run)[0], plain], 0)
        cleared["clear_non_cond_mem_for_multi_obj"] = True
        results = both(with_options(monkeypatch, clear_own, **cleared), clip, run)
    else:
        results = both(with_options(monkeypatch, clear_all, **cleared), clip, run)
    compare(results, FINE)
    assert largest_difference(results[1], plain) > 5 * FINE

"""Streams of frames: the masks are those of a clip, and the memory is that of a short one."""

import numpy as np
import pytest

from sam2jq import StreamPredictor
from sam2jq.errors import UserError

from .plain_steps import PlainVideo

CLIP = np.random.default_rng(0).integers(0, 255, (60, 6, 8, 3), np.uint8)
PROMPTS = [(0, 1, [3, 3]), (0, 1, [4, 3]), (20, 2, [1, 2]), (25, 1, [5, 5]), (25, 2, [2, 2]), (40, 1, [0, 1])]


def in_clip(predictor) -> list[np.ndarray]:
    """The masks of the clip and of each prompt, tracked up to each prompted frame and on from the next one."""
    state, masks, first = predictor.init_state(CLIP), [], 0
    for frame in sorted({frame for frame, *_ in PROMPTS} | {len(CLIP) - 1}):
        if frame:
            masks += [m for *_, m in predictor.propagate_in_video(state, first, frame - first)]
        for at, obj, point in PROMPTS:
            if at == frame:
                masks.append(predictor.add_new_points_or_box(state, frame, obj, points=[point], labels=[1])[2])
        first = frame + 1
    return masks


def in_stream(predictor) -> list[np.ndarray]:
    stream, masks = StreamPredictor(predictor), []
    for i, image in enumerate(CLIP):
        frame, ids, found = stream.step(image)
        assert (frame, ids) == (i, stream.obj_ids)
        masks += [found] if ids else []
        for at, obj, point in PROMPTS:
            if at == i:
                masks.append(stream.add_new_points_or_box(obj, points=[point], labels=[1])[2])
    return masks


@pytest.mark.parametrize(
    "options", [{}, {"clear": True}, {"everywhere": True}, {"everywhere": True, "max_cond": 2}], ids=str
)
def test_masks_are_those_of_a_clip(options):
    expected, got = in_clip(PlainVideo(**options)), in_stream(PlainVideo(**options))
    assert [len(masks) for masks in got] == [len(masks) for masks in expected]
    assert {len(masks) for masks in got} == {1, 2}
    for masks, other in zip(got, expected):
        np.testing.assert_array_equal(masks, other)


def size(stream) -> int:
    """Bytes of all stored arrays, and the entries of dicts."""
    objects = stream._state.objects.values()
    outputs = [out for obj in objects for each in (obj.cond, obj.non_cond) for out in each.values()]
    arrays = sum(part.nbytes for out in outputs for part in out if part is not None)
    return arrays + sum(len(obj.reverse) + len(obj.non_cond) + len(obj.cond) for obj in objects)


def test_memory_does_not_grow():
    """With a correction in every tenth frame, each of which adds a conditioning frame of which two are used."""
    stream, sizes = StreamPredictor(PlainVideo(everywhere=True, max_cond=2)), []
    for i in range(300):
        stream.step(CLIP[i % 60])
        if i % 10 == 0:
            stream.add_new_points_or_box(1, points=[[3, 3]], labels=[1])
            sizes.append(size(stream))
    assert len(set(sizes[3:])) == 1


def test_objects_come_and_go():
    stream = StreamPredictor(PlainVideo())
    with pytest.raises(UserError, match="the stream has no frame to prompt yet: call step first"):
        stream.add_new_mask(1, np.eye(6, 8))
    assert stream.step(CLIP[0])[2].shape == (0, 1, 6, 8)
    stream.add_new_mask("cat", np.eye(6, 8))
    assert stream.step(CLIP[1])[1] == ["cat"]
    assert stream.remove_object("cat") == []
    assert stream.step(CLIP[2])[1] == []
    stream.add_new_mask("dog", np.eye(6, 8))
    assert stream.step(CLIP[3])[2].shape == (1, 1, 6, 8)


def test_a_frame_of_another_size_is_one_line_and_changes_nothing():
    stream = StreamPredictor(PlainVideo())
    stream.step(CLIP[0])
    with pytest.raises(UserError, match=r"^frame 1: 6 x 8 pixels, but frame 0 has 8 x 6; resize it, or begin another"):
        stream.step(CLIP[1].swapaxes(0, 1))
    with pytest.raises(UserError, match=r"an image must be uint8 \[H, W, 3\], got float32"):
        stream.step(CLIP[1].astype(np.float32))
    assert stream.step(CLIP[1])[0] == 1

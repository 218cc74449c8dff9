"""The state of the objects of one clip, between the calls of the video predictor."""

import operator
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sam2jq.data.video import Video
from sam2jq.errors import UserError
from sam2jq.models.variants import MEMORIES, POINTERS
from sam2jq.predictors.bank_arrays import EMPTY, FrameInfo, FrameOutput, MemoryBank
from sam2jq.predictors.prompts import power_of_two
from sam2jq.predictors.spilled_outputs import SpilledOutputs


@dataclass
class ObjectState:
    """Prompts and outputs of one object, by frame number. Outputs are numpy arrays [1, ...] in host memory."""

    prompts: dict[int, tuple | None] = field(default_factory=dict)  # points and labels; None for a mask
    pending: dict[int, tuple[FrameOutput, bool]] = field(default_factory=dict)  # memory not encoded; is_cond
    cond: dict[int, FrameOutput] = field(default_factory=dict)
    non_cond: MutableMapping[int, FrameOutput] = field(default_factory=dict)
    reverse: dict[int, bool] = field(default_factory=dict)  # direction in which each frame was tracked

    def clear_non_cond_around(self, frame: int) -> None:
        """Removes the non-conditioning outputs of a frame and of MEMORIES frames before and after it."""
        for near in range(frame - MEMORIES, frame + MEMORIES + 1):
            self.non_cond.pop(near, None)

    def forget(self, frame: int, reverse: bool) -> None:
        """Drops what no frame after `frame` can need: all but its output, the last pointers and fewer memories."""
        step = 1 if reverse else -1
        kept = {t: self.non_cond[t] for age in range(POINTERS + 1) if (t := frame + age * step) in self.non_cond}
        for t, output in kept.items():
            memory = output.memory if abs(t - frame) < MEMORIES else None
            kept[t] = output if t == frame else output._replace(mask=None, memory=memory)
        self.non_cond, self.reverse = kept, {frame: reverse}

    def forget_cond(self, frame: int, count: int) -> None:
        """Drops the conditioning frames that no frame after `frame` can need, if `count` of them are used."""
        if count != -1:
            newest = sorted(self.cond)[-count:]
            self.cond = {t: out for t, out in self.cond.items() if t in newest or frame - t < POINTERS}

    def latest(self, frame: int, is_cond: bool) -> FrameOutput | None:
        """The newest output of a frame, if any; one whose memory is not encoded yet only if it `is_cond` or not."""
        pending, pending_cond = self.pending.get(frame, (None, is_cond))
        shown = pending if pending_cond == is_cond else None
        return shown or self.cond.get(frame) or self.non_cond.get(frame)


@dataclass
class VideoState:
    """A clip and its objects. Outputs are on the host; the device holds the arrays of two frames.

    keep_outputs: whether outputs remain that tracking on cannot need, in a temporary file.
    features: {number of a frame: its feature maps} of the two frames encoded last.
    no_cond: what `track_frame` takes as outputs of conditioning frames where there are none, on the device.
    """

    video: Video
    keep_outputs: bool = True
    objects: dict[int, ObjectState] = field(default_factory=dict)
    features: dict[int, list] = field(default_factory=dict)
    no_cond: tuple[FrameOutput, Any] | None = None
    last_tracked: int | None = None

    @property
    def num_frames(self) -> int:
        return len(self.video)

    @property
    def obj_ids(self) -> list[int]:
        return list(self.objects)

    def keeps(self, frame: int) -> bool:
        """Whether outputs of a frame, and those that a correction of it needs, were not dropped."""
        return self.keep_outputs or self.last_tracked in (None, frame)

    def add_object(self, obj_id: int) -> ObjectState:
        """The state of an object, which may be new."""
        if obj_id not in self.objects:
            self.objects[obj_id] = ObjectState(non_cond=SpilledOutputs() if self.keep_outputs else {})
        return self.objects[obj_id]

    def object(self, obj_id: int) -> ObjectState:
        """The state of an object. Raises UserError if there is none."""
        obj_id = check_obj_id(obj_id)
        if obj_id not in self.objects:
            raise UserError(f"object {obj_id} was never added; the objects are {self.obj_ids}")
        return self.objects[obj_id]


def memory_bank(objects: list[ObjectState], frame: int, reverse: bool, max_cond: int = -1) -> MemoryBank:
    """The memories of `objects` for tracking `frame`, as numpy arrays; at least one object has been prompted.

    max_cond: conditioning frames of an object that are used, see `closest_cond_frames`. A further one counts as a
    non-conditioning frame, if it is near enough. Conditioning frames are padded to 1, 2, 4, 8, ... with empty ones.
    """
    cond = [closest_cond_frames(obj.cond, frame, max_cond) for obj in objects]
    cond_count = power_of_two(max(map(len, cond)))
    blank = blank_output(objects)
    step = 1 if reverse else -1
    non_cond_frames = [frame + age * step for age in range(1, POINTERS + 1)]

    def recent(obj: ObjectState, used: dict[int, FrameOutput]) -> dict[int, FrameOutput]:
        others = {t: output for t, output in obj.cond.items() if t not in used}
        found = {t: obj.non_cond.get(t) or others.get(t) for t in non_cond_frames}
        return {t: output for t, output in found.items() if output}

    def rows(outputs: list[dict[int, FrameOutput]], frames: list[list[int]], name: str) -> np.ndarray:
        leaf = lambda by_frame, frame: getattr(by_frame.get(frame, blank), name)[0]
        return np.stack([[leaf(by_frame, frame) for frame in row] for by_frame, row in zip(outputs, frames)])

    cond_frames = [[*outputs, *[EMPTY] * (cond_count - len(outputs))] for outputs in cond]
    non_cond = [recent(obj, used) for obj, used in zip(objects, cond)]
    return MemoryBank(
        cond_frames=np.array(cond_frames, np.int32),
        cond_memory=rows(cond, cond_frames, "memory"),
        cond_pointer=rows(cond, cond_frames, "pointer"),
        non_cond_valid=np.array([[frame in outputs for frame in non_cond_frames] for outputs in non_cond]),
        non_cond_memory=rows(non_cond, [non_cond_frames[: MEMORIES - 1]] * len(objects), "memory"),
        non_cond_pointer=rows(non_cond, [non_cond_frames] * len(objects), "pointer"),
    )


def closest_cond_frames(cond: dict[int, FrameOutput], frame: int, count: int) -> dict[int, FrameOutput]:
    """At most `count` of the conditioning frames, all if -1, as sam2's `select_closest_cond_frames` chooses them.

    The last one before `frame`, the first one from it on, and then the nearest ones; `count` is at least 2.
    """
    if count == -1 or len(cond) <= count:
        return cond
    before, after = [t for t in cond if t < frame], [t for t in cond if t >= frame]
    chosen = [*([max(before)] if before else []), *([min(after)] if after else [])]
    others = sorted((t for t in cond if t not in chosen), key=lambda t: abs(t - frame))
    return {t: cond[t] for t in [*chosen, *others][:count]}


def blank_output(objects: list[ObjectState]) -> FrameOutput:
    """An output [1, ...] of zeros."""
    return FrameOutput(*map(np.zeros_like, next(iter(objects[0].cond.values()))))


def stack(outputs: list[FrameOutput]) -> FrameOutput:
    """Outputs of single objects [1, ...] as one batch [B, ...]."""
    return FrameOutput(*map(np.concatenate, zip(*outputs)))


def same_cond_frames(objects: list[ObjectState], frame: int, other: int, count: int) -> bool:
    """Whether the `closest_cond_frames` of each object are the same, in the same order, in two frames."""
    chosen = lambda obj, frame: list(closest_cond_frames(obj.cond, frame, count))
    return all(chosen(obj, frame) == chosen(obj, other) for obj in objects)


def frame_info(state: VideoState, frame: int, reverse: bool) -> FrameInfo:
    """What the model needs to know about the position of a frame in its clip."""
    max_age = max(min(POINTERS, state.num_frames - 1), 1)
    return FrameInfo(np.int32(frame), np.int32(-1 if reverse else 1), np.float32(max_age))


def any_prompt_is_cond(state: VideoState, frame: int) -> bool:
    """Whether a prompt since the last tracking made `frame` a conditioning frame of any object."""
    return any(obj.pending.get(frame, (None, False))[1] for obj in state.objects.values())


def whole_number(name: str, value) -> int:
    """`value` as an int. Raises UserError, which calls it `name`, unless it is a whole number of an integer type."""
    if isinstance(value, bool | np.bool_):
        raise UserError(f"{name} {value!r}: it must be an int")
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} {value!r}: it must be an int") from error


def check_max_cond_frames(count: int) -> int:
    """`count` as an int. Raises UserError unless it is -1, for all, or at least 2: one before a frame and one after."""
    count = whole_number("max_cond_frames_in_attn", count)
    if count != -1 and count < 2:
        raise UserError(f"max_cond_frames_in_attn {count}: it must be -1, for all, or at least 2")
    return count


def check_frame(state: VideoState, frame: int) -> int:
    """`frame` as an int. Raises UserError unless the clip has a frame of this number."""
    frame = whole_number("frame", frame)
    if frame not in range(state.num_frames):
        raise UserError(f"frame {frame}: the clip has frames 0 to {state.num_frames - 1}")
    return frame


def check_kept(state: VideoState, frame: int) -> int:
    """`check_frame`. Raises UserError too if outputs that a prompt on the frame needs were dropped."""
    frame = check_frame(state, frame)
    if not state.keeps(frame):
        raise UserError(f"frame {frame}: this state drops outputs, so that only the frame tracked last, "
                        f"{state.last_tracked}, can be prompted: call init_state with keep_outputs=True")  # fmt: skip
    return frame


def check_obj_id(obj_id: Any) -> Any:
    """`obj_id`; a number in place of an array or tensor of one, whose hash is not that of its value.

    Raises UserError unless it can name an object, as any hashable value that is equal to itself can.
    """
    if getattr(obj_id, "shape", None) == ():
        obj_id = obj_id.item()
    if not isinstance(obj_id, Hashable) or obj_id != obj_id:
        raise UserError(f"obj_id {obj_id!r}: give each object a whole number, or another hashable name")
    return obj_id


def frame_order(first: int, num_frames: int, max_frames: int | None, reverse: bool) -> range:
    """The frames tracked from `first` on, at most `max_frames` after it; none in reverse from frame 0."""
    max_frames = num_frames if max_frames is None else whole_number("max_frame_num_to_track", max_frames)
    if reverse:
        return range(first, max(first - max_frames, 0) - 1, -1) if first > 0 else range(0)
    return range(first, min(first + max_frames, num_frames - 1) + 1)

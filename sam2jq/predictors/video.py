"""Objects tracked through a clip: the counterpart of sam2's SAM2VideoPredictor (SAM 2, arXiv 2408.00714, section 4).

Letters: B objects, K prompted frames, S the model's image side, [h, w] its coarsest map, C and Cm the channels of
pointers and memories. "Recent" frames lie before the current one, or after it where a clip is tracked in reverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data.images import preprocess_frame
from sam2jq.data.video import Video, open_video, video_of
from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import MEMORIES, NO_OBJECT, POINTERS, SAM2, ObjectOutput
from sam2jq.predictors.image import LOGIT_LIMIT, point_prompts

Array = jax.Array
NEVER = -1  # the frame number of a memory that is not there


class FrameOutput(NamedTuple):
    """B objects in one frame, and what is remembered of it."""

    mask: Array  # logits [B, S / 4, S / 4]
    pointer: Array  # [B, C]
    object_score: Array  # logits [B, 1]
    memory: Array | None  # bfloat16 [B, h, w, Cm], the precision that SAM 2 keeps it in; None until it is encoded


class MemoryBank(NamedTuple):
    """All that B objects are remembered by. Its shape stays the same however many frames have passed.

    Entry i of the recent frames is i + 1 frames ago; `recent` tells which entries are there. A bank for a clip of T
    frames that are prompted once may have as few as T - 2 of them.
    """

    prompted: Array  # int32 [B, K] frame numbers, or NEVER
    prompted_memory: Array  # [B, K, h, w, Cm]
    prompted_pointer: Array  # [B, K, C]
    recent: Array  # bool [B, POINTERS]
    recent_memory: Array  # [B, MEMORIES - 1, h, w, Cm]
    recent_pointer: Array  # [B, POINTERS, C]


class FrameInfo(NamedTuple):
    """frame: its number; direction: 1 or, in reverse, -1; span: the longest time that a pointer's age can be."""

    frame: Array
    direction: Array
    span: Array


def condition_on_memory(sam: SAM2, coarse: Array, bank: MemoryBank, now: FrameInfo) -> Array:
    """`coarse` [B, h, w, C] of the current frame having looked at the bank; pointers from the future do not count."""
    slots = bank.recent_memory.shape[1]
    times = np.array([0] * bank.prompted.shape[1] + list(range(MEMORIES - 1, MEMORIES - 1 - slots, -1)))
    ages, there = (now.frame - bank.prompted) * now.direction, bank.prompted != NEVER
    recent_ages = jnp.arange(1, bank.recent.shape[1] + 1)
    recent = bank.recent & (recent_ages <= now.span)
    join = lambda *parts: jnp.concatenate(parts, axis=1)
    return sam.attend_memory(
        coarse,
        join(bank.prompted_memory, bank.recent_memory).astype(coarse.dtype),
        times,
        join(bank.prompted_pointer, bank.recent_pointer).astype(coarse.dtype),
        join(ages, jnp.broadcast_to(recent_ages, recent.shape)) / now.span,
        join(there, bank.recent[:, :slots], there & (ages >= 0), recent),
    )


def update_memory_bank(bank: MemoryBank, seen: FrameOutput, is_new: Array) -> MemoryBank:
    """The bank a frame later: `seen` [B] becomes its newest entry, one that is there where `is_new` [B]."""
    shift = lambda old, new: jnp.concatenate([new[:, None].astype(old.dtype), old[:, :-1]], axis=1)
    return bank._replace(
        recent=shift(bank.recent, is_new),
        recent_memory=shift(bank.recent_memory, seen.memory),
        recent_pointer=shift(bank.recent_pointer, seen.pointer),
    )


def track_objects_in_frame(
    sam: SAM2, features: list[Array], bank: MemoryBank, now: FrameInfo
) -> tuple[FrameOutput, Decoded]:
    """The bank's B objects in the frame with feature maps [1, ...], and all the masks that each was chosen of."""
    *fine, coarse = features
    coarse = jnp.broadcast_to(coarse, (len(bank.prompted), *coarse.shape[1:]))
    points = jnp.zeros((len(coarse), 1, 2)), jnp.full((len(coarse), 1), -1)  # one that says: no point
    decoded = sam.decode_masks([*fine, condition_on_memory(sam, coarse, bank, now)], points, multimask=True)
    return memorize(sam, coarse, sam.select_best_mask(decoded)), decoded


def memorize(sam: SAM2, coarse: Array, out: ObjectOutput | FrameOutput, *, binarize: bool = False) -> FrameOutput:
    """`out` of B objects with its memory; coarse: the frame's map [B, h, w, C]."""
    mask = resize(out.mask[..., None], (sam.variant.image_size,) * 2).astype(coarse.dtype)
    memory = sam.encode_memory(coarse, mask, out.object_score, binarize=binarize)
    return FrameOutput(out.mask, out.pointer, out.object_score, memory.astype(jnp.bfloat16))


@partial(jax.jit, static_argnames="model")
def encode_frame(model: SAM2, params: dict, image: Array) -> list[Array]:
    """The feature maps of one preprocessed image [1, S, S, 3]."""
    return model.apply({"params": params}, image, method="encode_image")


@partial(jax.jit, static_argnames="model")
def track_frame(
    model: SAM2, params: dict, image: Array, bank: MemoryBank, prompted: FrameOutput, is_prompted: Array, now: FrameInfo
) -> tuple[FrameOutput, MemoryBank]:
    """One frame [1, S, S, 3] of a clip: its objects, and the bank for the next one.

    Where `is_prompted` [B], an object is taken from `prompted` and not tracked; the bank knows it as such already.
    """
    features = model.apply({"params": params}, image, method="encode_image")
    found, _ = model.apply({"params": params}, features, bank, now, method=track_objects_in_frame)
    choose = lambda given, own: jnp.where(is_prompted.reshape(-1, *[1] * (own.ndim - 1)), given, own)
    seen = jax.tree.map(choose, prompted, found)
    return seen, update_memory_bank(bank, seen, ~is_prompted)


@partial(jax.jit, static_argnames=("model", "multimask"))
def prompt_frame(
    model: SAM2,
    params: dict,
    features: list[Array],
    bank: MemoryBank | None,
    now: FrameInfo,
    points,
    mask_input,
    *,
    multimask: bool,
) -> FrameOutput:
    """An object from points on a frame, after a look at `bank` unless it is None; hint: earlier logits to refine."""

    def run(sam: SAM2):
        *fine, coarse = features
        maps = (
            sam.add_no_memory_embed(features) if bank is None else [*fine, condition_on_memory(sam, coarse, bank, now)]
        )
        return sam.decode_object(maps, points, mask_input, multimask=multimask)

    return to_remember(model.apply({"params": params}, method=run))


@partial(jax.jit, static_argnames="model")
def mask_frame(model: SAM2, params: dict, features: list[Array], mask: Array) -> FrameOutput:
    """An object from its mask [1, S, S, 1] of 0 and 1."""
    return to_remember(model.apply({"params": params}, features, mask, method="object_from_mask"))


def to_remember(out: ObjectOutput) -> FrameOutput:
    """`out` before its memory is encoded."""
    return FrameOutput(out.mask, out.pointer, out.object_score, None)


@partial(jax.jit, static_argnames="model")
def encode_prompted(model: SAM2, params: dict, coarse: Array, prompted: FrameOutput) -> FrameOutput:
    """`prompted` [1, ...] with its memory, made of the mask that the user saw: cut at 0."""
    return model.apply({"params": params}, coarse, prompted, method=memorize, binarize=True)


@partial(jax.jit, static_argnames="size")
def enlarge(masks: Array, size: tuple[int, int]) -> Array:
    """[B, H, W] -> [B, 1, *size]."""
    return resize(masks[..., None], size)[:, None, ..., 0]


def stack(rows: list[FrameOutput]) -> FrameOutput:
    """Single objects [1, ...] as one batch [B, ...]."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


@dataclass
class ObjectState:
    """What is known of one object, by frame number."""

    prompts: dict[int, tuple | None] = field(default_factory=dict)  # points and labels; None: a mask was given
    pending: dict[int, tuple[FrameOutput, bool]] = field(
        default_factory=dict
    )  # not remembered yet; whether as prompted
    prompted: dict[int, FrameOutput] = field(default_factory=dict)
    tracked: dict[int, FrameOutput] = field(default_factory=dict)
    reverse: dict[int, bool] = field(default_factory=dict)  # of every frame that tracking came by

    def latest(self, frame: int) -> FrameOutput | None:
        pending, _ = self.pending.get(frame, (None, False))
        return pending or self.prompted.get(frame) or self.tracked.get(frame)


@dataclass
class VideoState:
    """A clip and its objects. Results lie in the host's memory; the device holds what one frame needs."""

    video: Video
    objects: dict[int, ObjectState] = field(default_factory=dict)
    features: tuple[int, list[Array]] | None = None  # of the frame prompted last, and its number

    @property
    def num_frames(self) -> int:
        return len(self.video)

    @property
    def obj_ids(self) -> list[int]:
        return list(self.objects)


class VideoPredictor:
    """Tracks objects through a clip.

        predictor = VideoPredictor(model, params)
        state = predictor.init_state("clip.mp4")
        predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[x, y]], labels=[1])
        for frame_idx, obj_ids, masks in predictor.propagate_in_video(state):
            masks > 0  # [objects, 1, H, W]

    The calls, their order and their results are SAM2VideoPredictor's, without its hole filling. A clip compiles once;
    so does each new number of objects (1, 2, 4, 8; those between are filled up), of prompted frames or of points. As
    there, a prompt on a frame that was tracked before corrects that frame, and tracking again forgets it unless
    `add_all_frames_to_correct_as_cond`.
    """

    def __init__(
        self, model: SAM2, params: dict, dtype: str = "float32", add_all_frames_to_correct_as_cond: bool = False
    ):
        self.model, self.params, self.dtype = model, params, dtype
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond

    def init_state(self, video_path) -> VideoState:
        """The state of a clip: a folder of frames, a video file, an open `Video`, or uint8 frames [T, H, W, 3]."""
        match video_path:
            case Video():
                return VideoState(video_path)
            case str() | Path():
                return VideoState(open_video(str(video_path)))
            case _:
                return VideoState(video_of(video_path))

    def reset_state(self, inference_state: VideoState) -> None:
        """Forgets all objects."""
        inference_state.objects.clear()

    def add_new_points_or_box(
        self,
        inference_state: VideoState,
        frame_idx: int,
        obj_id: int,
        points=None,
        labels=None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box=None,
    ) -> tuple[int, list[int], np.ndarray]:
        """(frame, object ids, mask logits [objects, 1, H, W]) after clicks or a box on one object.

        points [N, 2] and labels [N], 1 foreground, 0 background; box [4]; in pixels of the clip, or in 0..1 without
        `normalize_coords`. They are added to earlier ones on the frame unless `clear_old_points`.
        """
        state = inference_state
        if points is None and box is None:
            raise UserError(f"object {obj_id}: no prompt; give points and labels, or a box")
        if box is not None and not clear_old_points:
            raise UserError(f"object {obj_id}: a box comes before all points; give it with clear_old_points=True")
        size = state.video.size if normalize_coords else (1, 1)
        coords, labels = point_prompts(points, labels, box, size, self.model.variant.image_size)
        features = self._features(state, frame_idx)
        entry = state.objects.setdefault(obj_id, ObjectState())
        if not clear_old_points and entry.prompts.get(frame_idx):
            old_coords, old_labels = entry.prompts[frame_idx]
            coords, labels = np.concatenate([old_coords, coords], 1), np.concatenate([old_labels, labels], 1)
        earlier, reverse = entry.latest(frame_idx), entry.reverse.get(frame_idx, False)
        found = prompt_frame(
            self.model,
            self.params,
            features,
            self._bank([entry], frame_idx, reverse) if frame_idx in entry.reverse else None,
            now_at(state, frame_idx, reverse),
            (coords, labels),
            None if earlier is None else np.clip(earlier.mask, -LOGIT_LIMIT, LOGIT_LIMIT)[..., None],
            multimask=labels.shape[1] <= 1,
        )
        entry.prompts[frame_idx] = coords, labels
        return self._enter(state, entry, frame_idx, found)

    def add_new_mask(
        self, inference_state: VideoState, frame_idx: int, obj_id: int, mask
    ) -> tuple[int, list[int], np.ndarray]:
        """(frame, object ids, mask logits [objects, 1, H, W]) after one object was given by its mask [H, W]."""
        state, mask, size = inference_state, np.asarray(mask), self.model.variant.image_size
        if mask.shape != state.video.size:
            raise UserError(f"object {obj_id}: the mask is {list(mask.shape)}, the frames {list(state.video.size)}")
        features = self._features(state, frame_idx)
        fitted = resize(jnp.asarray(mask[None, ..., None], jnp.float32), (size, size), antialias=True) >= 0.5
        entry = state.objects.setdefault(obj_id, ObjectState())
        entry.prompts[frame_idx] = None
        return self._enter(state, entry, frame_idx, mask_frame(self.model, self.params, features, fitted))

    def propagate_in_video(
        self,
        inference_state: VideoState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, list[int], np.ndarray]]:
        """Yields (frame, object ids, mask logits [objects, 1, H, W]) frame by frame, from the first prompted one."""
        state, entries = inference_state, list(inference_state.objects.values())
        for entry in entries:
            self._settle(state, entry)
        bare = [obj_id for obj_id, entry in state.objects.items() if not entry.prompted]
        if bare or not entries:
            raise UserError(f"no prompt on {f'objects {bare}' if bare else 'any object'}: add points, a box or a mask")
        first = min(min(entry.prompted) for entry in entries) if start_frame_idx is None else start_frame_idx
        batch = entries + [entries[-1]] * (2 ** (len(entries) - 1).bit_length() - len(entries))
        bank = self._bank(batch, first, reverse)
        blank = jax.tree.map(np.zeros_like, next(iter(entries[0].prompted.values())))
        for frame in frame_order(first, state.num_frames, max_frame_num_to_track, reverse):
            prompted = stack([entry.prompted.get(frame, blank) for entry in batch])
            is_prompted = np.array([frame in entry.prompted for entry in batch])
            image, now = self._image(state, frame), now_at(state, frame, reverse)
            seen, bank = track_frame(self.model, self.params, image, bank, prompted, is_prompted, now)
            for i, entry in enumerate(entries):
                entry.reverse[frame] = reverse
                if not is_prompted[i]:
                    entry.tracked[frame] = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i : i + 1]), seen)
            yield frame, state.obj_ids, np.asarray(enlarge(seen.mask[: len(entries)], state.video.size))

    def clear_all_prompts_in_frame(
        self, inference_state: VideoState, frame_idx: int, obj_id: int
    ) -> tuple[int, list[int], np.ndarray]:
        """(frame, object ids, mask logits) after an object's prompts on a frame were taken back."""
        entry = self._entry(inference_state, obj_id)
        entry.prompts.pop(frame_idx, None)
        entry.pending.pop(frame_idx, None)
        if frame_idx in entry.prompted:  # what was seen stays, as if it had been tracked
            entry.tracked[frame_idx] = entry.prompted.pop(frame_idx)
            entry.reverse.pop(frame_idx, None)
        return frame_idx, inference_state.obj_ids, self._masks(inference_state, frame_idx)

    def remove_object(self, inference_state: VideoState, obj_id: int) -> tuple[list[int], list[tuple[int, np.ndarray]]]:
        """(remaining object ids, [(frame, mask logits)] of the frames where the object had prompts)."""
        frames = sorted(self._entry(inference_state, obj_id).prompts)
        del inference_state.objects[obj_id]
        updated = [(frame, self._masks(inference_state, frame)) for frame in frames if inference_state.objects]
        return inference_state.obj_ids, updated

    def _entry(self, state: VideoState, obj_id: int) -> ObjectState:
        if obj_id not in state.objects:
            raise UserError(f"object {obj_id} was never added; the objects are {state.obj_ids}")
        return state.objects[obj_id]

    def _image(self, state: VideoState, frame: int) -> Array:
        if not 0 <= frame < state.num_frames:
            raise UserError(f"frame {frame}: the clip has frames 0 to {state.num_frames - 1}")
        return jnp.asarray(preprocess_frame(state.video[frame], self.model.variant.image_size)[None], self.dtype)

    def _features(self, state: VideoState, frame: int) -> list[Array]:
        if state.features is None or state.features[0] != frame:
            state.features = frame, encode_frame(self.model, self.params, self._image(state, frame))
        return state.features[1]

    def _enter(self, state: VideoState, entry: ObjectState, frame: int, found: FrameOutput):
        as_prompted = frame not in entry.reverse or self.add_all_frames_to_correct_as_cond
        entry.pending[frame] = jax.tree.map(np.asarray, found), as_prompted
        return frame, state.obj_ids, self._masks(state, frame)

    def _settle(self, state: VideoState, entry: ObjectState) -> None:
        """Remembers what is pending of an object."""
        for frame, (found, as_prompted) in entry.pending.items():
            coarse = self._features(state, frame)[-1]
            remembered = jax.tree.map(np.asarray, encode_prompted(self.model, self.params, coarse, found))
            (entry.prompted if as_prompted else entry.tracked)[frame] = remembered
        entry.pending.clear()
        for frame in entry.prompted:
            entry.tracked.pop(frame, None)

    def _bank(self, entries: list[ObjectState], frame: int, reverse: bool) -> MemoryBank:
        """The memories of the objects as they are when `frame` comes."""
        most = max(len(entry.prompted) for entry in entries)
        blank = jax.tree.map(np.zeros_like, next(iter(entries[0].prompted.values())))
        recent_frames = [frame + age * (1 if reverse else -1) for age in range(1, POINTERS + 1)]

        def rows(found: list[dict[int, FrameOutput]], frames: list[list[int]], name: str) -> np.ndarray:
            leaf = lambda entry, frame: getattr(entry.get(frame, blank), name)[0]
            return np.stack([[leaf(entry, f) for f in fs] for entry, fs in zip(found, frames)])

        prompted = [entry.prompted for entry in entries]
        prompted_frames = [[*p, *[NEVER] * (most - len(p))] for p in prompted]
        tracked = [entry.tracked for entry in entries]
        return MemoryBank(
            np.array(prompted_frames, np.int32),
            rows(prompted, prompted_frames, "memory"),
            rows(prompted, prompted_frames, "pointer"),
            np.array([[f in entry for f in recent_frames] for entry in tracked]),
            rows(tracked, [recent_frames[: MEMORIES - 1]] * len(entries), "memory"),
            rows(tracked, [recent_frames] * len(entries), "pointer"),
        )

    def _masks(self, state: VideoState, frame: int) -> np.ndarray:
        """Mask logits [objects, 1, H, W] of what is known of a frame; NO_OBJECT where nothing is."""
        found = [entry.latest(frame) for entry in state.objects.values()]
        nothing = np.full((self.model.variant.image_size // 4,) * 2, NO_OBJECT, np.float32)
        masks = np.stack([nothing if seen is None else seen.mask[0] for seen in found])
        return np.asarray(enlarge(masks, state.video.size))


def now_at(state: VideoState, frame: int, reverse: bool) -> FrameInfo:
    """A frame of a clip that is tracked forwards or in reverse."""
    span = max(min(POINTERS, state.num_frames - 1), 1)
    return FrameInfo(np.int32(frame), np.int32(-1 if reverse else 1), np.float32(span))


def frame_order(first: int, frames: int, most: int | None, reverse: bool) -> range:
    """The frames that tracking from `first` comes by, at most `most` after it; none in reverse from frame 0."""
    most = frames if most is None else most
    if reverse:
        return range(first, max(first - most, 0) - 1, -1) if first > 0 else range(0)
    return range(first, min(first + most, frames - 1) + 1)

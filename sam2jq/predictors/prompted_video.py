"""What the predictors of clips share: the prompts, and the outputs of each object; without jax and torch.

S is the model's image side.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from sam2jq.data.images import resize_frame
from sam2jq.data.video import Video, open_video, video_of
from sam2jq.errors import UserError
from sam2jq.models.variants import NO_OBJECT
from sam2jq.predictors.bank_arrays import FrameOutput, MemoryBank
from sam2jq.predictors.frame_steps import FrameSteps
from sam2jq.predictors.prompts import LOGIT_LIMIT, object_mask, point_prompts
from sam2jq.predictors.video_state import (
    ObjectState,
    VideoState,
    any_prompt_is_cond,
    blank_output,
    check_frame,
    check_kept,
    check_obj_id,
    frame_info,
    frame_order,
    memory_bank,
    same_cond_frames,
    stack,
)

# a frame number, the object ids, and their mask logits float32 [objects, 1, H, W] at the size of the clip
FrameMasks = tuple[int, list[int], np.ndarray]


class PromptedVideo(FrameSteps):
    """Tracks objects through a clip. A subclass computes the steps of one frame.

    fill_hole_area: holes of masks up to this many pixels, of a low-resolution mask [S / 4, S / 4], are filled; 8 in
    sam2's `build_sam2_video_predictor`. non_overlap_masks: a pixel of the results belongs to one object at most, the
    one with the highest logit. add_all_frames_to_correct_as_cond: a prompt on a frame that was tracked before makes it
    a conditioning frame, which tracking again does not overwrite, in place of a correction.
    clear_non_cond_mem_around_input: where tracking meets a prompted frame, the object's outputs in the seven frames
    before and after it are no longer used; with several objects only if clear_non_cond_mem_for_multi_obj.
    max_cond_frames_in_attn: prompted frames whose memories a frame is conditioned on, the closest ones; -1 for all, in
    sam2 a setting of the model.
    """

    fill_hole_area: float
    non_overlap_masks: bool
    add_all_frames_to_correct_as_cond: bool
    clear_non_cond_mem_around_input: bool
    clear_non_cond_mem_for_multi_obj: bool
    max_cond_frames_in_attn: int

    def init_state(
        self,
        video_path,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
        *,
        keep_outputs: bool = True,
    ) -> VideoState:
        """The state of a clip: a folder of frames, a video file, an open `Video`, or uint8 frames [T, H, W, 3].

        offload_video_to_cpu, offload_state_to_cpu, async_loading_frames: accepted for compatibility with the original,
        where they change memory and speed but no result. Here, frames are always read when they are needed, from files
        by a thread that is a few frames ahead, and outputs always come to the host. The newest outputs of an object are
        in memory, all others in a temporary file. keep_outputs: False drops these; the clip can then be tracked once,
        and no earlier frame be corrected.
        """
        match video_path:
            case Video():
                video = video_path
            case str() | Path():
                video = open_video(str(video_path))
            case _:
                video = video_of(video_path)
        return VideoState(video, keep_outputs)

    def reset_state(self, inference_state: VideoState) -> None:
        """Removes all objects."""
        inference_state.objects.clear()
        inference_state.last_tracked = None

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
    ) -> FrameMasks:
        """Adds clicks or a box on one object; returns the frame's masks.

        points: [N, 2], x and y; labels: [N], 1 foreground, 0 background, 2 and 3 the corners of a box; box: [4], x0 y0
        x1 y1. Coordinates are in pixels of the clip, or in 0..1 with normalize_coords=False. clear_old_points=False
        adds the points to earlier ones on the frame. Raises UserError if the prompt is missing, is not finite or has
        the wrong shape.
        """
        state, frame_idx, obj_id = inference_state, check_kept(inference_state, frame_idx), check_obj_id(obj_id)
        if points is None and labels is None and box is None:
            raise UserError(f"object {obj_id}: no prompt; give points and labels, or a box")
        if box is not None and not clear_old_points:
            raise UserError(f"object {obj_id}: a box comes before all points; give it with clear_old_points=True")
        size = state.video.size if normalize_coords else (1, 1)
        coords, labels = point_prompts(points, labels, box, size, self.image_size)
        if len(coords) != 1:
            raise UserError(f"object {obj_id}: {len(coords)} prompts for one object; give points [N, 2] or a box [4]")
        features = self._features(state, frame_idx)
        obj = state.add_object(obj_id)
        if not clear_old_points and obj.prompts.get(frame_idx):
            old_coords, old_labels = obj.prompts[frame_idx]
            coords, labels = np.concatenate([old_coords, coords], 1), np.concatenate([old_labels, labels], 1)
        obj.prompts[frame_idx] = coords, labels
        return self._add_output(state, obj, frame_idx, self._prompt(state, obj, frame_idx, features))

    def add_new_points(self, *args, **kwargs) -> FrameMasks:
        """`add_new_points_or_box` by its old name, which the original keeps too."""
        return self.add_new_points_or_box(*args, **kwargs)

    def add_new_mask(self, inference_state: VideoState, frame_idx: int, obj_id: int, mask) -> FrameMasks:
        """Adds the mask [H, W] of one object, any number but 0 where it is; returns the frame's masks.

        Raises UserError if the mask's size is not the clip's, or if it holds logits (negative values), several values
        of which none is 0, inf or NaN.
        """
        state, frame_idx, obj_id = inference_state, check_kept(inference_state, frame_idx), check_obj_id(obj_id)
        size = (self.image_size,) * 2
        mask = object_mask(mask).astype(np.float32)
        if mask.shape != state.video.size:
            raise UserError(f"object {obj_id}: the mask is {list(mask.shape)}, the frames {list(state.video.size)}")
        features = self._features(state, frame_idx)
        resized = self.to_host(self.resize(mask[None], size, antialias=True))[..., None] >= 0.5
        obj = state.add_object(obj_id)
        obj.prompts[frame_idx] = None
        return self._add_output(state, obj, frame_idx, self.mask_frame(features, resized))

    def propagate_in_video(
        self,
        inference_state: VideoState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[FrameMasks]:
        """Yields the masks of frame after frame, from the first prompted frame or `start_frame_idx` on.

        max_frame_num_to_track: frames after the first one; None for all. Raises UserError if an object has no prompt,
        or if the clip has no such frame.
        """
        state, objects = inference_state, self.encode_prompts(inference_state)
        unprompted = [obj_id for obj_id, obj in state.objects.items() if not obj.cond]
        if unprompted or not objects:
            which = f"objects {unprompted}" if unprompted else "any object"
            raise UserError(f"no prompt on {which}: add points, a box or a mask")
        first = min(min(obj.cond) for obj in objects) if start_frame_idx is None else start_frame_idx
        first = check_frame(state, first)
        if not state.keep_outputs and state.last_tracked is not None:
            raise UserError("this state drops outputs and was tracked: call init_state again, with keep_outputs=True")
        bank = None
        frames = frame_order(first, state.num_frames, max_frame_num_to_track, reverse)
        for frame, following in pairwise([*frames, None]):
            masks, bank = self.track_objects(state, objects, frame, reverse, bank, following)
            yield frame, state.obj_ids, masks

    def clear_all_prompts_in_frame(
        self, inference_state: VideoState, frame_idx: int, obj_id: int, need_output: bool = True
    ) -> FrameMasks | None:
        """Removes an object's prompts on a frame; returns the frame's masks, or None without `need_output`."""
        obj, frame_idx = inference_state.object(obj_id), check_kept(inference_state, frame_idx)
        obj.prompts.pop(frame_idx, None)
        obj.pending.pop(frame_idx, None)
        if frame_idx in obj.cond:  # its output stays, as if the frame had been tracked
            obj.non_cond[frame_idx] = obj.cond.pop(frame_idx)
            obj.reverse.pop(frame_idx, None)
        if need_output:
            is_cond = any_prompt_is_cond(inference_state, frame_idx)
            return frame_idx, inference_state.obj_ids, self._masks(inference_state, frame_idx, is_cond)
        return None

    def remove_object(
        self, inference_state: VideoState, obj_id: int, strict: bool = False, need_output: bool = True
    ) -> tuple[list[int], list[tuple[int, np.ndarray]]]:
        """Removes an object; returns the remaining ids, and (frame, mask logits) of each frame it had a prompt on.

        The second list is empty without `need_output`, and lacks frames whose outputs were dropped. An unknown object
        is ignored; with `strict`, it raises UserError.
        """
        obj_id = check_obj_id(obj_id)
        if not strict and obj_id not in inference_state.objects:
            return inference_state.obj_ids, []
        frames = filter(inference_state.keeps, sorted(inference_state.object(obj_id).prompts))
        del inference_state.objects[obj_id]
        if not (need_output and inference_state.objects):
            return inference_state.obj_ids, []
        masks = lambda frame: self._masks(inference_state, frame, any_prompt_is_cond(inference_state, frame))
        return inference_state.obj_ids, [(frame, masks(frame)) for frame in frames]

    def encode_prompts(self, state: VideoState) -> list[ObjectState]:
        """The objects, after the memories of their prompted frames were encoded."""
        for obj in state.objects.values():
            for frame, (output, is_cond) in obj.pending.items():
                coarse = self._features(state, frame)[-1]
                memorized = self.to_host(self.memorize_prompted(coarse, output))
                (obj.cond if is_cond else obj.non_cond)[frame] = memorized
                if self._clears(state):
                    obj.clear_non_cond_around(frame)
            obj.pending.clear()
            for frame in obj.cond:
                obj.non_cond.pop(frame, None)
        return list(state.objects.values())

    def track_objects(
        self,
        state: VideoState,
        objects: list[ObjectState],
        frame: int,
        reverse: bool,
        bank: MemoryBank | None,
        following: int | None = None,
    ) -> tuple[np.ndarray, MemoryBank | None]:
        """The masks of `objects` in a frame, [objects, 1, H, W], whose outputs are stored, and the next frame's bank.

        A bank that is None is made from the stored outputs. following: the next frame, if it is known. Where steps
        return before they are computed, it is encoded while the results come to the host.
        """
        batch = objects + [objects[-1]] * (self.batch_size(len(objects)) - len(objects))
        if bank is None:
            bank = self.to_device(memory_bank(batch, frame, reverse, self.max_cond_frames_in_attn))
        cond, is_cond = self._cond_outputs(state, batch, frame)
        features = self._features(state, frame)
        info = self.to_device(frame_info(state, frame, reverse))
        conditioned = self.condition_frame(features[-1], bank, info)
        output, bank = self.track_frame(features, conditioned, bank, cond, is_cond)
        self.copy_async(output)
        output = self._filled(output)
        masks = self.resize(output.mask, state.video.size, count=len(objects))
        self.copy_async(masks)
        if following is not None and self.encodes_ahead:
            with suppress(Exception):  # of a frame that cannot be read: raised when it is due
                self._features(state, following)
        host = self.to_host(output)
        clears = self._clears(state)
        for i, obj in enumerate(objects):
            obj.reverse[frame] = reverse
            if frame not in obj.cond:
                obj.non_cond[frame] = FrameOutput(*(part[i : i + 1] for part in host))
            elif clears:
                obj.clear_non_cond_around(frame)
            if not state.keep_outputs:
                obj.forget(frame, reverse)
        state.last_tracked = frame
        stays = same_cond_frames(objects, frame, frame + (-1 if reverse else 1), self.max_cond_frames_in_attn)
        cleared = clears and any(frame in obj.cond for obj in objects)
        return self._exclusive(self.to_host(masks)), bank if stays and not cleared else None

    def _cond_outputs(self, state: VideoState, batch: list[ObjectState], frame: int) -> tuple[FrameOutput, np.ndarray]:
        """The outputs [B, ...] of the objects of which `frame` is a conditioning frame, and bool [B], which these are.

        Where there are none, they are on the device already.
        """
        is_cond = np.array([frame in obj.cond for obj in batch])
        if is_cond.any():
            blank = blank_output(batch)
            return self.to_device((stack([obj.cond.get(frame, blank) for obj in batch]), is_cond))
        if state.no_cond is None or len(state.no_cond[1]) != len(batch):
            state.no_cond = self.to_device((stack([blank_output(batch)] * len(batch)), is_cond))
        return state.no_cond

    def _clears(self, state: VideoState) -> bool:
        """Whether outputs near prompted frames are removed."""
        return self.clear_non_cond_mem_around_input and (
            self.clear_non_cond_mem_for_multi_obj or len(state.objects) == 1
        )

    def _features(self, state: VideoState, frame: int) -> list:
        if frame not in state.features:
            image = resize_frame(state.video[frame], self.image_size)[None]
            while len(state.features) > 1:
                state.features.pop(next(iter(state.features)))
            state.features[frame] = self.encode_frame(image)
        return state.features[frame]

    def _prompt(self, state: VideoState, obj: ObjectState, frame: int, features: list) -> FrameOutput:
        """The output of an object's points on a frame; a frame tracked before is conditioned on memory."""
        coords, labels = obj.prompts[frame]
        earlier, conditioned = obj.latest(frame, self._is_cond(obj, frame)), None
        if frame in obj.reverse:
            reverse = obj.reverse[frame]
            bank = memory_bank([obj], frame, reverse, self.max_cond_frames_in_attn)
            conditioned = self.condition_frame(features[-1], bank, frame_info(state, frame, reverse))
        return self.prompt_frame(
            features,
            conditioned,
            (coords, labels),
            None if earlier is None else np.clip(earlier.mask, -LOGIT_LIMIT, LOGIT_LIMIT)[..., None],
            multimask=labels.shape[1] <= 1,
        )

    def _add_output(self, state: VideoState, obj: ObjectState, frame: int, output: FrameOutput) -> FrameMasks:
        """Stores the output of a prompted frame, whose memory is encoded before tracking; returns the frame's masks."""
        is_cond = self._is_cond(obj, frame)
        obj.pending[frame] = self.to_host(self._filled(output)), is_cond
        return frame, state.obj_ids, self._masks(state, frame, is_cond)

    def _is_cond(self, obj: ObjectState, frame: int) -> bool:
        """Whether a prompt on `frame` makes it a conditioning frame of the object, instead of correcting its output."""
        return frame not in obj.reverse or self.add_all_frames_to_correct_as_cond

    def _masks(self, state: VideoState, frame: int, is_cond: bool) -> np.ndarray:
        """Mask logits [objects, 1, H, W] of a frame; NO_OBJECT for objects without an output there.

        Of prompts since the last tracking, those of conditioning frames show if `is_cond`, else those of corrections,
        and other objects show their output of before. So the original does.
        """
        outputs = [obj.latest(frame, is_cond) for obj in state.objects.values()]
        absent = np.full((self.image_size // 4,) * 2, NO_OBJECT, np.float32)
        masks = np.stack([absent if output is None else output.mask[0] for output in outputs])
        return self._exclusive(self.to_host(self.resize(masks, state.video.size)))

    def _filled(self, output: FrameOutput) -> FrameOutput:
        """`output` with small holes of its masks filled; its memory stays as it is."""
        if not self.fill_hole_area > 0:
            return output
        from sam2jq.predictors.regions import fill_holes  # which needs scipy

        return output._replace(mask=fill_holes(self.to_host(output.mask), self.fill_hole_area))

    def _exclusive(self, masks: np.ndarray) -> np.ndarray:
        """Mask logits [objects, H, W] as [objects, 1, H, W]; with `non_overlap_masks` at most -10 but for the highest
        one of each pixel."""
        masks = masks[:, None]
        if not self.non_overlap_masks:
            return masks
        highest = np.arange(len(masks))[:, None, None, None] == masks.argmax(0)
        return np.where(highest, masks, np.minimum(masks, np.float32(-10)))

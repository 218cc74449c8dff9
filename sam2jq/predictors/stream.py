"""Objects tracked through frames that come one by one and need not end, such as a camera's."""

import numpy as np

from sam2jq.data.images import check_image
from sam2jq.data.video import Video
from sam2jq.errors import UserError
from sam2jq.predictors.bank_arrays import MemoryBank
from sam2jq.predictors.prompted_video import FrameMasks, PromptedVideo
from sam2jq.predictors.video_state import VideoState, check_obj_id


class Endless(Video):
    """A clip of unknown length, of which only the newest frame is read."""

    def __len__(self) -> int:
        return 2**31 - 1


class StreamPredictor:
    """Tracks objects through a stream of frames, forward, in memory that does not grow with their number.

        stream = StreamPredictor(VideoPredictor(model, params))
        for image in camera:  # uint8 [H, W, 3]
            frame_idx, obj_ids, masks = stream.step(image)
            masks > 0  # [objects, 1, H, W]
            if clicked:
                stream.add_new_points_or_box(obj_id=1, points=[[x, y]], labels=[1])

    A prompt is of the newest frame. An object that is new is tracked from there on; another one is corrected, as in
    `VideoPredictor`, whose masks of a clip of 16 frames or more are the same.

    What is kept of an object: its conditioning frames, and the last outputs that memory attention uses. Where
    `add_all_frames_to_correct_as_cond` makes each correction a conditioning frame, set `max_cond_frames_in_attn`, too.
    """

    def __init__(self, predictor: PromptedVideo):
        """A stream before its first frame; predictor: a `VideoPredictor` or `OnnxVideoPredictor` with its options."""
        self.predictor = predictor
        self._frame, self._image = -1, np.zeros((0, 0, 3), np.uint8)
        self._state: VideoState | None = None
        self._bank: MemoryBank | None = None

    @property
    def obj_ids(self) -> list:
        """The objects, in the order of the masks."""
        return [] if self._state is None else self._state.obj_ids

    def step(self, frame: np.ndarray) -> FrameMasks:
        """Takes the next frame, uint8 [H, W, 3]; returns its number, the objects, and their mask logits.

        Without objects nothing is computed, and the masks are [0, 1, H, W].
        Raises UserError if the frame is no such array, or has another size than the first one.
        """
        check_image(frame)
        number, size = self._frame + 1, frame.shape[:2]
        if self._state is None:
            self._state = VideoState(Endless([], size, lambda _: self._image), keep_outputs=False)
        state = self._state
        if size != state.video.size:
            raise UserError(f"frame {number}: {size[1]} x {size[0]} pixels, but frame 0 has {state.video.size[1]} x "
                            f"{state.video.size[0]}; resize it, or begin another StreamPredictor")  # fmt: skip
        objects = self.predictor.encode_prompts(state)
        self._frame, self._image = number, frame.copy()  # a camera may write the next frame into the same array
        state.last_tracked = number
        if not objects:
            return number, [], np.zeros((0, 1, *size), np.float32)
        masks, self._bank = self.predictor.track_objects(state, objects, number, False, self._bank)
        for obj in objects:
            obj.forget_cond(number, self.predictor.max_cond_frames_in_attn)
        return number, state.obj_ids, masks

    def add_new_points_or_box(self, obj_id: int, points=None, labels=None, **options) -> FrameMasks:
        """Clicks or a box on an object in the newest frame; arguments and result as of `VideoPredictor`."""
        return self._prompt(self.predictor.add_new_points_or_box, obj_id, points, labels, **options)

    def add_new_mask(self, obj_id: int, mask) -> FrameMasks:
        """The mask of an object in the newest frame; arguments and result as of `VideoPredictor`."""
        return self._prompt(self.predictor.add_new_mask, obj_id, mask)

    def remove_object(self, obj_id: int) -> list:
        """Removes an object, if it is there; returns the others."""
        self._bank = None
        if self._state is not None:
            self._state.objects.pop(check_obj_id(obj_id), None)
        return self.obj_ids

    def _prompt(self, add, *args, **options) -> FrameMasks:
        if self._state is None:
            raise UserError("the stream has no frame to prompt yet: call step first")
        self._bank = None
        return add(self._state, self._frame, *args, **options)

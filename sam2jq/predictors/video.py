"""Objects tracked through a clip: the counterpart of sam2's SAM2VideoPredictor (SAM 2, arXiv 2408.00714, section 4)."""

import jax
import numpy as np

from sam2jq.data.images import MEAN, STD
from sam2jq.errors import UserError
from sam2jq.models.params import check_params
from sam2jq.models.precision import cast_kernels, float_dtype
from sam2jq.models.sam2 import SAM2, is_image_only
from sam2jq.predictors.bank_arrays import FrameInfo, FrameOutput, MemoryBank
from sam2jq.predictors.packed_memory import check_memory_bits
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompted_video import PromptedVideo
from sam2jq.predictors.prompts import power_of_two
from sam2jq.predictors.video_state import check_max_cond_frames
from sam2jq.predictors.video_steps import (
    condition_frame,
    encode_frame,
    mask_frame,
    memorize_prompted,
    normalize_frame,
    prompt_frame,
    resize_maps,
    track_frame,
)

Array = jax.Array


class VideoPredictor(PromptedVideo, FromPretrained):
    """Tracks objects through a clip.

        predictor = VideoPredictor(model, params)   # or VideoPredictor.from_pretrained("demo")
        state = predictor.init_state("clip.mp4")
        predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[x, y]], labels=[1])
        for frame_idx, obj_ids, masks in predictor.propagate_in_video(state):
            masks > 0  # [objects, 1, H, W]

    The methods, their arguments and their results are those of SAM2VideoPredictor. XLA compiles once per clip, and
    once per new number of objects (padded to 1, 2, 4, 8, ...), of conditioning frames or of points. As in the original,
    a prompt on a frame that was tracked before corrects that frame, and tracking again overwrites it unless
    `add_all_frames_to_correct_as_cond`.
    """

    def __init__(
        self,
        model: SAM2,
        params: dict,
        fill_hole_area: int = 0,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        *,
        clear_non_cond_mem_for_multi_obj: bool = False,
        max_cond_frames_in_attn: int = -1,
        memory_bits: int | None = None,
        dtype: str = "auto",
    ):
        """A predictor of `model` with `params`; dtype: of the activations, as `float_dtype` takes it.

        memory_bits: 8 or 4, in which the memory bank stores memories and object pointers; None for bfloat16 and
        `dtype`, as in the original. All others are as in `PromptedVideo`.
        Raises UserError for params without the memory, or of another model.
        """
        check_params(type(self).__name__, model, params)
        if is_image_only(params):
            raise UserError(
                "this is an image-only model, without the weights of the memory, which tracking needs: load the "
                "checkpoint of the video model, or use ImagePredictor"
            )
        self.model, self.dtype = model, float_dtype(dtype)
        self.params = cast_kernels(params, self.dtype)
        self._range = jax.device_put((MEAN, STD))
        # the cores of a CPU gain nothing, and a caller that stops early would have paid for one more frame
        self.encodes_ahead = jax.default_backend() != "cpu"
        self.fill_hole_area, self.non_overlap_masks = fill_hole_area, non_overlap_masks
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.clear_non_cond_mem_for_multi_obj = clear_non_cond_mem_for_multi_obj
        self.memory_bits = check_memory_bits(memory_bits)
        self.max_cond_frames_in_attn = check_max_cond_frames(max_cond_frames_in_attn)

    @property
    def image_size(self) -> int:
        return self.model.variant.image_size

    def batch_size(self, objects: int) -> int:
        return power_of_two(objects)

    def to_device(self, arrays):
        return jax.device_put(arrays)

    def copy_async(self, arrays) -> None:
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def to_host(self, arrays):
        return jax.device_get(arrays)

    def encode_frame(self, image: np.ndarray) -> list[Array]:
        pixels = normalize_frame(jax.device_put(image), *self._range, self.dtype)
        return encode_frame(self.model, self.params, pixels)

    def condition_frame(self, coarse: Array, bank: MemoryBank, info: FrameInfo) -> Array:
        return condition_frame(self.model, self.params, coarse, bank, info)

    def prompt_frame(
        self, features: list[Array], conditioned: Array | None, points, mask_input, *, multimask: bool
    ) -> FrameOutput:
        frame = features, conditioned, points, mask_input
        return prompt_frame(self.model, self.params, *frame, multimask=multimask)

    def mask_frame(self, features: list[Array], mask: np.ndarray) -> FrameOutput:
        return mask_frame(self.model, self.params, features, mask)

    def memorize_prompted(self, coarse: Array, output: FrameOutput) -> FrameOutput:
        return memorize_prompted(self.model, self.params, coarse, output, self.memory_bits)

    def track_frame(
        self, features: list[Array], conditioned: Array, bank: MemoryBank, cond: FrameOutput, is_cond: np.ndarray
    ) -> tuple[FrameOutput, MemoryBank]:
        return track_frame(self.model, self.params, features, conditioned, bank, cond, is_cond, self.memory_bits)

    def resize(self, maps: Array, size: tuple[int, int], *, count: int | None = None, antialias: bool = False) -> Array:
        return resize_maps(maps, size, count, antialias)

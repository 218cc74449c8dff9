"""Objects tracked through a clip: the counterpart of sam2's SAM2VideoPredictor (SAM 2, arXiv 2408.00714, section 4)."""

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.models.params import check_params
from sam2jq.models.sam2 import SAM2, is_image_only
from sam2jq.predictors import video_steps
from sam2jq.predictors.bank_arrays import FrameInfo, FrameOutput, MemoryBank
from sam2jq.predictors.image import check_default, float_dtype
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompted_video import PromptedVideo

Array = jax.Array


class VideoPredictor(PromptedVideo, FromPretrained):
    """Tracks objects through a clip.

        predictor = VideoPredictor(model, params)   # or VideoPredictor.from_pretrained("demo")
        state = predictor.init_state("clip.mp4")
        predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[x, y]], labels=[1])
        for frame_idx, obj_ids, masks in predictor.propagate_in_video(state):
            masks > 0  # [objects, 1, H, W]

    The methods, their arguments and their results are those of SAM2VideoPredictor, without its hole filling. XLA
    compiles once per clip, and once per new number of objects (padded to 1, 2, 4, 8, ...), of conditioning frames or
    of points. As in the original, a prompt on a frame that was tracked before corrects that frame, and tracking again
    overwrites it unless `add_all_frames_to_correct_as_cond`.
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
        dtype: str = "float32",
    ):
        """A predictor of `model` with `params`; dtype: of the activations.

        Raises UserError for fill_hole_area, non_overlap_masks or clear_non_cond_mem_around_input other than the
        default: these options of the original are not implemented. Raises it for params without the memory, or of
        another model, too.
        """
        check_default("fill_hole_area", fill_hole_area, 0)
        check_default("non_overlap_masks", non_overlap_masks, False)
        check_default("clear_non_cond_mem_around_input", clear_non_cond_mem_around_input, False)
        check_params(type(self).__name__, model, params)
        if is_image_only(params):
            raise UserError(
                "this is an image-only model, without the weights of the memory, which tracking needs: load the "
                "checkpoint of the video model, or use ImagePredictor"
            )
        self.model, self.params, self.dtype = model, params, float_dtype(dtype)
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond

    @property
    def image_size(self) -> int:
        return self.model.variant.image_size

    def batch_size(self, objects: int) -> int:
        """The next power of 2: XLA compiles once per number of objects."""
        return 2 ** (objects - 1).bit_length()

    def encode_frame(self, image: np.ndarray) -> list[Array]:
        return video_steps.encode_frame(self.model, self.params, jnp.asarray(image, self.dtype))

    def prompt_frame(
        self, features: list[Array], bank: MemoryBank | None, info: FrameInfo, points, mask_input, *, multimask: bool
    ) -> FrameOutput:
        state = features, bank, info, points, mask_input
        return video_steps.prompt_frame(self.model, self.params, *state, multimask=multimask)

    def mask_frame(self, features: list[Array], mask: np.ndarray) -> FrameOutput:
        return video_steps.mask_frame(self.model, self.params, features, mask)

    def memorize_prompted(self, coarse: Array, output: FrameOutput) -> FrameOutput:
        return video_steps.memorize_prompted(self.model, self.params, coarse, output)

    def track_frame(
        self, image: np.ndarray, bank: MemoryBank, cond: FrameOutput, is_cond: np.ndarray, info: FrameInfo
    ) -> tuple[FrameOutput, MemoryBank]:
        image = jnp.asarray(image, self.dtype)
        return video_steps.track_frame(self.model, self.params, image, bank, cond, is_cond, info)

    def resize(self, maps: Array, size: tuple[int, int], *, antialias: bool = False) -> np.ndarray:
        return np.asarray(video_steps.resize_maps(maps, size, antialias))

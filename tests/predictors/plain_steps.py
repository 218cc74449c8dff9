"""A predictor of clips whose steps are sums, for tests of what is stored: fast, and every memory shows in the masks."""

import numpy as np

from sam2jq.predictors.bank_arrays import EMPTY, FrameOutput, shift_bank
from sam2jq.predictors.prompted_video import PromptedVideo
from sam2jq.predictors.video_state import stack


def output(value: float, memory: bool = True) -> FrameOutput:
    """An output of which every number is `value`."""
    full = lambda *shape: np.full(shape, value, np.float32)
    return FrameOutput(full(1, 8, 8), full(1, 4), full(1, 1), full(1, 2, 2, 3) if memory else None)


class PlainVideo(PromptedVideo):
    image_size = 32

    def __init__(self, clear=False, everywhere=False, max_cond=-1):
        self.fill_hole_area, self.non_overlap_masks = 0, False
        self.clear_non_cond_mem_around_input, self.clear_non_cond_mem_for_multi_obj = clear, True
        self.add_all_frames_to_correct_as_cond, self.max_cond_frames_in_attn = everywhere, max_cond

    def encode_frame(self, image):
        return [image.mean(keepdims=True)]

    def condition_frame(self, coarse, bank, info):
        age = np.arange(bank.non_cond_valid.shape[1])
        pointers = (bank.non_cond_pointer[..., 0] * bank.non_cond_valid * 0.9**age).sum(1)
        memories = (bank.non_cond_memory.mean((2, 3, 4)) * bank.non_cond_valid[:, :6]).sum(1)
        cond = (bank.cond_memory.mean((2, 3, 4)) * (bank.cond_frames != EMPTY)).sum(1)
        return np.sin(coarse.ravel() + pointers + 2 * memories + 3 * cond)

    def prompt_frame(self, features, conditioned, points, mask_input, *, multimask):
        earlier = 0 if mask_input is None else mask_input.mean()
        before = 0 if conditioned is None else conditioned[0]
        return output(np.sin(features[0].item() + points[0].sum() + earlier + before), memory=False)

    def mask_frame(self, features, mask):
        return output(mask.mean(), memory=False)

    def memorize_prompted(self, coarse, out):
        return output(out.mask.mean() + 1)

    def track_frame(self, features, conditioned, bank, cond, is_cond):
        own = [FrameOutput(*(part[i : i + 1] for part in cond)) if is_cond[i] else output(value)
               for i, value in enumerate(conditioned)]  # fmt: skip
        return stack(own), shift_bank(bank, stack(own), ~is_cond, np.concatenate)

    def resize(self, maps, size, *, count=None, antialias=False):
        maps = np.asarray(maps[:count], np.float32)
        return np.broadcast_to(maps.mean((1, 2))[:, None, None], (len(maps), *size)).copy()

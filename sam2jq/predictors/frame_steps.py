"""What a predictor of clips computes for one frame, in arrays of jax or of numpy: letters as in memory_bank.py.

S is the model's image side.
"""

import numpy as np

from sam2jq.predictors.bank_arrays import FrameInfo, FrameOutput, MemoryBank


class FrameSteps:
    """The steps of one frame, which a predictor of clips implements in its own kind of arrays.

    encodes_ahead: whether the next frame is encoded while the results of a frame come to the host, for steps that
    return before they are computed.
    """

    encodes_ahead = False

    @property
    def image_size(self) -> int:
        """S, the side of the model's input in pixels."""
        raise NotImplementedError

    def batch_size(self, objects: int) -> int:
        """How many objects are tracked where there are so many; more if the steps are compiled for each number."""
        return objects

    def to_device(self, arrays):
        """A tree of numpy arrays as arrays that the steps take without another copy."""
        return arrays

    def copy_async(self, arrays) -> None:
        """Starts to copy a tree of results of the steps to the host."""

    def to_host(self, arrays):
        """A tree of results of the steps as numpy arrays."""
        return arrays

    def encode_frame(self, image: np.ndarray) -> list:
        """The feature maps of a frame uint8 [1, S, S, 3]; the last is the coarsest."""
        raise NotImplementedError

    def condition_frame(self, coarse, bank: MemoryBank, info: FrameInfo):
        """The coarsest map [1, h, w, C] of a frame conditioned on the memories of B objects, [B, h, w, C]."""
        raise NotImplementedError

    def prompt_frame(self, features: list, conditioned, points, mask_input, *, multimask: bool) -> FrameOutput:
        """An object from points on a frame, with `condition_frame` of it or None; mask_input: earlier logits."""
        raise NotImplementedError

    def mask_frame(self, features: list, mask: np.ndarray) -> FrameOutput:
        """An object from its mask bool [1, S, S, 1]."""
        raise NotImplementedError

    def memorize_prompted(self, coarse, output: FrameOutput) -> FrameOutput:
        """`output` [1, ...] of a prompted frame with its memory, made from the thresholded mask."""
        raise NotImplementedError

    def track_frame(
        self, features: list, conditioned, bank: MemoryBank, cond: FrameOutput, is_cond: np.ndarray
    ) -> tuple[FrameOutput, MemoryBank]:
        """The objects in one frame of a clip, from its maps and `condition_frame`, and the bank for the next frame.

        Where `is_cond` [B], this is a conditioning frame of the object: its output is `cond`, which the bank holds
        already.
        """
        raise NotImplementedError

    def resize(self, maps, size: tuple[int, int], *, count: int | None = None, antialias: bool = False):
        """Maps [B, h, w] -> float32 [count, *size], bilinear; the first `count` of them, None for all."""
        raise NotImplementedError

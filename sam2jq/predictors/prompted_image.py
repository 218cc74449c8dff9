"""What the predictors of one image share: prompts checked, masks of the image's size; without jax and torch."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sam2jq.data.images import preprocess, rgb_pixels
from sam2jq.errors import UserError
from sam2jq.predictors.prompts import LOGIT_LIMIT, mask_logits, point_prompts


class PromptMasks(NamedTuple):
    """Masks of P prompts, M of each: 3 with multimask, else 1."""

    masks: Any  # logits [P, M, S / 4, S / 4]
    ious: Any  # [P, M] estimated IoU of each mask, 0..1


class PromptedImage:
    """Segments one image at a time. A subclass computes, in its own kind of arrays: `encode`, `decode`, `enlarge`.

    mask_threshold: of the logits. max_hole_area, max_sprinkle_area: holes and regions of masks up to this many pixels,
    of a low-resolution mask [S / 4, S / 4], are filled and removed; the logits of the third result stay as they are.
    """

    mask_threshold: float
    max_hole_area: float
    max_sprinkle_area: float

    @property
    def image_size(self) -> int:
        """S, the side of the model's input in pixels."""
        raise NotImplementedError

    def encode(self, image: np.ndarray) -> list:
        """The feature maps of a preprocessed image [1, S, S, 3]; the last is the coarsest."""
        raise NotImplementedError

    def decode(self, features: list, points, masks, *, multimask: bool) -> PromptMasks:
        """Masks of P prompts; points: (float [P, N, 2] in pixels of S x S, int [P, N]); masks: [P, S / 4, S / 4, 1]."""
        raise NotImplementedError

    def enlarge(self, masks, size: tuple[int, int]) -> np.ndarray:
        """Logits [P, M, h, w] -> float32 [P, M, *size], bilinear."""
        raise NotImplementedError

    def reset_predictor(self) -> None:
        """Removes the image and its features."""
        self._features, self._orig_hw = None, None

    def set_image(self, image) -> None:
        """Encodes an image, uint8 [H, W, 3] RGB or a PIL image, for later calls of `predict`."""
        self.reset_predictor()  # as in the original: after an error, no result is of the image before
        image = rgb_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
        self._features = self.encode(preprocess(image, self.image_size)[None])
        self._orig_hw = image.shape[:2]

    def get_image_embedding(self):
        """The coarsest feature map [1, S / 16, S / 16, C] of the image."""
        return self._require_image()[-1]

    def predict(
        self,
        point_coords=None,
        point_labels=None,
        box=None,
        mask_input=None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks [M, H, W] of the image's size, their estimated IoU [M], and logits [M, S / 4, S / 4], all float32.

        P > 1 prompts add a leading axis P. Masks are 0 and 1, or logits with `return_logits`.

        point_coords: [N, 2] or [P, N, 2], x and y in pixels of the image, or in 0..1 with normalize_coords=False.
        point_labels: [N] or [P, N], 1 foreground, 0 background, 2 and 3 the corners of a box. box: [4] or [P, 4], x0 y0
        x1 y1; [0, 4] gives results with P = 0.
        mask_input: logits [1, S / 4, S / 4] or [P, 1, S / 4, S / 4] of an earlier call, not a mask.
        multimask_output: M = 3 masks per prompt, for ambiguous prompts, else 1.

        Raises UserError if prompts have the wrong shape, are not finite, or if mask_input holds a mask; RuntimeError if
        no image is set.
        """
        features = self._require_image()
        size = self._orig_hw if normalize_coords else (1, 1)
        points = None
        if not (point_coords is None and point_labels is None and box is None):
            points = point_prompts(point_coords, point_labels, box, size, self.image_size)
        masks = None if mask_input is None else mask_logits(mask_input, self.image_size // 4)
        if points is not None and masks is not None and len(masks) not in (1, len(points[0])):
            raise UserError(f"{len(points[0])} point or box prompts but {len(masks)} mask_input: give 1 or as many")
        if points is not None and len(points[0]) == 0:
            return self._no_results(3 if multimask_output else 1)
        out = self.decode(features, points, masks, multimask=multimask_output)
        full = self.enlarge(self._cleaned(out.masks), self._orig_hw)
        if not return_logits:
            full = (full > self.mask_threshold).astype(np.float32)
        low_res = np.clip(np.asarray(out.masks, np.float32), -LOGIT_LIMIT, LOGIT_LIMIT)
        results = full, np.asarray(out.ious, np.float32), low_res
        return tuple(x[0] for x in results) if len(full) == 1 else results

    def _cleaned(self, masks):
        """Mask logits [P, M, h, w] without small holes and small regions."""
        if not (self.max_hole_area > 0 or self.max_sprinkle_area > 0):
            return masks
        from sam2jq.predictors.regions import remove_small_regions  # which needs scipy

        flat = np.asarray(masks, np.float32).reshape(-1, *masks.shape[2:])
        cleaned = remove_small_regions(flat, self.mask_threshold, self.max_hole_area, self.max_sprinkle_area)
        return cleaned.reshape(masks.shape)

    def _no_results(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `predict` returns for no prompt, with `count` masks per prompt."""
        side = self.image_size // 4
        shapes = (0, count, *self._orig_hw), (0, count), (0, count, side, side)
        return tuple(np.zeros(shape, np.float32) for shape in shapes)

    def _require_image(self) -> list:
        if self._features is None:
            raise RuntimeError("no image is set: call set_image before predict")
        return self._features

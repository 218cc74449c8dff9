"""What the predictors of one image share: prompts checked, masks of the image's size; without jax and torch."""

from typing import NamedTuple

import numpy as np

from sam2jq.data.images import pixels_of, preprocess
from sam2jq.errors import UserError
from sam2jq.predictors.prompts import LOGIT_LIMIT, mask_logits, point_prompts


class PromptMasks(NamedTuple):
    """Masks of P prompts, M of each: 3 with multimask, else 1."""

    masks: np.ndarray  # logits float32 [P, M, S / 4, S / 4]
    ious: np.ndarray  # float32 [P, M] estimated IoU of each mask, 0..1


class EncodedImage(NamedTuple):
    """What a predictor keeps of an image: feature maps [1, ...], and its size (H, W) in pixels."""

    features: list
    size: tuple[int, int]


class PromptedImage:
    """Segments images. A subclass computes, in its own kind of arrays: `encode`, `decode`, `enlarge`.

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
        """Masks of P prompts; points: (float [P, N, 2] in pixels of S x S, int [P, N]); masks: [P, S / 4, S / 4, 1].

        Either may be None.
        """
        raise NotImplementedError

    def enlarge(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Logits [h, w] -> float32 [*size], bilinear."""
        raise NotImplementedError

    def reset_predictor(self) -> None:
        """Removes the image, or the batch of images, and its features."""
        self._images: list[EncodedImage] = []
        self._is_batch = False

    def set_image(self, image) -> None:
        """Encodes an image, uint8 [H, W, 3] RGB or a PIL image, for later calls of `predict`."""
        self.reset_predictor()  # as in the original: after an error, no result is of the image before
        self._images = [self._encode(image)]

    def set_image_batch(self, image_list: list) -> None:
        """Encodes images, as `set_image` takes them and of any sizes, for later calls of `predict_batch`.

        They are encoded one after another, so that batches of all lengths share one compiled program.
        Raises UserError if `image_list` is no list, or empty.
        """
        self.reset_predictor()
        if not isinstance(image_list, list | tuple) or not image_list:
            raise UserError("image_list must be a list of one image at least, each uint8 [H, W, 3]")
        self._images, self._is_batch = [self._encode(image) for image in image_list], True

    def _encode(self, image) -> EncodedImage:
        image = pixels_of(image)
        return EncodedImage(self.encode(preprocess(image, self.image_size)[None]), image.shape[:2])

    def get_image_embedding(self):
        """The coarsest feature map [1, S / 16, S / 16, C] of the image, or [B, ...] of a batch."""
        if not self._images:
            raise RuntimeError("no image is set: call set_image first")
        embeddings = [image.features[-1] for image in self._images]
        return np.concatenate(embeddings) if self._is_batch else embeddings[0]

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
        if not self._images or self._is_batch:
            how = "a batch of images is set: call predict_batch, or" if self._is_batch else "no image is set:"
            raise RuntimeError(f"{how} call set_image before predict")
        prompt = point_coords, point_labels, box, mask_input
        return self._predict(self._images[0], prompt, multimask_output, return_logits, normalize_coords)

    def predict_batch(
        self,
        point_coords_batch=None,
        point_labels_batch=None,
        box_batch=None,
        mask_input_batch=None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Lists of what `predict` returns for each image of `set_image_batch`.

        Each argument is a list with that of `predict` for each image, or None for all of them.
        Raises UserError if a list is not as long as the batch, and as `predict` does.
        """
        if not self._is_batch:
            raise RuntimeError("no batch of images is set: call set_image_batch before predict_batch")
        count = len(self._images)
        batches = {"point_coords_batch": point_coords_batch, "point_labels_batch": point_labels_batch,
                   "box_batch": box_batch, "mask_input_batch": mask_input_batch}  # fmt: skip
        for name, batch in batches.items():
            if batch is not None and len(batch) != count:
                raise UserError(f"{name} has {len(batch)} entries for {count} images: give one each, or None for one")
        prompts = zip(*([None] * count if batch is None else batch for batch in batches.values()))
        options = multimask_output, return_logits, normalize_coords
        results = [self._predict(image, prompt, *options) for image, prompt in zip(self._images, prompts)]
        return tuple(map(list, zip(*results)))

    def _predict(self, image: EncodedImage, prompt: tuple, multimask: bool, logits: bool, normalize: bool):
        """What `predict` returns for an image and its point_coords, point_labels, box and mask_input."""
        coords, labels, box, mask_input = prompt
        side, size = self.image_size, image.size
        points = None
        if not (coords is None and labels is None and box is None):
            points = point_prompts(coords, labels, box, size if normalize else (1, 1), side)
        masks = None if mask_input is None else mask_logits(mask_input, side // 4)
        if points is not None and masks is not None and len(masks) not in (1, len(points[0])):
            raise UserError(f"{len(points[0])} point or box prompts but {len(masks)} mask_input: give 1 or as many")
        if points is not None and len(points[0]) == 0:
            return self._no_results(3 if multimask else 1, size)
        low_res, ious = self.decode(image.features, points, masks, multimask=multimask)
        full = np.empty((*low_res.shape[:2], *size), np.float32)
        for index, mask in zip(np.ndindex(low_res.shape[:2]), self._cleaned(low_res).reshape(-1, *low_res.shape[2:])):
            scaled = self.enlarge(mask, size)
            full[index] = scaled if logits else scaled > self.mask_threshold
        results = full, ious, np.clip(low_res, -LOGIT_LIMIT, LOGIT_LIMIT)
        return tuple(x[0] for x in results) if len(full) == 1 else results

    def _cleaned(self, low_res: np.ndarray) -> np.ndarray:
        """Mask logits [P, M, h, w] without small holes and small regions."""
        if not (self.max_hole_area > 0 or self.max_sprinkle_area > 0):
            return low_res
        from sam2jq.predictors.regions import remove_small_regions  # which needs scipy

        flat = low_res.reshape(-1, *low_res.shape[2:])
        cleaned = remove_small_regions(flat, self.mask_threshold, self.max_hole_area, self.max_sprinkle_area)
        return cleaned.reshape(low_res.shape)

    def _no_results(self, count: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `predict` returns for no prompt on an image of `size`, with `count` masks per prompt."""
        side = self.image_size // 4
        shapes = (0, count, *size), (0, count), (0, count, side, side)
        return tuple(np.zeros(shape, np.float32) for shape in shapes)

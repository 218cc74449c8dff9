"""Masks from prompts on one image: the counterpart of sam2's SAM2ImagePredictor."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data import preprocess
from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded
from sam2jq.models.layers import resize
from sam2jq.models.sam2 import SAM2

Array = jax.Array
LOGIT_LIMIT = 32.0  # low-resolution logits are handed out within +- this


@partial(jax.jit, static_argnames="model")
def encode_images(model: SAM2, params: dict, images: Array) -> list[Array]:
    """Preprocessed images [B, S, S, 3] -> the three feature maps that `decode` takes, in the images' dtype."""
    features = model.apply({"params": params}, images, method="encode_image")
    return model.apply({"params": params}, features, method="add_no_memory_embed")


def decode(model: SAM2, params: dict, features: list[Array], points, masks=None, *, multimask: bool) -> Decoded:
    """Masks of P prompts on one image's features; see SAM2.decode_masks.

    What `encode_images` reads is left out, so that models which differ there only share one program.
    """
    read = {name: part for name, part in params.items() if name != "image_encoder"}
    return _decode(model, read, features, points, masks, multimask=multimask)


@partial(jax.jit, static_argnames=("model", "multimask"))
def _decode(model: SAM2, params: dict, features: list[Array], points, masks, *, multimask: bool) -> Decoded:
    return model.apply({"params": params}, features, points, masks, multimask=multimask, method="decode_masks")


class ImagePredictor:
    """Segments one image at a time.

        predictor = ImagePredictor(model, params)
        predictor.set_image(image)
        masks, scores, low_res = predictor.predict(point_coords=[[x, y]], point_labels=[1])

    Each new number of points, of prompts, or image size compiles once.
    """

    def __init__(self, model: SAM2, params: dict, mask_threshold: float = 0.0, dtype: str = "float32"):
        self.model, self.params = model, params
        self.mask_threshold, self.dtype = mask_threshold, dtype
        self.reset_predictor()

    def reset_predictor(self) -> None:
        """Forgets the image."""
        self._features, self._orig_hw = None, None

    def set_image(self, image) -> None:
        """Encodes an image, uint8 [H, W, 3] RGB or a PIL image, for the calls of `predict` that follow."""
        image = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        batch = jnp.asarray(preprocess(image, self.model.variant.image_size)[None], self.dtype)
        self._features = encode_images(self.model, self.params, batch)
        self._orig_hw = image.shape[:2]

    def get_image_embedding(self) -> Array:
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
        """Masks [M, H, W] of the image's size, their estimated IoU [M], and logits [M, S / 4, S / 4]; with a leading
        axis of P when P > 1 prompts are given. Masks are 0 and 1 in float32, or logits with `return_logits`.

        point_coords: [N, 2] or [P, N, 2], x and y in pixels of the image, or in 0..1 without `normalize_coords`.
        point_labels: [N] or [P, N], 1 foreground, 0 background. box: [4] or [P, 4], x0 y0 x1 y1.
        mask_input: logits [1, S / 4, S / 4] or [P, 1, S / 4, S / 4] of an earlier call.
        multimask_output: M = 3 masks for an ambiguous prompt, else 1.
        """
        features = self._require_image()
        size = self._orig_hw if normalize_coords else (1, 1)
        points = None
        if not (point_coords is None and point_labels is None and box is None):
            points = point_prompts(point_coords, point_labels, box, size, self.model.variant.image_size)
        masks = None if mask_input is None else self._mask_prompt(mask_input)
        if points is not None and masks is not None and len(masks) not in (1, len(points[0])):
            raise UserError(f"{len(points[0])} point or box prompts but {len(masks)} mask_input: give 1 or as many")
        out = decode(self.model, self.params, features, points, masks, multimask=multimask_output)
        low_res = out.masks.astype(jnp.float32)
        full = resize(jnp.moveaxis(low_res, 1, -1), self._orig_hw)
        full = np.moveaxis(np.asarray(full), -1, 1)
        if not return_logits:
            full = (full > self.mask_threshold).astype(np.float32)
        low_res = np.clip(np.asarray(low_res), -LOGIT_LIMIT, LOGIT_LIMIT)
        results = full, np.asarray(out.ious, np.float32), low_res
        return tuple(x[0] for x in results) if len(full) == 1 else results

    def _require_image(self) -> list[Array]:
        if self._features is None:
            raise RuntimeError("no image is set: call set_image before predict")
        return self._features

    def _mask_prompt(self, mask_input) -> np.ndarray:
        """[P, S / 4, S / 4, 1]."""
        mask, side = np.asarray(mask_input, np.float32), self.model.variant.image_size // 4
        if mask.ndim not in (3, 4) or mask.shape[-3:] != (1, side, side):
            raise UserError(f"mask_input {list(mask.shape)} must be [1, {side}, {side}] or [P, 1, {side}, {side}]")
        return np.moveaxis(mask.reshape(-1, 1, side, side), 1, -1)


def point_prompts(coords, labels, box, size: tuple[int, int], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [P, N, 2] in pixels of the model's image and labels [P, N]; a box is two points before the others.

    coords [N, 2] or [P, N, 2], labels [N] or [P, N], box [4] or [P, 4], in pixels of an image of (height, width).
    """
    if (coords is None) != (labels is None):
        raise UserError("point_coords and point_labels go together: give both or neither")
    prompts = []
    if box is not None:
        corners = np.asarray(box, np.float32).reshape(-1, 2, 2)
        prompts.append((corners, np.tile(np.array([[2, 3]], np.int32), (len(corners), 1))))
    if coords is not None:
        coords, labels = np.asarray(coords, np.float32), np.asarray(labels, np.int32)
        if coords.shape[-1:] != (2,) or coords.shape[:-1] != labels.shape or labels.ndim not in (1, 2):
            raise UserError(
                f"point_coords {list(coords.shape)} and point_labels {list(labels.shape)} must be [N, 2] and [N], "
                "or [P, N, 2] and [P, N]"
            )
        if not np.isin(labels, (-1, 0, 1)).all():
            raise UserError("point_labels must be 1 (foreground), 0 (background) or -1 (padding)")
        prompts.append((coords.reshape(-1, *coords.shape[-2:]), labels.reshape(-1, labels.shape[-1])))
    if len({len(coords) for coords, _ in prompts}) > 1:
        raise UserError("box and point_coords must hold the same number of prompts")
    coords, labels = (np.concatenate(part, axis=1) for part in zip(*prompts))
    return coords / np.array(size[::-1], np.float32) * image_size, labels

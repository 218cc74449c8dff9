"""Masks from prompts on one image: the counterpart of sam2's SAM2ImagePredictor."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sam2jq.data import preprocess
from sam2jq.data.images import rgb_pixels
from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded
from sam2jq.models.layers import resize
from sam2jq.models.params import check_params
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompts import LOGIT_LIMIT, mask_logits, point_prompts

Array = jax.Array


@partial(jax.jit, static_argnames="model")
def encode_images(model: SAM2, params: dict, images: Array) -> list[Array]:
    """Preprocessed images [B, S, S, 3] -> the three feature maps for `decode`, in the images' dtype."""
    features = model.apply({"params": params}, images, method="encode_image")
    return model.apply({"params": params}, features, method="add_no_memory_embed")


def decode(model: SAM2, params: dict, features: list[Array], points, masks=None, *, multimask: bool) -> Decoded:
    """Masks of P prompts on one image's features; see `SAM2.decode_masks`.

    The image encoder's params are not passed on, so that models which differ only there share one compiled program.
    """
    decoder_params = {name: part for name, part in params.items() if name != "image_encoder"}
    return _decode(model, decoder_params, features, points, masks, multimask=multimask)


@partial(jax.jit, static_argnames=("model", "multimask"))
def _decode(model: SAM2, params: dict, features: list[Array], points, masks, *, multimask: bool) -> Decoded:
    return model.apply({"params": params}, features, points, masks, multimask=multimask, method="decode_masks")


class ImagePredictor(FromPretrained):
    """Segments one image at a time.

        predictor = ImagePredictor(model, params)   # or ImagePredictor.from_pretrained("demo")
        predictor.set_image(image)
        masks, scores, low_res = predictor.predict(point_coords=[[x, y]], point_labels=[1])

    The methods, their arguments and their results are those of SAM2ImagePredictor. XLA compiles once per number of
    points, of prompts, and image size.
    """

    def __init__(
        self,
        model: SAM2,
        params: dict,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        *,
        dtype: str = "float32",
    ):
        """A predictor of `model` with `params`; mask_threshold: of the logits; dtype: of the activations.

        Raises UserError for params of another model, and for max_hole_area or max_sprinkle_area other than 0: the
        original's clean-up of masks is not implemented.
        """
        check_default("max_hole_area", max_hole_area, 0)
        check_default("max_sprinkle_area", max_sprinkle_area, 0)
        check_params(type(self).__name__, model, params)
        self.model, self.params = model, params
        self.mask_threshold, self.dtype = mask_threshold, float_dtype(dtype)
        self.reset_predictor()

    def reset_predictor(self) -> None:
        """Removes the image and its features."""
        self._features, self._orig_hw = None, None

    def set_image(self, image) -> None:
        """Encodes an image, uint8 [H, W, 3] RGB or a PIL image, for later calls of `predict`."""
        self.reset_predictor()  # as in the original: after an error, no result is of the image before
        image = rgb_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
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
            points = point_prompts(point_coords, point_labels, box, size, self.model.variant.image_size)
        masks = None if mask_input is None else mask_logits(mask_input, self.model.variant.image_size // 4)
        if points is not None and masks is not None and len(masks) not in (1, len(points[0])):
            raise UserError(f"{len(points[0])} point or box prompts but {len(masks)} mask_input: give 1 or as many")
        if points is not None and len(points[0]) == 0:
            return self._no_results(3 if multimask_output else 1)
        out = decode(self.model, self.params, features, points, masks, multimask=multimask_output)
        low_res = out.masks.astype(jnp.float32)
        full = resize(jnp.moveaxis(low_res, 1, -1), self._orig_hw)
        full = np.moveaxis(np.asarray(full), -1, 1)
        if not return_logits:
            full = (full > self.mask_threshold).astype(np.float32)
        low_res = np.clip(np.asarray(low_res), -LOGIT_LIMIT, LOGIT_LIMIT)
        results = full, np.asarray(out.ious, np.float32), low_res
        return tuple(x[0] for x in results) if len(full) == 1 else results

    def _no_results(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `predict` returns for no prompt, with `count` masks per prompt."""
        side = self.model.variant.image_size // 4
        shapes = (0, count, *self._orig_hw), (0, count), (0, count, side, side)
        return tuple(np.zeros(shape, np.float32) for shape in shapes)

    def _require_image(self) -> list[Array]:
        if self._features is None:
            raise RuntimeError("no image is set: call set_image before predict")
        return self._features


def float_dtype(dtype) -> str:
    """The name of a floating-point dtype. Raises UserError for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise UserError(f"unknown dtype {dtype!r}; allowed: float32, bfloat16, float16") from error
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name} is not supported; allowed: float32, bfloat16, float16")
    return name


def check_default(name: str, value, default) -> None:
    """Raises UserError unless an option of the original that is not implemented has its default."""
    if value != default:
        raise UserError(f"{name}={value!r} is not supported; only its default {default!r} is")

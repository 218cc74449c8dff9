"""Masks from prompts on one image: the counterpart of sam2's SAM2ImagePredictor."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sam2jq.data import preprocess
from sam2jq.data.images import rgb_pixels
from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded
from sam2jq.models.params import check_params
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompts import LOGIT_LIMIT, mask_logits, padded_prompts, point_prompts, prompt_count
from sam2jq.predictors.regions import remove_small_regions
from sam2jq.predictors.upscale import Canvas, canvas_of, upscale

Array = jax.Array


@partial(jax.jit, static_argnames="model")
def encode_images(model: SAM2, params: dict, images: Array) -> list[Array]:
    """Preprocessed images [B, S, S, 3] -> the three feature maps for `decode`, in the images' dtype."""
    features = model.apply({"params": params}, images, method="encode_image")
    return model.apply({"params": params}, features, method="add_no_memory_embed")


def decode(
    model: SAM2, params: dict, features: list[Array], points, masks=None, point_mask=None, *, multimask: bool
) -> Decoded:
    """Masks of P prompts on one image's features; see `SAM2.decode_masks`.

    The image encoder's params are not passed on, so that models which differ only there share one compiled program.
    """
    decoder_params = {name: part for name, part in params.items() if name != "image_encoder"}
    return _decode(model, decoder_params, features, points, masks, point_mask, multimask=multimask)


@partial(jax.jit, static_argnames=("model", "multimask"))
def _decode(model: SAM2, params: dict, features, points, masks, point_mask, *, multimask: bool) -> Decoded:
    settings = {"multimask": multimask, "method": "decode_masks"}
    return model.apply({"params": params}, features, points, masks, point_mask, **settings)


class EncodedImage(NamedTuple):
    """What a predictor keeps of an image: feature maps [1, ...], and how masks get its size."""

    features: list[Array]
    canvas: Canvas


class ImagePredictor(FromPretrained):
    """Segments one image at a time.

        predictor = ImagePredictor(model, params)   # or ImagePredictor.from_pretrained("demo")
        predictor.set_image(image)
        masks, scores, low_res = predictor.predict(point_coords=[[x, y]], point_labels=[1])

    The methods, their arguments and their results are those of SAM2ImagePredictor. Numbers of points and of prompts
    are padded to powers of two and image sizes to multiples of 256 pixels, so that XLA compiles a handful of programs.
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

        max_hole_area, max_sprinkle_area: holes and regions of masks up to this many pixels, of a low-resolution mask
        [S / 4, S / 4], are filled and removed; the logits of the third result stay as they are.
        Raises UserError for params of another model.
        """
        check_params(type(self).__name__, model, params)
        self.model, self.params = model, params
        self.max_hole_area, self.max_sprinkle_area = max_hole_area, max_sprinkle_area
        self.mask_threshold, self.dtype = mask_threshold, float_dtype(dtype)
        self.reset_predictor()

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

        They are encoded one after another: a batch of images is no faster on a CPU, and would compile for each length.
        Raises UserError if `image_list` is no list, or empty.
        """
        self.reset_predictor()
        if not isinstance(image_list, list | tuple) or not image_list:
            raise UserError("image_list must be a list of one image at least, each uint8 [H, W, 3]")
        self._images, self._is_batch = [self._encode(image) for image in image_list], True

    def _encode(self, image) -> EncodedImage:
        image = rgb_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
        side = self.model.variant.image_size
        batch = jnp.asarray(preprocess(image, side)[None], self.dtype)
        features = encode_images(self.model, self.params, batch)
        return EncodedImage(features, canvas_of(side // 4, image.shape[:2]))

    def get_image_embedding(self) -> Array:
        """The coarsest feature map [1, S / 16, S / 16, C] of the image, or [B, ...] of a batch."""
        if not self._images:
            raise RuntimeError("no image is set: call set_image first")
        return jnp.concatenate([image.features[-1] for image in self._images])

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
        side, size = self.model.variant.image_size, image.canvas.size
        points = None
        if not (coords is None and labels is None and box is None):
            points = point_prompts(coords, labels, box, size if normalize else (1, 1), side)
        masks = None if mask_input is None else mask_logits(mask_input, side // 4)
        if points is not None and masks is not None and len(masks) not in (1, len(points[0])):
            raise UserError(f"{len(points[0])} point or box prompts but {len(masks)} mask_input: give 1 or as many")
        if points is not None and len(points[0]) == 0:
            return self._no_results(3 if multimask else 1, size)
        low_res, ious = self._decode(image.features, points, masks, multimask)
        full = self._full_size(self._cleaned(low_res), image.canvas)
        if not logits:
            full = (full > self.mask_threshold).astype(np.float32)
        results = full, ious, np.clip(low_res, -LOGIT_LIMIT, LOGIT_LIMIT)
        return tuple(x[0] for x in results) if len(full) == 1 else results

    def _decode(self, features: list[Array], points, masks, multimask: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mask logits [P, M, h, w] and IoUs [P, M], float32, in calls of the model for MOST_PROMPTS each."""
        padded = padded_prompts(points, masks)
        outs = [decode(self.model, self.params, features, *part, multimask=multimask) for part in padded]
        count = prompt_count(points, masks)
        join = lambda arrays: np.concatenate([np.asarray(x, np.float32) for x in arrays])[:count]
        return join(out.masks for out in outs), join(out.ious for out in outs)

    def _full_size(self, low_res: np.ndarray, canvas: Canvas) -> np.ndarray:
        """Mask logits [P, M, h, w] as [P, M, H, W] of the image's size."""
        height, width = canvas.size
        scaled = [upscale(mask, canvas) for mask in low_res.reshape(-1, 1, *low_res.shape[2:])]
        full = np.concatenate([np.asarray(mask)[:, :height, :width] for mask in scaled])
        return full.reshape(*low_res.shape[:2], height, width)

    def _cleaned(self, low_res: np.ndarray) -> np.ndarray:
        """Mask logits [P, M, h, w] without small holes and small regions."""
        flat = low_res.reshape(-1, *low_res.shape[2:])
        cleaned = remove_small_regions(flat, self.mask_threshold, self.max_hole_area, self.max_sprinkle_area)
        return cleaned.reshape(low_res.shape)

    def _no_results(self, count: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `predict` returns for no prompt on an image of `size`, with `count` masks per prompt."""
        side = self.model.variant.image_size // 4
        shapes = (0, count, *size), (0, count), (0, count, side, side)
        return tuple(np.zeros(shape, np.float32) for shape in shapes)


def float_dtype(dtype) -> str:
    """The name of a floating-point dtype. Raises UserError for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise UserError(f"unknown dtype {dtype!r}; allowed: float32, bfloat16, float16") from error
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name} is not supported; allowed: float32, bfloat16, float16")
    return name

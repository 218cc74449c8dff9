"""Masks from prompts on one image: the counterpart of sam2's SAM2ImagePredictor."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded
from sam2jq.models.layers import resize
from sam2jq.models.params import check_params
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompted_image import PromptedImage, PromptMasks

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


class ImagePredictor(PromptedImage, FromPretrained):
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

        max_hole_area, max_sprinkle_area: as in `PromptedImage`. Raises UserError for params of another model.
        """
        check_params(type(self).__name__, model, params)
        self.model, self.params = model, params
        self.max_hole_area, self.max_sprinkle_area = max_hole_area, max_sprinkle_area
        self.mask_threshold, self.dtype = mask_threshold, float_dtype(dtype)
        self.reset_predictor()

    @property
    def image_size(self) -> int:
        return self.model.variant.image_size

    def encode(self, image: np.ndarray) -> list[Array]:
        return encode_images(self.model, self.params, jnp.asarray(image, self.dtype))

    def decode(self, features: list[Array], points, masks, *, multimask: bool) -> PromptMasks:
        out = decode(self.model, self.params, features, points, masks, multimask=multimask)
        return PromptMasks(out.masks, out.ious)

    def enlarge(self, masks: Array, size: tuple[int, int]) -> np.ndarray:
        full = resize(jnp.moveaxis(masks.astype(jnp.float32), 1, -1), size)
        return np.moveaxis(np.asarray(full), -1, 1)


def float_dtype(dtype) -> str:
    """The name of a floating-point dtype. Raises UserError for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise UserError(f"unknown dtype {dtype!r}; allowed: float32, bfloat16, float16") from error
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name} is not supported; allowed: float32, bfloat16, float16")
    return name

"""Masks from prompts on one image: the counterpart of sam2's SAM2ImagePredictor."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.models.chunking import cpu_chunked_map
from sam2jq.models.decoder import Decoded
from sam2jq.models.params import check_params
from sam2jq.models.precision import cast_kernels, float_dtype
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompted_image import PromptedImage, PromptMasks
from sam2jq.predictors.prompts import padded_prompts, prompt_count
from sam2jq.predictors.upscale import canvas_of, upscale

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
    run = lambda prompts: model.apply({"params": params}, features, *prompts, **settings)
    width = math.prod(features[0].shape[1:])  # of the widest array, the decoder's upscaled image
    if points is not None and masks is not None and len(masks) < len(points[0]):  # one for all prompts
        return cpu_chunked_map(lambda x: run((x[0], masks, x[1])), (points, point_mask), width)
    return cpu_chunked_map(run, (points, masks, point_mask), width)


class ImagePredictor(PromptedImage, FromPretrained):
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
        dtype: str = "auto",
    ):
        """A predictor of `model` with `params`; mask_threshold: of the logits; dtype: of the activations, as
        `float_dtype` takes it.

        max_hole_area, max_sprinkle_area: as in `PromptedImage`. Raises UserError for params of another model.
        """
        check_params(type(self).__name__, model, params)
        self.model, self.dtype = model, float_dtype(dtype)
        self.params = cast_kernels(params, self.dtype)
        self.max_hole_area, self.max_sprinkle_area = max_hole_area, max_sprinkle_area
        self.mask_threshold = mask_threshold
        self.reset_predictor()

    @property
    def image_size(self) -> int:
        return self.model.variant.image_size

    def encode(self, image: np.ndarray) -> list[Array]:
        return encode_images(self.model, self.params, jnp.asarray(image, self.dtype))

    def decode(self, features: list[Array], points, masks, *, multimask: bool) -> PromptMasks:
        """As in `PromptedImage`, in calls of the model for MOST_PROMPTS each."""
        padded = padded_prompts(points, masks)
        outs = [decode(self.model, self.params, features, *part, multimask=multimask) for part in padded]
        count = prompt_count(points, masks)
        join = lambda arrays: np.concatenate([np.asarray(x, np.float32) for x in arrays])[:count]
        return PromptMasks(join(out.masks for out in outs), join(out.ious for out in outs))

    def enlarge(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        return np.asarray(upscale(mask[None], canvas_of(len(mask), size)))[0, :height, :width]

"""Agreement of a quantized model with full precision, image by image, in constant memory."""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sam2jq.data import preprocess
from sam2jq.data.prompts import click_grid
from sam2jq.errors import UserError
from sam2jq.eval.metrics import iou
from sam2jq.models.precision import float_dtype
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.image import decode, encode_images

STRIDES = (4, 8, 16)


class ImageAgreement(NamedTuple):
    """The comparison of one image: squared norms of feature maps by stride, and the masks of P clicks."""

    difference: np.ndarray  # [3]: |quantized - full precision|^2
    reference: np.ndarray  # [3]: |full precision|^2
    ious: np.ndarray  # [P, 3] of quantized against full-precision masks
    best: np.ndarray  # [P]: index of the mask with the best estimated IoU in full precision
    masks: tuple[np.ndarray, np.ndarray]  # bool [P, 3, S / 4, S / 4]: full precision, quantized


def compare(
    model: SAM2, params: dict, quantized: dict, images: list[np.ndarray], side: int, dtype: str = "auto"
) -> Iterator[ImageAgreement]:
    """Yields one result per image of a batch of uint8 images [H, W, 3], for a grid of side * side clicks.

    params: full precision; quantized: the params to compare; dtype: of the images and activations, as
    `float_dtype` takes it.
    All three masks of every click are compared by index. Comparing only the best ones would compare two different
    masks where the order of their estimated IoUs changes.
    """
    points = click_grid(side, model.variant.image_size)
    squares = lambda maps: np.array([np.sum(np.square(np.asarray(m, np.float64))) for m in maps])
    inputs = np.stack([preprocess(image, model.variant.image_size) for image in images])
    inputs = jnp.asarray(inputs, float_dtype(dtype))
    full, small = encode_images(model, params, inputs), encode_images(model, quantized, inputs)
    for i in range(len(images)):
        before, after = ([level[i : i + 1] for level in maps] for maps in (full, small))
        outputs = [decode(model, p, maps, points, multimask=True) for p, maps in ((params, before), (quantized, after))]
        masks = tuple(np.asarray(out.masks) > 0 for out in outputs)
        best = np.asarray(outputs[0].ious).argmax(1)
        difference = squares(np.asarray(b, np.float32) - np.asarray(a, np.float32) for a, b in zip(before, after))
        yield ImageAgreement(difference, squares(before), iou(masks[1], masks[0]), best, masks)


def summarize(results: list[ImageAgreement]) -> dict:
    """{"feature_error": {"stride4": ...}, "mask_iou", "mask_iou_worst_image", "images", "prompts_per_image"}.

    Raises UserError if features are not finite.
    """
    error = np.sqrt(sum(r.difference for r in results) / sum(r.reference for r in results))
    if not np.isfinite(error).all():
        raise UserError("features are not finite: the model overflows in this dtype, give --model.dtype float32")
    per_image = [float(r.ious.mean()) for r in results]
    return {
        "feature_error": {f"stride{stride}": float(e) for stride, e in zip(STRIDES, error)},
        "mask_iou": float(np.mean(per_image)),
        "mask_iou_worst_image": min(per_image),
        "images": len(results),
        "prompts_per_image": len(results[0].ious),
    }

"""Statistics of each layer's inputs and outputs, recorded in linen collections while a model runs.

Letters: B batch, N rows, K input channels, C output channels. Nothing is recorded, and nothing is computed, unless
`apply(..., mutable=[...])` names the collection.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.quant.stats import FOLDS

Array = jax.Array
OUTPUTS = "outputs"  # collection of the moments of each layer's output, and of the trunk's stage maps


def is_capturing(module: nn.Module, *collections: str) -> bool:
    """Whether one of `collections` is being recorded."""
    return not module.is_initializing() and any(map(module.is_mutable_collection, collections))


def is_capturing_any(module: nn.Module) -> bool:
    """Whether calibration or distillation records the layers in `module`, which then must not run in chunks."""
    return is_capturing(module, *FOLDS, OUTPUTS)


def sow_input_stats(module: nn.Module, x: Array, token_mask: Array | None = None) -> None:
    """Adds a layer's input x [..., K] to each statistic in FOLDS that is being recorded.

    token_mask: bool [...], False at padding tokens, which are not counted; None counts all.
    """
    if is_capturing(module, *FOLDS):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        token_mask = None if token_mask is None else token_mask.reshape(-1)
        for name, fold in FOLDS.items():
            module.sow(name, "input", (rows, token_mask), reduce_fn=fold, init_fn=lambda: None)


def sow_patch_stats(module: nn.Module, images: Array, to_rows: Callable[[Array], Array]) -> None:
    """Adds the patches of images [B, H, W, C], as `to_rows` gives them for one image, to each statistic in FOLDS.

    One image at a time: a 7 x 7 kernel's patches take 49 times the memory of the image.
    """
    for name, fold in FOLDS.items():
        module.sow(name, "input", images, reduce_fn=partial(fold_each_image, fold, to_rows), init_fn=lambda: None)


def fold_each_image(fold: Callable, to_rows: Callable[[Array], Array], state: Array | tuple | None, images: Array):
    """`state` after `fold` of the rows [N, K] of each image in turn."""
    add = lambda state, image: fold(state, (to_rows(image).astype(jnp.float32), None))
    step = lambda state, image: (add(state, image), None)
    return jax.lax.scan(step, add(state, images[0]), images[1:])[0]


def sow_output_moments(module: nn.Module, y: Array) -> Array:
    """Returns y [..., C] and records its mean and variance per channel, float32 [C], in the collection OUTPUTS."""
    if is_capturing(module, OUTPUTS):
        rows = y.reshape(-1, y.shape[-1]).astype(jnp.float32)
        mean = rows.mean(0)
        # the variance has no gradient by way of the mean: it is a sum of deviations, which is 0 but costs a pass
        variance = jnp.square(rows - jax.lax.stop_gradient(mean)).mean(0)
        module.sow(OUTPUTS, "moments", (mean, variance))
    return y

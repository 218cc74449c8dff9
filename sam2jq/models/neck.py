"""The feature pyramid over Hiera's stages (arXiv 1612.03144)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.layers import Conv

Array = jax.Array


def double(x: Array) -> Array:
    """Nearest-neighbor upsampling, [B, H, W, C] -> [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Neck(nn.Module):
    """Stage maps at strides 4, 8, 16, 32 -> maps [B, H, W, features] at strides 4, 8, 16.

    Only stride 16 adds the upsampled coarser map; strides 4 and 8 are lateral alone, and stride 32 is not returned.
    """

    features: int

    @nn.compact
    def __call__(self, stages: list[Array]) -> list[Array]:
        last = len(stages) - 1
        lateral = [Conv(self.features, name=f"convs.{last - i}.conv")(x) for i, x in enumerate(stages)]
        return [lateral[0], lateral[1], lateral[2] + double(lateral[3])]

"""The prompt encoder: points, box corners and masks to embeddings (SAM, arXiv 2304.02643, section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.layers import Conv, LayerNorm, declare, gelu
from sam2jq.quant.exact import matmul

Array = jax.Array
LABELS = ("not_a_point_embed", *(f"point_embeddings.{i}" for i in range(4)))  # labels -1, 0, 1, 2, 3
EPS = 1e-6


class PromptEncoder(nn.Module):
    """Prompts -> sparse embeddings [P, N + 1, C], dense [P or 1, S/16, S/16, C], position encoding [S/16, S/16, C].

    points: (float [P, N, 2] in pixels of the model's S x S image, int labels [P, N]: 1 foreground, 0 background, 2 and
    3 the corners of a box, -1 padding). masks: logits [P, S/4, S/4, 1]. Either may be None.
    """

    features: int
    image_size: int

    @nn.compact
    def __call__(self, points: tuple[Array, Array] | None, masks: Array | None) -> tuple[Array, Array, Array]:
        gaussian = declare(self, "pe_layer.positional_encoding_gaussian_matrix", 2, self.features // 2)
        label_embeddings = jnp.concatenate([declare(self, f"{name}.weight", 1, self.features) for name in LABELS])
        no_mask = declare(self, "no_mask_embed.weight", 1, self.features)

        grid = self.image_size // 16
        centers = (jnp.arange(grid) + 0.5) / grid
        position = fourier(jnp.stack(jnp.meshgrid(centers, centers), -1), gaussian)
        sparse = jnp.zeros((1 if masks is None else len(masks), 0, self.features))
        if points is not None:
            sparse = self.embed_points(*points, gaussian, label_embeddings)
        dense = jnp.broadcast_to(no_mask, (1, grid, grid, self.features))
        if masks is not None:
            dense = self.embed_masks(masks)
        return sparse, dense, position

    def embed_points(self, points: Array, labels: Array, gaussian: Array, label_embeddings: Array) -> Array:
        """Embeddings [P, N + 1, C] of points [P, N, 2]; the last is a padding point, which SAM 2 appends when no box
        is given separately."""
        points = jnp.pad((points + 0.5) / self.image_size, ((0, 0), (0, 1), (0, 0)))  # + 0.5: the pixel's center
        labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
        position = jnp.where(labels[..., None] == -1, 0, fourier(points, gaussian))
        return position + label_embeddings[labels + 1]

    def embed_masks(self, masks: Array) -> Array:
        """Embeddings [P, H / 4, W / 4, C] of mask logits [P, H, W, 1]."""
        x = Conv(4, size=2, stride=2, name="mask_downscaling.0")(masks)
        x = gelu(LayerNorm(EPS, name="mask_downscaling.1")(x))
        x = Conv(16, size=2, stride=2, name="mask_downscaling.3")(x)
        x = gelu(LayerNorm(EPS, name="mask_downscaling.4")(x))
        return Conv(self.features, name="mask_downscaling.6")(x)


def fourier(xy: Array, gaussian: Array) -> Array:
    """Random Fourier features [..., C] of x, y [..., 2] in 0..1 at frequencies [2, C / 2] (arXiv 2006.10739)."""
    angle = 2 * jnp.pi * matmul(2 * xy - 1, gaussian)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)

"""The mask decoder: a two-way transformer between prompt tokens and the image (SAM, arXiv 2304.02643, appendix A)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.attention import attention
from sam2jq.models.capture import is_capturing_any
from sam2jq.models.layers import MLP, Conv, ConvTranspose, Dense, LayerNorm, declare, gelu

Array = jax.Array
MASKS = 4  # token 0 is the single mask of an unambiguous prompt, tokens 1..3 the three masks of an ambiguous one
STABILITY = (0.05, 0.98)  # logit offset, and the minimal ratio of areas of a stable single mask


class Decoded(NamedTuple):
    """Masks of P prompts. Letters: M masks per prompt (3 with multimask, else 1), C the decoder's width."""

    masks: Array  # logits [P, M, H, W] at stride 4
    ious: Array  # [P, M] estimated IoU of each mask, 0..1
    tokens: Array  # [P, M, C]
    object_scores: Array  # logits [P, 1]: whether the object is in the image


class Attention(nn.Module):
    """Multi-head attention, q [B, N, C] and k, v [B, M, C'] -> [B, N, C], with `features` channels inside.

    Either side may have a batch of 1 for a B of the other. key_mask: bool [B, M], False where a key is ignored.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
        heads = lambda x: x.reshape(*x.shape[:-1], self.heads, self.features // self.heads)
        width = q.shape[-1]
        q, k, v = (heads(Dense(self.features, name=f"{n}_proj")(x)) for n, x in (("q", q), ("k", k), ("v", v)))
        batch = max(len(q), len(k))
        if len(q) < batch:
            q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
        elif len(k) < batch:  # queries of one set of keys are one batch
            q = q.reshape(1, -1, *q.shape[2:])
        out = attention(q, k, v, key_mask).reshape(batch, -1, self.features)
        return Dense(width, name="out_proj")(out)


class TwoWayBlock(nn.Module):
    """Self-attention of tokens [P, N, C], token-to-image attention, MLP, then image-to-token attention.

    Returns both, the image as [P, H * W, C]; it may come as [1, H * W, C] for all prompts. first: the tokens'
    self-attention runs without position encoding. token_mask: bool [P, N], False where nothing attends to a token.
    """

    first: bool

    @nn.compact
    def __call__(self, tokens: Array, image: Array, token_position: Array, image_position: Array, token_mask):
        width = tokens.shape[-1]
        if self.first:  # the tokens equal their position encoding here, and there is no residual connection
            tokens = Attention(width, 8, name="self_attn")(tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_position
            tokens = tokens + Attention(width, 8, name="self_attn")(q, q, tokens, token_mask)
        tokens = LayerNorm(name="norm1")(tokens)

        q, k = tokens + token_position, image + image_position
        tokens = tokens + Attention(width // 2, 8, name="cross_attn_token_to_image")(q, k, image)
        tokens = LayerNorm(name="norm2")(tokens)
        tokens = LayerNorm(name="norm3")(tokens + MLP((2048, width), name="mlp")(tokens))

        q, k = tokens + token_position, image + image_position
        image = image + Attention(width // 2, 8, name="cross_attn_image_to_token")(k, q, tokens, token_mask)
        return tokens, LayerNorm(name="norm4")(image)


class TwoWayTransformer(nn.Module):
    """Tokens [P, N, C], image [P, H * W, C] and its position encoding [H * W, C] -> updated tokens and image."""

    @nn.compact
    def __call__(self, tokens: Array, image: Array, image_position: Array, token_mask) -> tuple[Array, Array]:
        token_position = tokens
        for i in range(2):
            block = TwoWayBlock(first=i == 0, name=f"layers.{i}")
            tokens, image = block(tokens, image, token_position, image_position, token_mask)
        attention = Attention(tokens.shape[-1] // 2, 8, name="final_attn_token_to_image")
        tokens = tokens + attention(tokens + token_position, image + image_position, image)
        return LayerNorm(name="norm_final_attn")(tokens), image


class MaskDecoder(nn.Module):
    """Image features and prompt embeddings -> `Decoded`: masks, estimated IoUs, tokens and object scores."""

    features: int

    @nn.compact
    def high_res_features(self, fine: Array, middle: Array) -> tuple[Array, Array]:
        """Maps at strides 4 and 8, [B, H, W, C], projected to C / 8 and C / 4 channels, once per image."""
        return Conv(self.features // 8, name="conv_s0")(fine), Conv(self.features // 4, name="conv_s1")(middle)

    def __call__(
        self, features, sparse: Array, dense: Array, position: Array, multimask: bool, sparse_mask=None
    ) -> Decoded:
        """Masks 1..3 with `multimask`, else the one of `stable_or_best`; arguments as in `decode`."""
        masks, ious, tokens, scores = self.decode(features, sparse, dense, position, sparse_mask)
        if multimask:
            return Decoded(masks[:, 1:], ious[:, 1:], tokens[:, 1:], scores)
        return Decoded(*stable_or_best(masks, ious), tokens[:, :1], scores)

    @nn.compact
    def decode(
        self, features, sparse: Array, dense: Array, position: Array, sparse_mask: Array | None = None
    ) -> Decoded:
        """All four masks of P prompts.

        features: maps [1 or P, H, W, C] at strides 4, 8, 16, the finer two from `high_res_features`; sparse:
        [P, N, C]; dense: [1 or P, h, w, C]; position: [h, w, C], from the prompt encoder. sparse_mask: bool [P, N],
        False where a prompt's embedding is ignored; None uses all.
        """
        fine, middle, coarse = features
        prompts = len(sparse)
        names = (("obj_score_token", 1), ("iou_token", 1), ("mask_tokens", MASKS))
        output = jnp.concatenate([declare(self, f"{name}.weight", rows, self.features) for name, rows in names])
        output = jnp.broadcast_to(output, (prompts, *output.shape))
        tokens = jnp.concatenate([output, sparse], axis=1).astype(coarse.dtype)
        token_mask = None
        if sparse_mask is not None:
            token_mask = jnp.concatenate([jnp.ones(output.shape[:2], bool), sparse_mask], axis=1)

        grid = coarse.shape[1:3]
        image = coarse + dense.astype(coarse.dtype)
        if is_capturing_any(self):  # the statistics of a layer count every prompt
            image = jnp.broadcast_to(image, (prompts, *image.shape[1:]))
        tokens, image = TwoWayTransformer(name="transformer")(
            tokens,
            image.reshape(len(image), -1, self.features),
            position.reshape(-1, self.features).astype(coarse.dtype),
            token_mask,
        )
        scores = MLP((self.features, self.features, 1), name="pred_obj_score_head")(tokens[:, 0])
        ious = jax.nn.sigmoid(MLP((256, 256, MASKS), name="iou_prediction_head")(tokens[:, 1]))
        tokens = tokens[:, 2 : 2 + MASKS]
        masks = self.predict_masks(tokens, image.reshape(prompts, *grid, -1), middle, fine)
        return Decoded(masks, ious, tokens, scores)

    @nn.compact
    def predict_masks(self, tokens: Array, image: Array, middle: Array, fine: Array) -> Array:
        """Mask logits [P, M, H, W]: the product of each token's hypernetwork output [C / 8] and the upscaled image.

        tokens: [P, M, C]; image: [1 or P, h, w, C], upscaled to the sizes of `middle` and `fine`, which are added.
        """
        x = ConvTranspose(self.features // 4, name="output_upscaling.0")(image) + middle
        x = gelu(LayerNorm(1e-6, name="output_upscaling.1")(x))
        x = gelu(ConvTranspose(self.features // 8, name="output_upscaling.3")(x) + fine)
        widths = (self.features, self.features, self.features // 8)
        kernels = [MLP(widths, name=f"output_hypernetworks_mlps.{i}")(tokens[:, i]) for i in range(MASKS)]
        masks = jnp.stack(kernels, 1) @ x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)
        return masks.reshape(*masks.shape[:2], *x.shape[1:3])


def stable_or_best(masks: Array, ious: Array) -> tuple[Array, Array]:
    """Mask 0 [P, 1, H, W] and its IoU [P, 1] where it is stable, else that of masks 1..3 with the best estimated IoU.

    A mask is stable if its areas at the thresholds +offset and -offset have a ratio of at least STABILITY[1] (SAM 2,
    appendix D.1, `dynamic_multimask_via_stability`).
    """
    offset, min_ratio = STABILITY
    inner, outer = ((masks[:, 0] > o).sum((-2, -1)) for o in (offset, -offset))
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= min_ratio
    choice = jnp.where(stable, 0, 1 + ious[:, 1:].argmax(-1))[:, None]
    return jnp.take_along_axis(masks, choice[..., None, None], 1), jnp.take_along_axis(ious, choice, 1)

"""The mask decoder: a two-way transformer between prompt tokens and the image (SAM, arXiv 2304.02643, appendix A)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.layers import MLP, Conv, ConvTranspose, Dense, LayerNorm, attention, declare, gelu

Array = jax.Array
MASKS = 4  # token 0 answers a clear prompt with one mask, tokens 1..3 an ambiguous one with three
STABILITY = (0.05, 0.98)  # logit offset and least ratio of areas at which the single mask counts as stable


class Decoded(NamedTuple):
    """Masks of P prompts: M is 3 of an ambiguous prompt, else 1; C the decoder's width."""

    masks: Array  # logits [P, M, H, W] at stride 4
    ious: Array  # [P, M] the model's estimate of each mask's IoU, 0..1
    tokens: Array  # [P, M, C]
    object_scores: Array  # logits [P, 1]: is the object there at all


class Attention(nn.Module):
    """q [B, N, C], k, v [B, M, C'] -> [B, N, C], inside in `features` channels."""

    features: int
    heads: int

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        heads = lambda x: x.reshape(*x.shape[:-1], self.heads, self.features // self.heads)
        projected = (Dense(self.features, name=f"{n}_proj")(x) for n, x in (("q", q), ("k", k), ("v", v)))
        out = attention(*map(heads, projected))
        return Dense(q.shape[-1], name="out_proj")(out.reshape(*out.shape[:2], self.features))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image, go through an MLP; then the image attends to the tokens."""

    first: bool

    @nn.compact
    def __call__(self, tokens: Array, image: Array, token_position: Array, image_position: Array):
        width = tokens.shape[-1]
        if self.first:  # the tokens are their own position still, and not yet anything to add to
            tokens = Attention(width, 8, name="self_attn")(tokens, tokens, tokens)
        else:
            q = tokens + token_position
            tokens = tokens + Attention(width, 8, name="self_attn")(q, q, tokens)
        tokens = LayerNorm(name="norm1")(tokens)

        q, k = tokens + token_position, image + image_position
        tokens = tokens + Attention(width // 2, 8, name="cross_attn_token_to_image")(q, k, image)
        tokens = LayerNorm(name="norm2")(tokens)
        tokens = LayerNorm(name="norm3")(tokens + MLP((2048, width), name="mlp")(tokens))

        q, k = tokens + token_position, image + image_position
        image = image + Attention(width // 2, 8, name="cross_attn_image_to_token")(k, q, tokens)
        return tokens, LayerNorm(name="norm4")(image)


class TwoWayTransformer(nn.Module):
    """tokens [P, N, C], image [P, H * W, C] and its position [H * W, C] -> both, having looked at each other."""

    @nn.compact
    def __call__(self, tokens: Array, image: Array, image_position: Array) -> tuple[Array, Array]:
        token_position = tokens
        for i in range(2):
            block = TwoWayBlock(first=i == 0, name=f"layers.{i}")
            tokens, image = block(tokens, image, token_position, image_position)
        attention = Attention(tokens.shape[-1] // 2, 8, name="final_attn_token_to_image")
        tokens = tokens + attention(tokens + token_position, image + image_position, image)
        return LayerNorm(name="norm_final_attn")(tokens), image


class MaskDecoder(nn.Module):
    """Image features and embedded prompts -> masks, their quality, and whether the object is there."""

    features: int

    @nn.compact
    def high_res_features(self, fine: Array, middle: Array) -> tuple[Array, Array]:
        """Maps at strides 4 and 8, [B, H, W, C] -> C / 8 and C / 4 channels: once an image, not once a prompt."""
        return Conv(self.features // 8, name="conv_s0")(fine), Conv(self.features // 4, name="conv_s1")(middle)

    def __call__(self, features, sparse: Array, dense: Array, position: Array, multimask: bool) -> Decoded:
        """Masks 1..3 with `multimask`, else the stable one of all; arguments as in `decode`."""
        masks, ious, tokens, scores = self.decode(features, sparse, dense, position)
        if multimask:
            return Decoded(masks[:, 1:], ious[:, 1:], tokens[:, 1:], scores)
        return Decoded(*stable_or_best(masks, ious), tokens[:, :1], scores)

    @nn.compact
    def decode(self, features, sparse: Array, dense: Array, position: Array) -> Decoded:
        """All four masks. features: maps [1 or P, H, W, C] at strides 4, 8, 16, the finer two from
        `high_res_features`; sparse [P, N, C]; dense [1 or P, h, w, C]; position [h, w, C]."""
        fine, middle, coarse = features
        prompts = len(sparse)
        names = (("obj_score_token", 1), ("iou_token", 1), ("mask_tokens", MASKS))
        output = jnp.concatenate([declare(self, f"{name}.weight", rows, self.features) for name, rows in names])
        output = jnp.broadcast_to(output, (prompts, *output.shape))
        tokens = jnp.concatenate([output, sparse], axis=1).astype(coarse.dtype)

        grid = coarse.shape[1:3]
        image = jnp.broadcast_to(coarse + dense.astype(coarse.dtype), (prompts, *grid, self.features))
        tokens, image = TwoWayTransformer(name="transformer")(
            tokens, image.reshape(prompts, -1, self.features), position.reshape(-1, self.features).astype(coarse.dtype)
        )
        scores = MLP((self.features, self.features, 1), name="pred_obj_score_head")(tokens[:, 0])
        ious = jax.nn.sigmoid(MLP((256, 256, MASKS), name="iou_prediction_head")(tokens[:, 1]))
        tokens = tokens[:, 2 : 2 + MASKS]
        return Decoded(
            self.predict_masks(tokens, image.reshape(prompts, *grid, -1), middle, fine), ious, tokens, scores
        )

    @nn.compact
    def predict_masks(self, tokens: Array, image: Array, middle: Array, fine: Array) -> Array:
        """Mask logits [P, M, H, W]: a token's mask is where its kernel, [C / 8], meets the upscaled image.

        tokens [P, M, C]; image [1 or P, h, w, C] and the two finer maps, which it is doubled twice to meet.
        """
        x = ConvTranspose(self.features // 4, name="output_upscaling.0")(image) + middle
        x = gelu(LayerNorm(1e-6, name="output_upscaling.1")(x))
        x = gelu(ConvTranspose(self.features // 8, name="output_upscaling.3")(x) + fine)
        widths = (self.features, self.features, self.features // 8)
        kernels = [MLP(widths, name=f"output_hypernetworks_mlps.{i}")(tokens[:, i]) for i in range(MASKS)]
        masks = jnp.stack(kernels, 1) @ x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)
        return masks.reshape(*masks.shape[:2], *x.shape[1:3])


def stable_or_best(masks: Array, ious: Array) -> tuple[Array, Array]:
    """Mask 0 [P, 1, H, W] and its IoU [P, 1] where it is stable, else the best of masks 1..3 by estimated IoU.

    Stable: its area hardly depends on the threshold (SAM 2, appendix D.1, `dynamic_multimask_via_stability`).
    """
    offset, least = STABILITY
    inner, outer = ((masks[:, 0] > o).sum((-2, -1)) for o in (offset, -offset))
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= least
    choice = jnp.where(stable, 0, 1 + ious[:, 1:].argmax(-1))[:, None]
    return jnp.take_along_axis(masks, choice[..., None, None], 1), jnp.take_along_axis(ious, choice, 1)

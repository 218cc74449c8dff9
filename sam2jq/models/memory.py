"""Memory encoder and memory attention (SAM 2, arXiv 2408.00714, section 4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.attention import attention
from sam2jq.models.capture import is_capturing_any
from sam2jq.models.layers import Conv, Dense, LayerNorm, declare, gelu

Array = jax.Array
EPS = 1e-6


class MaskDownSampler(nn.Module):
    """Mask [B, H, W, 1] -> [B, H / 16, W / 16, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate((4, 16, 64, 256)):
            x = Conv(width, size=3, stride=2, padding=1, name=f"encoder.{3 * i}")(x)
            x = gelu(LayerNorm(EPS, name=f"encoder.{3 * i + 1}")(x))
        return Conv(self.features, name="encoder.12")(x)


class ConvNeXtBlock(nn.Module):
    """Residual block, [B, H, W, C] -> [B, H, W, C]: depthwise 7 x 7, then an MLP per pixel (arXiv 2201.03545)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        y = Conv(channels, size=7, padding=3, groups=channels, name="dwconv")(x)
        y = Dense(4 * channels, name="pwconv1")(LayerNorm(EPS, name="norm")(y))
        y = Dense(channels, name="pwconv2")(gelu(y))
        return x + declare(self, "gamma", channels).astype(x.dtype) * y


class Fuser(nn.Module):
    """Two ConvNeXt blocks, [B, H, W, C] -> [B, H, W, C]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(2):
            x = ConvNeXtBlock(name=f"layers.{i}")(x)
        return x


class MemoryEncoder(nn.Module):
    """Frame features [B, h, w, C] and a mask [B, 16h, 16w, 1] in -10..10 -> memory [B, h, w, features]."""

    features: int

    @nn.compact
    def __call__(self, frame: Array, mask: Array) -> Array:
        x = Conv(frame.shape[-1], name="pix_feat_proj")(frame)
        x = x + MaskDownSampler(frame.shape[-1], name="mask_downsampler")(mask)
        return Conv(self.features, name="out_proj")(Fuser(name="fuser")(x))


def apply_rope(x: Array, height: int, width: int) -> Array:
    """x [B, R * height * width, C] after axial rotary position encoding (arXiv 2403.13298), in real arithmetic.

    Channel pairs in the first half are rotated by the token's column, those in the second half by its row; each of
    the R maps in a row gets the same rotation.
    """
    frequency = 10000.0 ** -(jnp.arange(0, x.shape[-1], 4) / x.shape[-1])
    row, column = jnp.divmod(jnp.arange(height * width), width)
    angle = jnp.concatenate([column[:, None] * frequency, row[:, None] * frequency], -1)  # [tokens, C / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(len(x), -1, *angle.shape, 2), -1, 0)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


class RotaryAttention(nn.Module):
    """Single-head attention with RoPE, q [B, height * width, C] and k, v [B, M, C'] -> [B, height * width, C].

    The last `num_k_exclude_rope` keys (object pointers) get no RoPE; those before are maps of the queries' size.
    key_mask: bool [B, M], False where a key is ignored; None uses all.
    """

    features: int

    @nn.compact
    def __call__(
        self, q: Array, k: Array, v: Array, *, grid: tuple[int, int], num_k_exclude_rope: int = 0, key_mask=None
    ) -> Array:
        q_proj, k_proj, v_proj, out_proj = (Dense(self.features, name=f"{n}_proj") for n in ("q", "k", "v", "out"))
        # the weights of a softmax sum to 1, so a linear v_proj may follow it: on C' channels instead of `features`
        narrow = v.shape[-1] < self.features and not is_capturing_any(self) and v_proj.is_linear()
        q, k, v = q_proj(q), k_proj(k), v if narrow else v_proj(v)
        num_k_rope = k.shape[1] - num_k_exclude_rope
        k = jnp.concatenate([apply_rope(k[:, :num_k_rope], *grid), k[:, num_k_rope:]], axis=1)
        out = attention(*(x[:, :, None] for x in (apply_rope(q, *grid), k, v)), key_mask)[:, :, 0]
        return out_proj(v_proj(out) if narrow else out)


class MemoryAttentionLayer(nn.Module):
    """Self-attention of frame [B, h * w, C], cross-attention to memory [B, M, C'], then an MLP -> [B, h * w, C].

    `settings` are those of `RotaryAttention`.
    """

    hidden: int

    @nn.compact
    def __call__(self, frame: Array, memory: Array, position: Array, **settings) -> Array:
        width = frame.shape[-1]
        x = LayerNorm(name="norm1")(frame)
        frame = frame + RotaryAttention(width, name="self_attn")(x, x, x, grid=settings["grid"])
        x = LayerNorm(name="norm2")(frame)
        frame = frame + RotaryAttention(width, name="cross_attn_image")(x, memory + position, memory, **settings)
        x = nn.relu(Dense(self.hidden, name="linear1")(LayerNorm(name="norm3")(frame)))
        return frame + Dense(width, name="linear2")(x)


class MemoryAttention(nn.Module):
    """Frame [B, h, w, C] conditioned on memory tokens [B, M, C'] -> [B, h, w, C].

    frame_position: [h, w, C]; position: that of the memory tokens, [B, M, C']. The last `pointers` of the M tokens are
    object pointers, those before are h x w maps. key_mask: bool [B, M], False at empty entries; None uses all.
    """

    layers: int
    hidden: int

    @nn.compact
    def __call__(
        self, frame: Array, frame_position: Array, memory: Array, position: Array, pointers: int, key_mask: Array | None
    ) -> Array:
        grid = frame.shape[1:3]
        x = (frame + 0.1 * frame_position.astype(frame.dtype)).reshape(len(frame), -1, frame.shape[-1])
        for i in range(self.layers):
            layer = MemoryAttentionLayer(self.hidden, name=f"layers.{i}")
            x = layer(x, memory, position, grid=grid, num_k_exclude_rope=pointers, key_mask=key_mask)
        return LayerNorm(name="norm")(x).reshape(frame.shape)

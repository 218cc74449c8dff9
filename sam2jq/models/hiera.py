"""Hiera, the trunk of the image encoder (arXiv 2306.00989), with SAM 2's windows and position embedding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.attention import attention
from sam2jq.models.capture import OUTPUTS, is_capturing_any
from sam2jq.models.chunking import cpu_chunked_map
from sam2jq.models.layers import MLP, Conv, Dense, LayerNorm, declare, gelu, resize
from sam2jq.models.remat import remat

Array = jax.Array
EPS = 1e-6


def max_pool(x: Array) -> Array:
    """Maximum over 2 x 2 pixels, [B, H, W, C] -> [B, H / 2, W / 2, C]."""
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def to_windows(x: Array, size: int) -> Array:
    """[B, H, W, C] -> [B * windows, size, size, C]; zeros pad windows that extend past the edge."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    x = x.reshape(batch, x.shape[1] // size, size, x.shape[2] // size, size, channels)
    return x.swapaxes(2, 3).reshape(-1, size, size, channels)


def from_windows(windows: Array, height: int, width: int) -> Array:
    """[B * windows, size, size, C] -> [B, height, width, C]; inverse of `to_windows`."""
    size, channels = windows.shape[1], windows.shape[-1]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, size, size, channels).swapaxes(2, 3)
    return x.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]


class Attention(nn.Module):
    """Multi-head self-attention within each map, [B, H, W, C] -> [B, H, W, features].

    pool: 2 x 2 max-pooling of the queries, so that the output is [B, H / 2, W / 2, features]. token_mask: bool
    [B, H, W, 1], the tokens that calibration counts; None counts all.
    """

    features: int
    heads: int
    pool: bool

    @nn.compact
    def __call__(self, x: Array, token_mask: Array | None = None) -> Array:
        qkv, proj = Dense(3 * self.features, name="qkv"), Dense(self.features, name="proj")

        def run(x: Array, token_mask: Array | None = None) -> Array:
            q, k, v = jnp.split(qkv(x, token_mask), 3, axis=-1)
            if self.pool:
                q, token_mask = max_pool(q), None if token_mask is None else max_pool(token_mask)
            heads = (t.reshape(len(x), -1, self.heads, self.features // self.heads) for t in (q, k, v))
            return proj(attention(*heads).reshape(q.shape), token_mask)

        if is_capturing_any(self):
            return run(x, token_mask)
        return cpu_chunked_map(run, x, 3 * self.features * x.shape[1] * x.shape[2])


class Block(nn.Module):
    """Transformer block, [B, H, W, C] -> [B, H, W, features], or [B, H / 2, W / 2, features] where C differs.

    The first block of stages 2 to 4 widens to `features` and pools 2 x 2, which halves its windows. window: side in
    tokens, 0 for global attention.
    """

    features: int
    heads: int
    window: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pool = x.shape[-1] != self.features
        shortcut, x = x, LayerNorm(EPS, name="norm1")(x)
        if pool:  # norm1 feeds the shortcut too
            shortcut = max_pool(Dense(self.features, name="proj")(x))
        token_mask = None
        if self.window:
            if any(side % self.window for side in x.shape[1:3]):  # windows are padded
                token_mask = to_windows(jnp.ones((*x.shape[:3], 1), bool), self.window)
            x = to_windows(x, self.window)
        x = Attention(self.features, self.heads, pool, name="attn")(x, token_mask)
        x = from_windows(x, *shortcut.shape[1:3]) if self.window else x
        x = shortcut + x
        mlp = MLP((4 * self.features, self.features), gelu, name="mlp")
        return x + mlp(LayerNorm(EPS, name="norm2")(x))


class BlockSpec(NamedTuple):
    """The fields of one `Block`."""

    features: int
    heads: int
    window: int


class Hiera(nn.Module):
    """Images [B, H, W, 3] -> the last map of each stage, at strides 4, 8, 16, 32. remat: rematerialize each block."""

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    position_size: int
    remat: bool = False

    def blocks(self) -> list[BlockSpec]:
        """Width, heads and window of each block; the first block of a stage has the previous stage's window."""
        stage_of = [stage for stage, depth in enumerate(self.stages) for _ in range(depth)]
        return [
            BlockSpec(
                self.embed_dim << stage,
                self.num_heads << stage,
                0 if i in self.global_blocks else self.windows[stage_of[max(i - 1, 0)]],
            )
            for i, stage in enumerate(stage_of)
        ]

    @nn.compact
    def __call__(self, image: Array) -> list[Array]:
        """Windows that divide the map stay apart from block to block: to such a block, each is a map of its own."""
        x, maps = self.embed(image), []
        size, window = x.shape[1:3], 0  # of the map, and of the windows that x consists of; 0: x is the map
        ends = {sum(self.stages[: stage + 1]) - 1 for stage in range(len(self.stages))}
        for i, spec in enumerate(self.blocks()):
            wanted = 0 if not spec.window or any(side % spec.window for side in size) else spec.window
            if wanted != window:
                x = from_windows(x, *size) if window else x
                x = to_windows(x, wanted) if wanted else x
            block = Block(*(spec._replace(window=0) if wanted else spec), name=f"blocks.{i}")
            y = remat(block, x) if self.remat and not self.is_initializing() else block(x)
            size = tuple(side * y.shape[1] // x.shape[1] for side in size)  # pooling halves it
            x, window = y, y.shape[1] if wanted else 0
            if i in ends:
                maps.append(from_windows(x, *size) if window else x)
        self.sow(OUTPUTS, "stages", maps, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return maps

    @nn.compact
    def embed(self, image: Array) -> Array:
        """The input of the first block, [B, H / 4, W / 4, C]: projected patches with the position embedding."""
        x = Conv(self.embed_dim, size=7, stride=4, padding=3, name="patch_embed.proj")(image)
        return x + self.position(*x.shape[1:3]).astype(x.dtype)

    def position(self, height: int, width: int) -> Array:
        """Position embedding [1, height, width, C]: a resized background plus a tiled window (arXiv 2311.05613).

        Both parameters have torch's layout, [1, C, side, side].
        """
        size, window = self.position_size, self.windows[0]
        background = declare(self, "pos_embed", 1, self.embed_dim, size, size)
        tile = declare(self, "pos_embed_window", 1, self.embed_dim, window, window)
        background, tile = (jnp.moveaxis(p.astype(jnp.float32), 1, -1) for p in (background, tile))
        # torch's bicubic has a = -0.75 where jax's "bicubic" has -0.5
        background = resize(background, (height, width), "bicubic-pytorch")
        return background + jnp.tile(tile, (1, height // window, width // window, 1))

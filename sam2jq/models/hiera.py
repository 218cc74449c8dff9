"""Hiera, the trunk of the image encoder (arXiv 2306.00989), with SAM 2's windows and position embedding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.layers import (
    MLP,
    OUTPUTS,
    Conv,
    Dense,
    LayerNorm,
    attention,
    chunked_map,
    cpu_chunk_rows,
    declare,
    gelu,
    is_capturing_any,
    remat,
    resize,
)

Array = jax.Array
EPS = 1e-6


def max_pool(x: Array) -> Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, C]."""
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def to_windows(x: Array, size: int) -> Array:
    """[B, H, W, C] -> [B * windows, size, size, C]; zeros fill windows that reach over the edge."""
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
    """Multi-head attention over all tokens of each map; `pool` halves the queries' height and width.

    real: bool [B, H, W, 1], the tokens that calibration is to count; all when None.
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
        return chunked_map(run, x, cpu_chunk_rows(3 * self.features * x.shape[1] * x.shape[2]))


class Block(nn.Module):
    """A transformer block; the first of a stage widens to `features` and, after stage 1, pools 2 x 2.

    `window` 0 attends globally. Pooling makes windows of half the size.
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
    features: int
    heads: int
    window: int


class Hiera(nn.Module):
    """Image [B, H, W, 3] -> the last map of each stage, at strides 4, 8, 16, 32. remat: blocks are `remat`."""

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    position_size: int
    remat: bool = False

    def blocks(self) -> list[BlockSpec]:
        """Widths, heads and windows block by block; a stage's first block still has the window of the stage before."""
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
        x = Conv(self.embed_dim, size=7, stride=4, padding=3, name="patch_embed.proj")(image)
        x = x + self.position(*x.shape[1:3]).astype(x.dtype)
        outputs = []
        for i, spec in enumerate(self.blocks()):
            block = Block(*spec, name=f"blocks.{i}")
            x = remat(block, x) if self.remat and not self.is_initializing() else block(x)
            outputs.append(x)
        ends = [sum(self.stages[: stage + 1]) - 1 for stage in range(len(self.stages))]
        maps = [outputs[end] for end in ends]
        self.sow(OUTPUTS, "stages", maps, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return maps

    def position(self, height: int, width: int) -> Array:
        """[1, height, width, C]: a bicubic background plus a tiled window (arXiv 2311.05613), in torch's layout."""
        size, window = self.position_size, self.windows[0]
        background = declare(self, "pos_embed", 1, self.embed_dim, size, size)
        tile = declare(self, "pos_embed_window", 1, self.embed_dim, window, window)
        background, tile = (jnp.moveaxis(p.astype(jnp.float32), 1, -1) for p in (background, tile))
        # torch's bicubic has a = -0.75 where jax's "bicubic" has -0.5
        background = resize(background, (height, width), "bicubic-pytorch")
        return background + jnp.tile(tile, (1, height // window, width // window, 1))

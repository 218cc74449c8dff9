"""The layers every part of SAM 2 is made of: the only file that calls quant.ops.

Names match torch's: a flax path is a torch key. Shapes, channels last: B batch, H W space, N tokens, C channels.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.quant import ops

Array = jax.Array
QUERY_CHUNK = 512  # query rows per score matrix: 512 x 4096 scores of a head fit the caches of a CPU core

gelu = lambda x: jax.nn.gelu(x, approximate=False)  # torch's default is erf


def declare(module: nn.Module, name: str, *shape: int):
    """The parameter `name` of `module`. Its first values are drawn by sam2.init_params, all by one rule."""
    return module.param(name, nn.initializers.zeros, shape)


class Dense(nn.Module):
    """[..., C] -> [..., features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = declare(self, "kernel", x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        return ops.matmul(kernel, x) + bias.astype(x.dtype)


class Conv(nn.Module):
    """[B, H, W, C] -> [B, H', W', features]; `padding` on all four sides, in pixels."""

    features: int
    size: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = declare(self, "kernel", *shape)
        bias = declare(self, "bias", self.features)
        y = ops.conv(kernel, x, stride=self.stride, padding=self.padding, groups=self.groups)
        return y + bias.astype(x.dtype)


class ConvTranspose(nn.Module):
    """[B, H, W, C] -> [B, 2H, 2W, features]: kernel 2, stride 2, so that no two inputs meet in an output."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = declare(self, "kernel", 2, 2, x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        return ops.conv_transpose(kernel, x, stride=2) + bias.astype(x.dtype)


class LayerNorm(nn.Module):
    """`x` normalized over its channels, in float32. eps is 1e-6 in Hiera and LayerNorm2d, 1e-5 elsewhere."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare(self, "scale", x.shape[-1])
        bias = declare(self, "bias", x.shape[-1])
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normal * scale + bias).astype(x.dtype)


class MLP(nn.Module):
    """Dense layers of the given widths with `act` between them."""

    widths: tuple[int, ...]
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths):
            x = Dense(width, name=f"layers.{i}")(x if i == 0 else self.act(x))
        return x


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kT / sqrt(C)) v for q [B, N, heads, C] and k, v [B, M, heads, C], the softmax in float32.

    Long queries go through in chunks of QUERY_CHUNK rows, so that the [N, M] score matrix is never whole in memory.
    """

    def rows(q: Array) -> Array:
        scores = jnp.einsum("bnhc,bmhc->bhnm", q, k).astype(jnp.float32)
        return jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(scores).astype(v.dtype), v)

    q = q * q.shape[-1] ** -0.5
    batch, length, heads, channels = q.shape
    if length <= QUERY_CHUNK:
        return rows(q)
    chunks = jnp.pad(q, ((0, 0), (0, -length % QUERY_CHUNK), (0, 0), (0, 0)))
    chunks = chunks.reshape(batch, -1, QUERY_CHUNK, heads, channels).swapaxes(0, 1)
    out = jax.lax.map(rows, chunks).swapaxes(0, 1)
    return out.reshape(batch, -1, heads, channels)[:, :length]


def sine_position(height: int, width: int, channels: int) -> Array:
    """[height, width, channels]: sines of y, then of x, in `channels` / 4 frequencies each (DETR, arXiv 2005.12872)."""

    def encode(length: int) -> Array:  # [length, channels / 2]
        position = jnp.arange(1, length + 1) / (length + 1e-6) * 2 * jnp.pi
        frequency = 10000.0 ** (jnp.arange(0, channels // 2, 2) / (channels // 2))
        angle = position[:, None] / frequency
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(length, -1)

    y = jnp.broadcast_to(encode(height)[:, None], (height, width, channels // 2))
    x = jnp.broadcast_to(encode(width)[None], (height, width, channels // 2))
    return jnp.concatenate([y, x], -1)


def resize(x: Array, size: tuple[int, int], method: str = "bilinear", antialias: bool = False) -> Array:
    """[B, H, W, C] -> [B, *size, C], pixel centres aligned as in torch's `interpolate(align_corners=False)`."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method, antialias=antialias)

"""The layers every part of SAM 2 is made of: the only file of the model that calls quant.leaves.

Module names match torch's: a flax path is a torch key. Letters, channels last: B batch, H W space, C channels.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.capture import is_capturing, is_capturing_any, sow_input_stats, sow_output_moments, sow_patch_stats
from sam2jq.models.chunking import cpu_chunked_map
from sam2jq.quant import leaves
from sam2jq.quant.stats import FOLDS

Array = jax.Array


def gelu(x: Array) -> Array:
    """x * Phi(x), by erf as in torch; `jax.nn.gelu` uses erfc, which takes a third longer."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def declare(module: nn.Module, name: str, *shape: int):
    """The parameter `name` of `module`, of the given shape; `init_params` draws the initial values."""
    return module.param(name, nn.initializers.zeros, shape)


class Dense(nn.Module):
    """Linear layer, [..., C] -> [..., features]. token_mask: bool [...], the tokens that calibration counts."""

    features: int

    @nn.compact
    def __call__(self, x: Array, token_mask: Array | None = None) -> Array:
        sow_input_stats(self, x, token_mask)
        kernel = declare(self, "kernel", x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        return sow_output_moments(self, leaves.quantize_output(kernel, leaves.matmul(kernel, x) + bias.astype(x.dtype)))

    def is_linear(self) -> bool:
        """Whether the layer is x @ kernel + bias as it stands: neither its input nor its output is quantized."""
        return self.has_variable("params", "kernel") and leaves.is_bare(self.get_variable("params", "kernel"))


class Conv(nn.Module):
    """Convolution, [B, H, W, C] -> [B, H', W', features]; `padding` on all four sides, in pixels."""

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
        if is_capturing(self, *FOLDS):
            sow_patch_stats(self, x, lambda image: self.patch_rows(image, math.prod(shape[:-1])))
        y = leaves.conv(kernel, x, stride=self.stride, padding=self.padding, groups=self.groups)
        return sow_output_moments(self, leaves.quantize_output(kernel, y + bias.astype(x.dtype)))

    def patch_rows(self, image: Array, inputs: int) -> Array:
        """Image [H, W, C] -> [N, inputs]: the patches that a kernel of `inputs` inputs is multiplied by, one group of
        channels after the other."""
        rows = leaves.patches(image[None], self.size, self.stride, self.padding)
        grouped = rows.reshape(*rows.shape[:-1], self.size**2, self.groups, -1)
        return grouped.swapaxes(-2, -3).reshape(-1, inputs)


class ConvTranspose(nn.Module):
    """Transposed convolution, [B, H, W, C] -> [B, 2H, 2W, features]; kernel 2, stride 2: no two inputs overlap."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sow_input_stats(self, x)
        kernel = declare(self, "kernel", 2, 2, x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        y = leaves.conv_transpose(kernel, x, stride=2)
        return sow_output_moments(self, leaves.quantize_output(kernel, y + bias.astype(x.dtype)))


class LayerNorm(nn.Module):
    """[..., C] normalized over its channels in float32. eps is 1e-6 in Hiera and LayerNorm2d, 1e-5 elsewhere."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare(self, "scale", x.shape[-1])
        bias = declare(self, "bias", x.shape[-1])
        y = normalized(x.astype(jnp.float32), self.eps, x.dtype == jnp.bfloat16)
        return (y * scale + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalized(x: Array, eps: float, one_pass: bool) -> Array:
    """(x - mean) / sqrt(variance + eps) over the last axis of x [..., C], float32.

    one_pass: the variance is mean(x^2) - mean(x)^2, whose sums are taken together. It loses as many digits as x^2 has
    more than the variance, which are there where x was rounded to bfloat16.
    """
    return _normalized_forward(x, eps, one_pass)[0]


def _normalized_forward(x: Array, eps: float, one_pass: bool) -> tuple[Array, tuple[Array, Array]]:
    mean = x.mean(-1, keepdims=True)
    centered = x - mean
    if one_pass:
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(centered).mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(variance + eps)
    return centered * rate, (centered * rate, rate)


def _normalized_backward(eps: float, one_pass: bool, residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    """Written out, since the derivatives of mean and variance one by one take twice the passes over x."""
    y, rate = residuals
    return (rate * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True)),)


normalized.defvjp(_normalized_forward, _normalized_backward)


class MLP(nn.Module):
    """[..., C] -> [..., widths[-1]]: Dense layers of the given widths with `act` between them."""

    widths: tuple[int, ...]
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first, *rest = [Dense(width, name=f"layers.{i}") for i, width in enumerate(self.widths)]

        def run(x: Array) -> Array:
            x = first(x)
            for layer in rest:
                x = layer(self.act(x))
            return x

        rows = x.reshape(-1, x.shape[-1])
        rows = run(rows) if is_capturing_any(self) else cpu_chunked_map(run, rows, max(self.widths))
        return rows.reshape(*x.shape[:-1], self.widths[-1])


def sine_position(height: int, width: int, channels: int) -> Array:
    """[height, width, channels]: sine position encoding of y, then of x, channels / 4 frequencies each (DETR, arXiv
    2005.12872)."""

    def axis_encoding(length: int) -> Array:  # [length, channels / 2]
        position = jnp.arange(1, length + 1) / (length + 1e-6) * 2 * jnp.pi
        frequency = 10000.0 ** (jnp.arange(0, channels // 2, 2) / (channels // 2))
        angle = position[:, None] / frequency
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(length, -1)

    y = jnp.broadcast_to(axis_encoding(height)[:, None], (height, width, channels // 2))
    x = jnp.broadcast_to(axis_encoding(width)[None], (height, width, channels // 2))
    return jnp.concatenate([y, x], -1)


def resize(x: Array, size: tuple[int, int], method: str = "bilinear", antialias: bool = False) -> Array:
    """[B, H, W, C] -> [B, *size, C], pixel centers aligned as in torch's `interpolate(align_corners=False)`."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method, antialias=antialias)

"""The layers every part of SAM 2 is made of: the only file that calls quant.ops.

Names match torch's: a flax path is a torch key. Shapes, channels last: B batch, H W space, N tokens, C channels.
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.quant import leaves as ops
from sam2jq.quant.stats import FOLDS

Array = jax.Array
HIDDEN = -1e9  # added to the score of a key that is not there
QUERY_CHUNK = 512  # query rows per score matrix
OUTPUTS = "outputs"  # the collection of what leaves each layer
CACHED = 2**21  # numbers in a chunk's widest array: the best of 2**19 to 2**22 on two cores


def gelu(x: Array) -> Array:
    """x * Phi(x), by erf as in torch; jax's own uses erfc, which takes a third longer."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def declare(module: nn.Module, name: str, *shape: int):
    """The parameter `name` of `module`. Its first values are drawn by sam2.init_params, all by one rule."""
    return module.param(name, nn.initializers.zeros, shape)


def is_capturing(module: nn.Module, *collections: str) -> bool:
    """Whether one of `collections` of what layers see and say is being filled."""
    return not module.is_initializing() and any(map(module.is_mutable_collection, collections))


def is_capturing_any(module: nn.Module) -> bool:
    """Whether calibration or distillation wants to see the layers in `module`, which then must not run in chunks."""
    return is_capturing(module, *FOLDS, OUTPUTS)


def sow_input_stats(module: nn.Module, x: Array, token_mask: Array | None = None) -> None:
    """Folds the inputs x [..., K] of a layer into what is being collected; real: bool [...], tokens that count."""
    if is_capturing(module, *FOLDS):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        token_mask = None if token_mask is None else token_mask.reshape(-1)
        for name, fold in FOLDS.items():
            module.sow(name, "input", (rows, token_mask), reduce_fn=fold, init_fn=lambda: None)


def sow_patch_stats(module: nn.Module, images: Array, rows: Callable[[Array], Array]) -> None:
    """`sow_input_stats` of the patches of all images, one image after the other: they may take 49 times the memory."""
    for name, fold in FOLDS.items():
        module.sow(name, "input", images, reduce_fn=partial(fold_each, fold, rows), init_fn=lambda: None)


def fold_each(fold: Callable, rows: Callable[[Array], Array], state: Array | tuple | None, images: Array):
    after = lambda state, image: fold(state, (rows(image).astype(jnp.float32), None))
    return jax.lax.scan(lambda *of: (after(*of), None), after(state, images[0]), images[1:])[0]


def sow_output_moments(module: nn.Module, y: Array) -> Array:
    """`y`, what leaves a layer; its mean and variance over all but the channels, [2, C], go to whom it concerns."""
    if is_capturing(module, OUTPUTS):
        rows = y.reshape(-1, y.shape[-1]).astype(jnp.float32)
        module.sow(OUTPUTS, "moments", jnp.stack([rows.mean(0), rows.var(0)]))
    return y


def remat(module: nn.Module, x: Array) -> Array:
    """module(x), whose gradient keeps x alone and computes the rest once more (arXiv 1604.06174).

    Compilers for CPUs see that a second computation equals the first, and share it, so that `jax.checkpoint` saves
    nothing there; they do not look through a branch on the incoming gradient.
    """
    alone, captured = module.clone(parent=None), [OUTPUTS] if is_capturing(module, OUTPUTS) else []

    def plain(params: dict, x: Array) -> tuple[Array, dict]:
        return alone.apply({"params": params}, x, mutable=captured)

    def backward(kept: tuple[dict, Array], dy: tuple[Array, dict]) -> tuple[dict, Array]:
        number = dy[0].ravel()[0]
        once_more = lambda kept, dy: jax.vjp(plain, *kept)[1](dy)
        spoilt = lambda kept, dy: jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), kept)
        return jax.lax.cond(number == number, once_more, spoilt, kept, dy)

    run = jax.custom_vjp(plain)
    run.defvjp(lambda *kept: (plain(*kept), kept), backward)
    y, sown = run(module.variables["params"], x)
    for name, value in sown.get(OUTPUTS, {}).items():
        module.put_variable(OUTPUTS, name, value)
    return y


def patches(x: Array, size: int, stride: int, padding: int) -> Array:
    """[B, H, W, C] -> [B, H', W', size * size * C]: what lies under a kernel, in the kernel's order."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((length - size) // stride * stride + 1 for length in x.shape[1:3])
    shifts = [(i, j) for i in range(size) for j in range(size)]
    return jnp.concatenate([x[:, i : i + rows : stride, j : j + columns : stride] for i, j in shifts], -1)


class Dense(nn.Module):
    """[..., C] -> [..., features]; real: bool [...], the tokens that calibration is to count."""

    features: int

    @nn.compact
    def __call__(self, x: Array, token_mask: Array | None = None) -> Array:
        sow_input_stats(self, x, token_mask)
        kernel = declare(self, "kernel", x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        return sow_output_moments(self, ops.quantize_output(kernel, ops.matmul(kernel, x) + bias.astype(x.dtype)))


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
        if is_capturing(self, *FOLDS):
            sow_patch_stats(self, x, lambda image: self.rows(image, math.prod(shape[:-1])))
        y = ops.conv(kernel, x, stride=self.stride, padding=self.padding, groups=self.groups)
        return sow_output_moments(self, ops.quantize_output(kernel, y + bias.astype(x.dtype)))

    def rows(self, image: Array, inputs: int) -> Array:
        """What a kernel of so many `inputs` is multiplied by, [n, inputs], one group of its channels after another."""
        key_mask = patches(image[None], self.size, self.stride, self.padding)
        grouped = key_mask.reshape(*key_mask.shape[:-1], self.size**2, self.groups, -1)
        return grouped.swapaxes(-2, -3).reshape(-1, inputs)


class ConvTranspose(nn.Module):
    """[B, H, W, C] -> [B, 2H, 2W, features]: kernel 2, stride 2, so that no two inputs meet in an output."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sow_input_stats(self, x)
        kernel = declare(self, "kernel", 2, 2, x.shape[-1], self.features)
        bias = declare(self, "bias", self.features)
        return sow_output_moments(
            self, ops.quantize_output(kernel, ops.conv_transpose(kernel, x, stride=2) + bias.astype(x.dtype))
        )


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
        first, *rest = [Dense(width, name=f"layers.{i}") for i, width in enumerate(self.widths)]

        def run(x: Array) -> Array:
            x = first(x)
            for layer in rest:
                x = layer(self.act(x))
            return x

        at_once = sys.maxsize if is_capturing_any(self) else cpu_chunk_rows(max(self.widths))
        rows = chunked_map(run, x.reshape(-1, x.shape[-1]), at_once)
        return rows.reshape(*x.shape[:-1], self.widths[-1])


def chunked_map(f: Callable, x: Array, rows: int):
    """f(x), an array or several, at most `rows` of the leading axis at a time, for an `f` to which each row of
    x [N, ...] is a case of its own. Layers that `f` calls may read parameters but not sow.
    """
    if len(x) <= rows:
        return f(x)
    rows = next(size for size in range(rows, 0, -1) if len(x) % size == 0)  # all chunks alike, and none padded
    f = jax.checkpoint(f, prevent_cse=False)  # on a CPU, faster than to keep it for the gradient
    out = jax.lax.map(f, x.reshape(-1, rows, *x.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


def cpu_chunk_rows(width: int) -> int:
    """How many rows of `width` numbers a CPU's caches hold; an accelerator takes them all at once, to fill its cores.

    Going through wide intermediate arrays in such pieces halves the time of Hiera's first MLPs: memory, not
    arithmetic, is what they wait for.
    """
    return max(1, CACHED // width) if jax.default_backend() == "cpu" else sys.maxsize


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """softmax(q kT / sqrt(C)) v for q [B, N, heads, C] and k, v [B, M, heads, C], the softmax in float32.

    seen: bool [B, M], which keys there are; all when None. Long queries go through in chunks of QUERY_CHUNK rows, so
    that a head's [N, M] scores are never whole in memory, nor kept for the gradient.
    """
    batch, length, heads, channels = q.shape
    q, k, v = (x.swapaxes(1, 2) for x in (q * channels**-0.5, k, v))  # batched products want the heads in front
    hidden = None if key_mask is None else jnp.where(key_mask, 0.0, HIDDEN)[:, None, None]
    if length <= QUERY_CHUNK:
        return softmax_attention(q, k, v, hidden)[0].swapaxes(1, 2)
    head = lambda each: chunked_softmax_attention(*each)
    at_once = min(batch * heads, cpu_chunk_rows(QUERY_CHUNK * k.shape[2]))  # heads whose scores stay in the caches
    flat = tuple(x.reshape(batch * heads, -1, channels) for x in (q, k, v))
    flat += (None if key_mask is None else jnp.repeat(hidden[:, 0], heads, axis=0),)
    return jax.lax.map(head, flat, batch_size=at_once).reshape(batch, heads, length, channels).swapaxes(1, 2)


@jax.custom_vjp
def chunked_softmax_attention(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """`softmax_attention` of one head, QUERY_CHUNK rows of q at a time."""
    return _chunked_attention_forward(q, k, v, bias)[0]


def _chunked_attention_forward(q: Array, k: Array, v: Array, bias: Array | None):
    y, level = chunked_map(lambda rows: softmax_attention(rows, k, v, bias), q, QUERY_CHUNK)
    return y, (q, k, v, bias, y, level)


def _chunked_attention_backward(kept, dy: Array):
    """Scores are computed once more, chunk by chunk (as in FlashAttention, arXiv 2205.14135)."""
    q, k, v, bias, y, level = kept
    rows = next(size for size in range(min(QUERY_CHUNK, len(q)), 0, -1) if len(q) % size == 0)
    chunked = lambda x: x.reshape(-1, rows, x.shape[-1])

    def chunk(sums, part):
        (dk, dv), (q, y, level, dy) = sums, part
        scores = (q @ k.T).astype(jnp.float32)
        scores = scores if bias is None else scores + bias
        shares = jnp.exp(scores - level).astype(v.dtype)
        grow = (dy @ v.T - (dy * y).sum(-1, keepdims=True)) * shares
        return (dk + q.T @ grow, dv + dy.T @ shares), grow @ k

    zeros = jnp.zeros_like(k.T), jnp.zeros_like(v.T)  # transposed, so that the scores need not be
    (dk, dv), dq = jax.lax.scan(chunk, zeros, tuple(map(chunked, (q, y, level, dy))))
    return dq.reshape(q.shape), dk.T, dv.T, None if bias is None else jnp.zeros_like(bias)


chunked_softmax_attention.defvjp(_chunked_attention_forward, _chunked_attention_backward)


def softmax_attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> tuple[Array, Array]:
    """softmax(q kT + bias) v, [..., N, C], and the logarithm of the softmax' sums, [..., N, 1].

    Dividing the few outputs, not the many scores, saves a pass over them.
    """
    scores = (q @ k.swapaxes(-1, -2)).astype(jnp.float32)
    scores = scores if bias is None else scores + bias
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # no share in the gradient
    scores = jnp.exp(scores - top)
    sums = scores.sum(-1, keepdims=True)
    return (scores.astype(v.dtype) @ v / sums).astype(v.dtype), top + jnp.log(sums)


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

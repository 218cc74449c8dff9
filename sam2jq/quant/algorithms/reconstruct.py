"""Block reconstruction: codes and step sizes are trained until a block's output is that in full precision.

As BRECQ (arXiv 2102.05426), but codes are trained straight through the rounding as in SignRound (arXiv 2309.05516):
BRECQ's regularizer, which pushes soft codes towards integers, does not converge in some hundred steps at 2 bits. The
block's inputs are those of the quantized model. Mixing them at random with full-precision ones, as QDrop does (arXiv
2203.05740), gained nothing on held-out images.

Letters: G groups with a scale, N outputs, n images.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sam2jq.errors import ConfigError, UserError, one_of
from sam2jq.quant.field_types import check_types
from sam2jq.quant.leaves import base_weight
from sam2jq.quant.qtensor import QTensor, by_group, from_groups, join_bits, split_bits, ste_round, storage_dtype
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.transform import map_base_weight
from sam2jq.tree import flatten, kernels, pytree, unflatten

Array = jax.Array
Forward = Callable[[dict, Array], Array]  # (params of a block, inputs [B, ...]) -> outputs [B, ...]
HELD_OUT = 8  # one image in so many is held out, and at least one
RATES = {"offsets": 0.02, "log_ratios": 0.003, "floats": 0.001}  # of Adam at the first step; they fall to 0


@dataclass(frozen=True)
class ReconstructConfig:
    """How blocks are reconstructed: the section `quant.reconstruct`."""

    # which blocks: trunk
    blocks: str = "trunk"
    # steps of Adam per block
    steps: int = 300
    # images per step
    batch_size: int = 1

    def __post_init__(self):
        check_types(self)
        one_of("blocks", self.blocks, ("trunk",))
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class BlockData(NamedTuple):
    """A block's inputs in the quantized model, and its outputs in full precision, [n, ...] each."""

    inputs: np.ndarray
    outputs: np.ndarray


@pytree(static=["spec"])
class Start:
    """A QTensor before training. bits: float32 [], used in place of spec.bits, so that widths share a program."""

    codes: Array  # float32 [*reduce, out]
    scale: Array
    zero_point: Array | None
    bits: Array
    spec: QuantSpec


def reconstruct_block(
    forward: Forward, block: dict, data: BlockData, config: ReconstructConfig
) -> tuple[dict, float, float]:
    """(`block` with trained codes, its error before, its error after); errors are of images held out from training.

    An error is the mean square difference from data.outputs over their variance. block: params with QTensors; no code
    is more than one step from where it began, biases and norms are trained too, other weights stay as they are.
    If the error did not fall, or is not finite, the block is returned as it came.

    Raises UserError if there are fewer than two images.
    """
    images = len(data.inputs)
    if images < 2:
        raise UserError(f"reconstruct: at least two images are needed, one of them held out, got {images}")
    used = images - max(1, images // HELD_OUT)
    start, trained = to_trained(block)
    error = lambda trained: mean_error(forward, start, trained, data, range(used, images))
    before, state = error(trained), optimizer(config.steps).init(trained)
    for chosen in batches(used, min(config.batch_size, used), config.steps):
        batch = BlockData(*(array[chosen] for array in data))
        trained, state = train_step(forward, config.steps, start, trained, state, batch)
    after = error(trained)
    return to_block(start, trained) if after < before else block, before, after


def to_trained(block: dict) -> tuple[dict, dict]:
    """(`block` with each QTensor as a Start, the arrays that training changes, by their kind in RATES and by path)."""
    flat, start, floats = flatten(block), {}, {}
    for path, leaf in flat.items():
        start[path] = map_base_weight(leaf, None, lambda w, _: to_start(w) if isinstance(w, QTensor) else w)
        if not path.endswith("/kernel"):
            floats[path] = jnp.asarray(leaf)
    learned = {path: base_weight(leaf) for path, leaf in kernels(start).items()}
    learned = {path: w for path, w in learned.items() if isinstance(w, Start)}
    zeros = lambda name: {path: jnp.zeros(getattr(w, name).shape) for path, w in learned.items()}
    return unflatten(start), {"offsets": zeros("codes"), "log_ratios": zeros("scale"), "floats": floats}


def to_start(q: QTensor) -> Start:
    """The Start of a QTensor. Raises UserError for float codes."""
    if q.spec.codes != "int":
        raise UserError(f"reconstruction takes sintN and uintN, not {q.spec.dtype}")
    spec, bits = split_bits(q.spec)
    return Start(q.qvalue.astype(jnp.float32), q.scale, q.zero_point, bits, spec)


def codes_and_scale(w: Start, offsets: Array, log_ratios: Array) -> tuple[Array, Array]:
    """The codes, as float32, within one step of w.codes, and the scales; gradients pass through all rounding."""
    spec = join_bits(w.spec, w.bits)
    codes = w.codes + ste_round(jnp.clip(offsets, -1, 1))
    scale = w.scale * jnp.exp(log_ratios)
    if spec.scales == "bfloat16":
        scale += lax.stop_gradient(lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7) - scale)
    return jnp.clip(codes, spec.qmin, spec.qmax), scale


def soft_weight(w: Start, offsets: Array, log_ratios: Array) -> Array:
    """float32 [*reduce, out]: the dequantized weight, with gradients to offsets and log_ratios."""
    codes, scale = codes_and_scale(w, offsets, log_ratios)
    zero_point = 0 if w.zero_point is None else w.zero_point[:, None].astype(jnp.float32)
    return from_groups((by_group(codes, w.spec) - zero_point) * scale[:, None], codes.shape)


def to_qtensor(w: Start, offsets: Array, log_ratios: Array) -> QTensor:
    """The QTensor that `soft_weight` computes with."""
    codes, scale = codes_and_scale(w, offsets, log_ratios)
    spec = replace(w.spec, bits=int(w.bits))
    return QTensor(codes.astype(storage_dtype(spec)), scale, w.zero_point, spec)


def to_block(start: dict, trained: dict, fn: Callable = to_qtensor) -> dict:
    """The params of the block: fn(Start, offsets, log_ratios) in place of each Start, and the trained floats."""
    flat = flatten(start)
    for path, offsets in trained["offsets"].items():
        leaf_fn = lambda w, _, path=path, offsets=offsets: fn(w, offsets, trained["log_ratios"][path])
        flat[path] = map_base_weight(flat[path], None, leaf_fn)
    return unflatten(flat | trained["floats"])


@partial(jax.jit, static_argnames=("forward", "steps"))
def train_step(
    forward: Forward, steps: int, start: dict, trained: dict, state: tuple, batch: BlockData
) -> tuple[dict, tuple]:
    """`trained` and the optimizer's state after one of `steps` steps on a batch of images."""
    loss = lambda trained: square_error(forward(to_block(start, trained, soft_weight), batch.inputs), batch.outputs)
    updates, state = optimizer(steps).update(jax.grad(loss)(trained), state)
    return optax.apply_updates(trained, updates), state


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a rate for each kind of arrays, which falls to 0 along a cosine."""
    adam = {kind: optax.adam(optax.cosine_decay_schedule(rate, steps)) for kind, rate in RATES.items()}
    return optax.multi_transform(adam, {kind: kind for kind in RATES})


def square_error(outputs: Array, expected: Array) -> Array:
    """[]: the mean square of outputs - expected over the variance of the numbers in `expected`."""
    return jnp.square(outputs - expected).mean() / (jnp.var(expected) + 1e-12)


def mean_error(forward: Forward, start: dict, trained: dict, data: BlockData, images: range) -> float:
    """The mean `square_error` of these images, one by one, with the inputs of the quantized model."""
    error = lambda i: image_error(forward, start, trained, *(array[i : i + 1] for array in data))
    return float(np.mean([error(i) for i in images]))


@partial(jax.jit, static_argnames="forward")
def image_error(forward: Forward, start: dict, trained: dict, inputs: Array, outputs: Array) -> Array:
    return square_error(forward(to_block(start, trained, soft_weight), inputs), outputs)


def batches(images: int, size: int, steps: int) -> Iterator[np.ndarray]:
    """Yields the sorted indices [size] of the images of each step: random permutations, one after the other."""
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(images) for _ in range(math.ceil(size * steps / images))])
    return (np.sort(order[i * size : (i + 1) * size]) for i in range(steps))

"""Rematerialization: a module's gradient that stores the module's input alone (arXiv 1604.06174)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.capture import OUTPUTS, is_capturing

Array = jax.Array


def remat(module: nn.Module, x: Array) -> Array:
    """module(x), whose backward pass computes the forward pass again instead of storing intermediate arrays.

    XLA for CPUs merges the second forward pass with the first (common subexpression elimination), so `jax.checkpoint`
    saves no memory there. It does not merge across a branch on the incoming gradient, hence the `cond`. `vmap` would
    compute both sides of a branch for each example, so the whole batch takes one branch.
    """
    unbound, captured = module.clone(parent=None), [OUTPUTS] if is_capturing(module, OUTPUTS) else []

    def forward(params: dict, x: Array) -> tuple[Array, dict]:
        return unbound.apply({"params": params}, x, mutable=captured)

    def gradient(inputs: tuple[dict, Array], dy: tuple[Array, dict]) -> tuple[dict, Array]:
        return jax.vjp(forward, *inputs)[1](dy)

    @jax.custom_batching.custom_vmap
    def backward(inputs: tuple[dict, Array], dy: tuple[Array, dict]) -> tuple[dict, Array]:
        return unless_nan(gradient, inputs, dy)

    @backward.def_vmap
    def _(axis_size: int, in_batched: list, inputs: tuple[dict, Array], dy: tuple[Array, dict]):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        batched = jax.vmap(gradient, axes, axis_size=axis_size)
        return unless_nan(batched, inputs, dy), jax.tree.map(lambda _: True, in_batched[0])

    run = jax.custom_vjp(forward)
    run.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    y, sown = run(module.variables["params"], x)
    for name, value in sown.get(OUTPUTS, {}).items():
        module.put_variable(OUTPUTS, name, value)
    return y


def unless_nan(gradient: Callable, inputs: tuple[dict, Array], dy: tuple[Array, dict]) -> tuple[dict, Array]:
    """gradient(inputs, dy) behind a branch that is always taken but for NaN; then NaN, as the gradient would be."""
    number = dy[0].ravel()[0]
    shapes = jax.eval_shape(gradient, inputs, dy)
    all_nan = lambda inputs, dy: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)
    return jax.lax.cond(number == number, gradient, all_nan, inputs, dy)

"""Rematerialization: a module's gradient that stores the module's input alone (arXiv 1604.06174)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jq.models.capture import OUTPUTS, is_capturing

Array = jax.Array


def remat(module: nn.Module, x: Array) -> Array:
    """module(x), whose backward pass computes the forward pass again instead of storing intermediate arrays.

    XLA for CPUs merges the second forward pass with the first (common subexpression elimination), so `jax.checkpoint`
    saves no memory there. It does not merge across a branch on the incoming gradient, hence the `cond`.
    """
    unbound, captured = module.clone(parent=None), [OUTPUTS] if is_capturing(module, OUTPUTS) else []

    def forward(params: dict, x: Array) -> tuple[Array, dict]:
        return unbound.apply({"params": params}, x, mutable=captured)

    def backward(inputs: tuple[dict, Array], dy: tuple[Array, dict]) -> tuple[dict, Array]:
        number = dy[0].ravel()[0]
        gradient = lambda inputs, dy: jax.vjp(forward, *inputs)[1](dy)
        all_nan = lambda inputs, dy: jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), inputs)
        return jax.lax.cond(number == number, gradient, all_nan, inputs, dy)  # False only for NaN

    run = jax.custom_vjp(forward)
    run.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    y, sown = run(module.variables["params"], x)
    for name, value in sown.get(OUTPUTS, {}).items():
        module.put_variable(OUTPUTS, name, value)
    return y

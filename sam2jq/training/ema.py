"""An exponential moving average of the params, as an optax transformation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaState(NamedTuple):
    """average: a tree like the params."""

    average: dict


def ema(decay: float) -> optax.GradientTransformation:
    """Keeps average = decay * average + (1 - decay) * params in its state and passes the updates through.

    It must be the last element of a chain, because it averages the params that result from the updates.
    """

    def update(updates, state: EmaState, params):
        new_params = optax.apply_updates(params, updates)
        return updates, EmaState(optax.incremental_update(new_params, state.average, 1 - decay))

    return optax.GradientTransformation(lambda params: EmaState(jax.tree.map(jnp.copy, params)), update)


def averaged_params(opt_state, params: dict) -> dict:
    """The average that an `ema` in the optimizer keeps in `opt_state`; `params` where the optimizer has none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, EmaState))
    return next((node.average for node in nodes if isinstance(node, EmaState)), params)

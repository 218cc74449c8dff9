"""The state of a training run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class TrainState(NamedTuple):
    """What one optimizer step reads and replaces.

    step: int32 [], number of steps taken; key: uint32 key data of the whole run, into which each step folds its number.
    """

    step: Array
    params: dict
    opt_state: Any
    key: Array


def init_state(params: dict, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    opt_state = jax.jit(optimizer.init)(params)  # without jit, `optax.flatten` runs a program for each shape of a leaf
    return TrainState(jnp.int32(0), params, opt_state, jax.random.key_data(jax.random.key(seed)))

"""Training on any number of devices: one step, its state, and checkpoints that a killed run goes on from."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = jax.Array
Loss = Callable[[dict, Any, Array], tuple[Array, dict[str, Array]]]  # params, batch, key -> loss, metrics


class TrainState(NamedTuple):
    """step: int32 [], how many were made; key: of the whole run, each step folds its number in."""

    step: Array
    params: dict
    opt_state: Any
    key: Array


def init_state(params: dict, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(seed)))


def devices() -> tuple[NamedSharding, NamedSharding]:
    """How arrays lie on all devices of all processes: split along their first axis, and whole on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, parallel: str = "jit") -> Callable:
    """A compiled (state, batch) -> (state, metrics); `batch` leaves [B, ...], of this process, are split over its
    devices.

    Params live whole on every device; the loss must be a mean over the batch, whose gradient is then that over all
    devices. parallel: "jit" leaves the sums to the compiler, "pmap" spells them out; keys differ there by device.
    """
    data_sharding, replicated = devices()

    def step(state: TrainState, batch, shared: Callable = lambda x: x) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (value, metrics), grads = shared(jax.value_and_grad(loss, has_aux=True)(state.params, batch, key))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": value, "gradient": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    if parallel == "pmap":
        count = jax.local_device_count()
        mapped = jax.pmap(
            lambda state, batch: step(state, batch, lambda tree: jax.lax.pmean(tree, "data")),
            axis_name="data",
            in_axes=(None, 0),
            out_axes=None,
        )
        deal = lambda x: np.reshape(x, (count, -1, *x.shape[1:]))
        return lambda state, batch: mapped(state, jax.tree.map(deal, batch))
    compiled = aot_compile(
        jax.jit(step, in_shardings=(replicated, data_sharding), out_shardings=replicated, donate_argnums=0)
    )
    spread = lambda x: jax.device_put(x, data_sharding)  # which copies nothing that is there
    if jax.process_count() > 1:
        spread = lambda x: jax.make_array_from_process_local_data(data_sharding, np.asarray(x))
    # a state that lies elsewhere, as a new one does, would have the step compiled twice
    return lambda state, batch: compiled(put_if_needed(state, replicated), jax.tree.map(spread, batch))


def put_if_needed(tree: Any, sharding: NamedSharding) -> Any:
    """`tree`, its leaves as `sharding` says; those that are already are not handed to device_put, which takes its
    time over a thousand of them."""
    there = lambda leaf: getattr(leaf, "sharding", None) == sharding
    return jax.tree.map(lambda leaf: leaf if there(leaf) else jax.device_put(leaf, sharding), tree)


def aot_compile(program: Callable) -> Callable:
    """The jitted `program`, compiled for the first arguments it is called with, which all others must be like.

    What compiling took is given back to the system before it runs: a gigabyte that Linux' malloc would keep.
    """
    ready = []

    def run(*args):
        if not ready:
            ready.append(program.lower(*args).compile())
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
        return ready[0](*args)

    return run


class EmaState(NamedTuple):
    average: dict


def ema(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are, and keeps a moving average of the params that they lead to; goes last in a chain."""

    def update(updates, state: EmaState, params):
        after = optax.apply_updates(params, updates)
        return updates, EmaState(optax.incremental_update(after, state.average, 1 - decay))

    return optax.GradientTransformation(lambda params: EmaState(jax.tree.map(jnp.copy, params)), update)


def fit(
    step: Callable, state: TrainState, batches: Callable[[int], Iterable], steps: int, folder: Path, every: int = 200
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Yields the state and the mean metrics of every `every` steps, up to `steps`; goes on from `folder` if it can.

    A run that was finished before yields its state and no metrics.

    batches(n): an iterator over the batches of steps n, n + 1, ...
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, rows = int(state.step), []
        if first >= steps:
            yield state, {}
            return
        for number, batch in zip(range(first + 1, steps + 1), batches(first)):  # state.step would wait for each step
            state, metrics = step(state, batch)
            rows.append(metrics)
            if number % every == 0 or number == steps:
                manager.save(number, args=ocp.args.StandardSave(state))
                yield state, {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
                rows = []

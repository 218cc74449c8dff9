"""One optimizer step on any number of devices, compiled once."""

import ctypes
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from sam2jq.training.sharding import data_sharding, put_if_needed, replicated
from sam2jq.training.state import TrainState

log = logging.getLogger("sam2jq")
Array = jax.Array
Loss = Callable[[dict, Any, Array], tuple[Array, dict[str, Array]]]  # (params, batch, key) -> loss, metrics
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, parallel: str = "jit") -> Step:
    """A compiled (state, batch) -> (state, metrics), as `train_step` makes it.

    batch: leaves [B, ...], the share of this process, which is split over its devices. Params are replicated. `loss`
    must be a mean over the batch, so that the mean of the devices' gradients is the gradient of the whole batch.
    parallel: "jit" lets the compiler insert the sums over devices; "pmap" writes them out, and folds the same key in on
    every device.
    """
    step = train_step(loss, optimizer)
    return pmap_step(step) if parallel == "pmap" else jit_step(step)


def train_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable:
    """A function (state, batch) -> (state, metrics); the metrics of `loss` plus "loss" and "gradient", its global norm.

    Its third argument sums over devices where the compiler does not.
    """

    def step(state: TrainState, batch, all_reduce: Callable = lambda x: x) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (value, metrics), grads = all_reduce(jax.value_and_grad(loss, has_aux=True)(state.params, batch, key))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # of one long vector, as `optax.flatten` makes it, too: a sum for each array would be a fifth of all kernels
        norm = jnp.linalg.norm(ravel_pytree(grads)[0])
        metrics = metrics | {"loss": value, "gradient": norm}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def sharded_step(step: Callable, mesh: Mesh | None = None) -> Callable:
    """`step` under jit on the devices of `mesh`, None for all, with replicated state and a batch that is split."""
    split, full = data_sharding(mesh), replicated(mesh)
    return jax.jit(step, in_shardings=(full, split), out_shardings=full, donate_argnums=0)


def jit_step(step: Callable) -> Step:
    """`sharded_step` on all devices of all processes, compiled at the first call."""
    split, full = data_sharding(), replicated()
    compiled = aot_compile(sharded_step(step), "the training step")
    put = lambda x: jax.device_put(x, split)  # copies nothing that is placed so already
    if jax.process_count() > 1:
        put = lambda x: jax.make_array_from_process_local_data(split, np.asarray(x))
    # A state with another sharding, such as a new one, would not fit the compiled program.
    return lambda state, batch: compiled(put_if_needed(state, full), jax.tree.map(put, batch))


def pmap_step(step: Callable) -> Step:
    """`step` under pmap, on the devices of this process."""
    count = jax.local_device_count()
    mapped = jax.pmap(
        lambda state, batch: step(state, batch, lambda tree: jax.lax.pmean(tree, "data")),
        axis_name="data",
        in_axes=(None, 0),
        out_axes=None,
    )
    by_device = lambda x: np.reshape(x, (count, -1, *x.shape[1:]))  # [devices, B / devices, ...]
    return lambda state, batch: mapped(state, jax.tree.map(by_device, batch))


# YNNPACK's products take as long as Eigen's in the training step. But each of them searches all instructions of its
# program while that is read from the cache, which takes longer than all other parts of reading it.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def aot_compile(program: Callable, name: str) -> Callable:
    """The jitted `program`, compiled ahead of time for the arguments of its first call; later calls must match them.

    A line with `name` is logged before compiling, which may take a minute, and the seconds after it. After compiling,
    the memory that the compiler freed is returned to the system: malloc would keep about a gigabyte.
    """
    compiled = []

    def run(*args):
        if not compiled:
            log.info("compiling   %s: up to a minute the first time, then the program is in the cache", name)
            begin = time.perf_counter()
            options = CPU_OPTIONS if jax.default_backend() == "cpu" else {}
            compiled.append(program.lower(*args).compile(compiler_options=options))
            log.info("compiled    %-60s %6.1f s", name, time.perf_counter() - begin)
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
        return compiled[0](*args)

    return run

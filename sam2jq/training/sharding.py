"""How arrays are placed on the devices of a data-parallel run."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_sharding(mesh: Mesh | None = None) -> NamedSharding:
    """The sharding of a batch: its first axis is split over the devices of `mesh`, None for all of all processes."""
    return NamedSharding(mesh or make_mesh(), PartitionSpec("data"))


def replicated(mesh: Mesh | None = None) -> NamedSharding:
    """The sharding of params: a full copy on each device of `mesh`, None for all of all processes."""
    return NamedSharding(mesh or make_mesh(), PartitionSpec())


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis, "data", over `devices`, None for all of all processes; a program can be compiled for devices that this
    machine lacks."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def compute_devices() -> list[jax.Device]:
    """The devices of calibration and evaluation: all of all processes, or only `jax.default_device` if that is set."""
    default = jax.config.jax_default_device
    if default is None:
        return jax.devices()
    return jax.local_devices(backend=default)[:1] if isinstance(default, str) else [default]


def own_devices() -> list[jax.Device]:
    """Those of `compute_devices` that belong to this process."""
    return [device for device in compute_devices() if device.process_index == jax.process_index()]


def put_if_needed(tree: Any, sharding: NamedSharding) -> Any:
    """`tree` with every leaf placed as `sharding` says.

    Leaves that have that sharding already are passed through, because device_put is slow over thousands of leaves.
    """
    is_placed = lambda leaf: getattr(leaf, "sharding", None) == sharding
    return jax.tree.map(lambda leaf: leaf if is_placed(leaf) else jax.device_put(leaf, sharding), tree)

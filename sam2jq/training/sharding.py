"""How arrays are placed on the devices of a data-parallel run."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def data_sharding() -> NamedSharding:
    """The sharding of a batch: its first axis is split over all devices of all processes."""
    return NamedSharding(make_mesh(), PartitionSpec("data"))


def replicated() -> NamedSharding:
    """The sharding of params: a full copy on each device of each process."""
    return NamedSharding(make_mesh(), PartitionSpec())


def make_mesh() -> jax.sharding.Mesh:
    """One axis, "data", over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def put_if_needed(tree: Any, sharding: NamedSharding) -> Any:
    """`tree` with every leaf placed as `sharding` says.

    Leaves that have that sharding already are passed through, because device_put is slow over thousands of leaves.
    """
    is_placed = lambda leaf: getattr(leaf, "sharding", None) == sharding
    return jax.tree.map(lambda leaf: leaf if is_placed(leaf) else jax.device_put(leaf, sharding), tree)

"""Batches of targets: made by the teacher as training asks for them, and kept in files where the config says so."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sam2jq.config.distill import DistillLossConfig
from sam2jq.data.loader import Item, prefetched, read_item
from sam2jq.distillation.targets import DistillBatch, make_targets
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import SAM2
from sam2jq.training.sharding import data_sharding, replicated
from sam2jq.training.step import aot_compile
from sam2jq.tree import fingerprint

Array = jax.Array
# makes targets
CODE = ("models/*.py", "quant/**/*.py", "data/**/*.py", "distillation/targets.py", "distillation/target_cache.py")


class Teacher(NamedTuple):
    """dtype: of the teacher's computation; its targets are float32 in any case."""

    model: SAM2
    params: dict
    dtype: str = "float32"


Batches = Callable[[Iterator[np.ndarray]], Iterator[DistillBatch]]


def make_target_batches(
    teacher: Teacher, config: DistillLossConfig, seed: int, cache: Path | None
) -> Callable[[Sequence[Item]], Batches]:
    """A function from items to a function from batches of indices [B] into these to the batches of their targets.

    Each process gets its share of a batch. The teacher's program is compiled once for all items, so all batches must
    have one shape. An item gets the same prompts whenever it is drawn. cache: a folder for the targets, one file an
    item; None to make them anew each time.
    """
    size, params = teacher.model.variant.image_size, jax.device_put(teacher.params, replicated())
    run = target_program(teacher, config, seed)
    put = partial(jax.make_array_from_process_local_data, data_sharding())
    structures = []  # of the targets, once it is known
    compiled = aot_compile(run, "the teacher's outputs")

    def load(path: Path) -> DistillBatch:
        if not structures:  # all targets so far were in files
            structures.append(jax.tree.structure(jax.eval_shape(run, params, *example_shapes(size))))
        with np.load(path) as file:
            return structures[0].unflatten([file[str(i)] for i in range(len(file.files))])

    def read(items: Sequence[Item], indices: np.ndarray):
        """The indices, their files, and the targets where all files exist, else the frames [B, T, S, S, 3]."""
        files = [cache / target_file(items[i]) for i in indices] if cache else []
        if files and all(map(Path.is_file, files)):
            return indices, files, jax.tree.map(lambda *leaves: np.stack(leaves), *map(load, files))
        return indices, files, np.stack([read_item(items[i], size) for i in indices])

    def batches(items: Sequence[Item], indices: Iterator[np.ndarray]) -> Iterator[DistillBatch]:
        local = (np.split(batch, jax.process_count())[jax.process_index()] for batch in indices)
        for batch, files, content in prefetched(partial(read, items), local):
            if isinstance(content, np.ndarray):
                item_seeds = np.array([zlib.crc32(items[i].name.encode()) for i in batch], np.uint32)
                content = jax.tree.map(local_rows, compiled(params, put(content), put(item_seeds)))
                structures[:] = [jax.tree.structure(content)]
                for i, file in enumerate(files):
                    save_targets(file, jax.tree.map(lambda leaf, i=i: leaf[i], content))
            yield content

    return lambda items: partial(batches, items)


def target_program(teacher: Teacher, config: DistillLossConfig, seed: int, mesh: Mesh | None = None) -> Callable:
    """A jitted (params, frames [B, T, S, S, 3], item seeds uint32 [B]) -> targets, split over the devices of `mesh`."""

    def make_one(params: dict, frames: Array, item_seed: Array) -> DistillBatch:
        key = jax.random.fold_in(jax.random.key(seed), item_seed)
        counts = {"num_prompts": config.prompts, "num_objects": config.objects}
        return make_targets(teacher.model, params, frames, key, dtype=teacher.dtype, **counts)

    split = data_sharding(mesh)
    batched = jax.vmap(make_one, (None, 0, 0))
    return jax.jit(batched, in_shardings=(replicated(mesh), split, split), out_shardings=split)


def example_shapes(size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of one clip of one frame for each device, and of its seed."""
    count = jax.device_count()
    frames = jax.ShapeDtypeStruct((count, 1, size, size, 3), jnp.float32)
    return frames, jax.ShapeDtypeStruct((count,), jnp.uint32)


def target_file(item: Item) -> str:
    """The name of an item's file, which changes when one of its frames does."""
    return f"{fingerprint({}, item.name, *map(file_version, item.frames))}.npz"


def file_version(name: str) -> object:
    """Size and time of change of a frame's file; the name of a drawn scene."""
    return name if name.startswith("scenes:") else (os.path.getsize(name), os.path.getmtime(name))


def save_targets(path: Path, targets: DistillBatch) -> None:
    """Writes the targets of one item; no partial file is left when it is interrupted."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(targets))})


def local_rows(x: Array) -> np.ndarray:
    """The rows of an array split along its first axis that lie on this process' devices."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

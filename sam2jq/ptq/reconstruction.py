"""Reconstruction of the image encoder's trunk, block by block, on the images of calibration.

Letters: n images, those of all frames of all clips.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from sam2jq.errors import UserError
from sam2jq.files import atomic_write, code_fingerprint
from sam2jq.models.hiera import Block, BlockSpec, Hiera
from sam2jq.models.sam2 import SAM2, trunk_of
from sam2jq.ptq.calibration import Clips
from sam2jq.ptq.stats_cache import CODE
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.reconstruct import BlockData, ReconstructConfig, reconstruct_block
from sam2jq.quant.leaves import base_weight
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import Transform
from sam2jq.tree import fingerprint, flatten, kernels, under

Array = jax.Array
OnStage = Callable[[str, str], AbstractContextManager]  # (stage, what it does) -> context with a list of notes
TRUNK, RECONSTRUCT = "image_encoder.trunk", "reconstruct"


def reconstruct_trunk(
    model: SAM2,
    full: dict,
    clips: Clips,
    config: ReconstructConfig,
    *,
    layers: Iterable[str] | None = None,
    kept: tuple[Path, object] | None = None,
    on_stage: OnStage = lambda name, what: nullcontext([]),
) -> Transform:
    """A Transform that trains the codes of the trunk's blocks by `reconstruct_block`, one block after the other, each
    on inputs from the blocks before it.

    full: params in full precision. layers: whose blocks are trained, None for all that are quantized. The maps between
    blocks are temporary files, so memory does not grow with the number of images. kept: a folder for finished blocks,
    from which a later call goes on, and a key that tells these clips from others.

    `apply` raises UserError if there are fewer than two images.
    """
    trunk, full_trunk = trunk_of(model.variant), full[TRUNK]
    specs = trunk.blocks()
    is_named = lambda i: layers is None or any(under(layer, f"{TRUNK}.blocks.{i}") for layer in layers)
    to_file = partial(write_maps, kept and kept[0])

    def apply(params: dict, stats: Mapping[str, Stats]) -> dict:
        trained = dict(params[TRUNK])
        chosen = [i for i in range(len(specs)) if has_codes(trained[f"blocks.{i}"]) and is_named(i)]
        if not chosen:
            return params
        embed = lambda params: to_file(embed_image(trunk, params, frame[None]) for clip in clips(0) for frame in clip)
        maps, full_maps = embed(materialize_weights(trained)), embed(full_trunk)
        for i in range(chosen[-1] + 1):
            name, forward = f"blocks.{i}", block_forward(specs[i])
            outputs = to_file(each_map(forward, full_trunk[name], full_maps))
            if i in chosen:
                with on_stage(RECONSTRUCT, f"block {i + 1} of {len(specs)}") as notes:
                    path = kept and kept[0] / f"{name_of((trained, full_trunk), model, i, config, kept[1])}.npz"
                    data = BlockData(maps, outputs)
                    train = partial(reconstruct_block, forward, trained[name], data, config)
                    trained[name], before, after = read_or_train(path, trained[name], train)
                    notes.append(f"error {before:.3g} -> {after:.3g}{'' if after < before else ', kept as it was'}")
            maps, full_maps = to_file(each_map(forward, materialize_weights(trained[name]), maps)), outputs
        return params | {TRUNK: trained}

    return Transform(frozenset(), apply, f"{config.steps} steps per block")


@partial(jax.jit, static_argnames="trunk")
def embed_image(trunk: Hiera, params: dict, image: Array) -> Array:
    """The input [1, H, W, C] of the first block."""
    return trunk.apply({"params": params}, image, method="embed")


@cache
def block_forward(spec: BlockSpec) -> Callable[[dict, Array], Array]:
    """forward(params, maps) of a block; blocks with equal specs share it, and so their compiled programs."""
    return lambda params, maps: Block(*spec).apply({"params": params}, maps)


def each_map(forward: Callable, params: dict, maps: Iterable[Array]) -> Iterator[Array]:
    """Yields forward(params, map[None]) of each map."""
    run = jax.jit(forward)
    return (run(params, x[None]) for x in maps)


def has_codes(block: dict) -> bool:
    """Whether any layer of a block is quantized."""
    return any(isinstance(base_weight(leaf), QTensor) for leaf in kernels(flatten(block)).values())


def write_maps(folder: Path | None, maps: Iterable[Array]) -> np.ndarray:
    """float32 [n, H, W, C]: n maps [1, H, W, C], read from a temporary file that is deleted with the array."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        shape = ()
        for array in maps:
            file.write(np.asarray(array, np.float32).tobytes())
            shape = array.shape[1:]
        if not shape:
            raise UserError("reconstruct: there is no image")
        file.flush()
        return np.memmap(file, np.float32, "r").reshape(-1, *shape)


def name_of(trees: tuple[dict, ...], *parts: object) -> str:
    """A name for the result of a block: what it depends on, hashed, with the forms of all weight leaves."""
    leaves, form = jax.tree.flatten(trees)
    code = code_fingerprint(*CODE, "quant/algorithms/*.py", "ptq/reconstruction.py")
    return fingerprint({str(i): leaf for i, leaf in enumerate(leaves)}, code, str(form), *parts)


def read_or_train(path: Path | None, block: dict, train: Callable) -> tuple[dict, float, float]:
    """train(), which is (block, error before, error after), or what an earlier call wrote to `path`."""
    leaves, form = jax.tree.flatten(block)
    if path is not None and path.is_file():
        with np.load(path) as file:
            arrays = jax.device_put([file[str(i)] for i in range(len(leaves))])
            return form.unflatten(arrays), *file["errors"].tolist()
    block, before, after = train()
    if path is not None:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(block))}
            np.savez(file, errors=[before, after], **arrays)
    return block, before, after

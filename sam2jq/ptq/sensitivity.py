"""How much a change of each layer's kernel changes the masks, by gradients at the model in full precision.

Letters: L the masks and scores of one clip as a vector y, J their derivative by a kernel, d the kernel's change. To
first order the masks change by J d. For a random z with independent entries of variance 1, (z . J d)^2 has the mean
|J d|^2, and z^T J is one backward pass for all layers (the Gauss-Newton form of the Fisher estimate of BRECQ, arXiv
2102.05426).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.files import atomic_write, code_fingerprint
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.calibration import Clips, calibration_forward
from sam2jq.ptq.stats_cache import CODE
from sam2jq.training.distributed import all_gather_objects
from sam2jq.training.parallel_map import gather_in_turn, map_replicas, replicate
from sam2jq.tree import fingerprint, flatten, kernels, layer_name

Array = jax.Array
CLIPS, DRAWS = 32, 2  # clips that are looked at, and backward passes for each
MIN_AREA = 16  # pixels of a mask at stride 4; smaller ones count as if they had so many


def mask_changes(
    model: SAM2,
    params: dict,
    changes: Mapping[str, Array],
    clips: Clips,
    *,
    cache: tuple[Path, object] | None = None,
) -> dict[str, float]:
    """{layer: expected squared change of the masks if its kernel alone changes by changes[layer]}, to first order.

    Masks are probabilities over the square root of their area, so that the square is about the share of a mask's pixels
    that change; estimated IoUs and object scores count beside them. Memory does not grow with the number of clips.
    cache: a folder where the result is kept, and a key that tells the clips from others.
    """
    if cache is None:
        return measure_changes(model, params, changes, clips)
    code = code_fingerprint(*CODE, "ptq/sensitivity.py")
    path = cache[0] / f"{fingerprint({'params': params, 'changes': dict(changes)}, code, model, cache[1])}.json"
    kept, *_ = all_gather_objects(json.loads(path.read_text()) if path.is_file() else None)  # what process 0 finds
    if kept is not None:
        return kept
    measured = measure_changes(model, params, changes, clips)
    if jax.process_index() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(measured))
    return measured


def measure_changes(model: SAM2, params: dict, changes: Mapping[str, Array], clips: Clips) -> dict[str, float]:
    """`mask_changes` without a cache. The clips are split over all devices of all processes."""
    changes, sums = {layer: np.asarray(d) for layer, d in changes.items()}, dict.fromkeys(changes, 0.0)
    layers = frozenset(changes)

    def squares(params: dict, numbered_clip: tuple[int, np.ndarray]) -> list[dict[str, float]]:
        i, clip = numbered_clip
        draws = (random_gradient(model, layers, params, clip, i * DRAWS + draw) for draw in range(DRAWS))
        square = lambda layer, gradient: float(np.vdot(gradient, changes[layer])) ** 2
        return [{layer: square(layer, g) for layer, g in jax.device_get(draw).items()} for draw in draws]

    first, step = jax.process_index(), jax.process_count()
    own = zip(range(first, CLIPS, step), clips(first, step))
    rows = gather_in_turn(list(map_replicas(squares, replicate(lambda params: params, params), own)))
    draws = [draw for row in rows for draw in row]
    for draw in draws:
        for layer, square in draw.items():
            sums[layer] += square
    return {layer: total / len(draws) for layer, total in sums.items()}


@partial(jax.jit, static_argnames=("model", "layers"))
def random_gradient(model: SAM2, layers: frozenset[str], params: dict, clip: Array, seed: int) -> dict[str, Array]:
    """{layer: z^T J} of one clip, for a random z."""

    def projected(params: dict) -> Array:
        y = mask_vector(model, params, clip)
        return jnp.vdot(jax.random.normal(jax.random.key(seed), y.shape), y)

    gradients = kernels(flatten(jax.grad(projected)(params)))
    return {layer_name(path): g for path, g in gradients.items() if layer_name(path) in layers}


def mask_vector(model: SAM2, params: dict, clip: Array) -> Array:
    """[L]: the masks, estimated IoUs and object scores of a clip, each mask and score weighted as one of its kind."""
    parts = []
    # blocks are computed again in the backward pass, which saves most of its memory
    for output in model.clone(remat=True).apply({"params": params}, clip, method=calibration_forward):
        probability = jax.nn.sigmoid(output.mask)
        area = jax.lax.stop_gradient(probability.sum((1, 2), keepdims=True))
        masks = probability / jnp.sqrt(jnp.maximum(area, MIN_AREA))
        scores = output.iou, jax.nn.sigmoid(output.object_score)
        parts += [part.ravel() / np.sqrt(len(part)) for part in (masks, *scores)]
    return jnp.concatenate(parts)

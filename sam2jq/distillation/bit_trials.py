"""Trying fewer bits on held-out batches: the losses of bit assignments, and which layers are lowered by them.

Letters: L fake-quantized layers, n bit assignments, B examples a batch.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sam2jq.config.distill import DistillLossConfig, StudentConfig
from sam2jq.distillation.schedule import Decision, Schedule, candidates, confident_layers, reduce_bits
from sam2jq.distillation.targets import DistillBatch
from sam2jq.quant.algorithms.fake_quant import FakeQuant, with_bits
from sam2jq.quant.leaves import base_weight
from sam2jq.training.sharding import data_sharding, replicated
from sam2jq.training.step import aot_compile
from sam2jq.tree import flatten, kernels, under

Array = jax.Array


def bits_program(loss: Callable, mesh: Mesh | None = None) -> Callable:
    """A jitted (params, bits [n, L], batch [B, ...]) -> (losses [n], metrics), n being the number of devices of `mesh`.

    Each device evaluates one bit assignment on the whole batch.
    """

    def losses(params: dict, bits: Array, batch: DistillBatch) -> tuple[Array, dict]:
        return jax.vmap(lambda one: loss(with_bits(params, one), batch))(bits)

    split, full = data_sharding(mesh), replicated(mesh)
    return jax.jit(losses, in_shardings=(full, split, full), out_shardings=full)


def make_bits_evaluator(loss: Callable) -> Callable:
    """`bits_program` on all devices, compiled at the first call."""
    return aot_compile(bits_program(loss), "the validation loss")


def evaluate_bits(
    evaluator: Callable, params: dict, bits: np.ndarray, batches: Sequence[DistillBatch]
) -> tuple[np.ndarray, dict[str, float]]:
    """The losses [n] of bit assignments [n, L], averaged over `batches`, and the parts of the first one's loss.

    Each batch is sent to the devices once, and all assignments are evaluated on it.
    """
    split, full, count = data_sharding(), replicated(), jax.device_count()
    padded = np.concatenate([bits, np.repeat(bits[-1:], -len(bits) % count, 0)])
    params, losses, parts = jax.device_put(params, full), [], []
    chunks = [jax.device_put(padded[i : i + count], split) for i in range(0, len(padded), count)]
    for batch in batches:
        on_device = jax.tree.map(lambda x: jax.make_array_from_process_local_data(full, np.asarray(x)), batch)
        results = [evaluator(params, chunk, on_device) for chunk in chunks]
        losses.append(np.concatenate(jax.device_get([loss for loss, _ in results])))
        parts.append({name: float(value[0]) for name, value in results[0][1]["parts"].items()})
    return np.mean(losses, 0)[: len(bits)], {name: np.mean([p[name] for p in parts]) for name in parts[0]}


def lower_bits(
    schedule: Schedule,
    names: Sequence[str],
    sizes: np.ndarray,
    loss: float,
    evaluate: Callable[[np.ndarray], np.ndarray],
    settings: DistillLossConfig,
    quant: StudentConfig,
) -> tuple[Schedule, list[Decision]]:
    """The schedule after one round: each confident layer is tried with one bit less, and the cheapest are lowered.

    loss: the validation loss at the present bits; evaluate(bits [n, L]) -> validation losses [n].
    """
    bits, roots = np.asarray(schedule.bits), quant.target_roots
    confident = confident_layers(
        schedule, settings.confidence_method, settings.layer_threshold, settings.variance_threshold
    )
    confident &= np.array([not roots or any(under(name, root) for root in roots) for name in names])
    tried = candidates(schedule, confident, quant.min_bits, settings.candidates)
    lowered = bits - np.eye(len(bits), dtype=bits.dtype)[tried]  # [n, L]
    losses = evaluate(lowered) if len(tried) else np.zeros(0)
    return reduce_bits(
        schedule, names, sizes, tried, (losses - loss) / max(loss, settings.impact_floor),
        threshold=settings.impact_threshold, budget=settings.impact_budget, target=quant.target_bits,
    )  # fmt: skip


def layer_sizes(student: dict) -> np.ndarray:
    """[L]: the number of weights of each fake-quantized layer."""
    weights = map(base_weight, kernels(flatten(student)).values())
    return np.array([weight.kernel.size for weight in weights if isinstance(weight, FakeQuant)])


def average_bits(bits: Array, sizes: np.ndarray) -> float:
    """Mean bits a weight of layers of `bits` [L] and `sizes` [L]."""
    return float((np.asarray(bits) * sizes).sum() / sizes.sum())

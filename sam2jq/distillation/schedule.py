"""The bit schedule of CDPQ: which layers lose a bit. Pure functions of measured losses, without a model.

Letters: L fake-quantized layers, W steps in the confidence window.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError

Array = jax.Array


class Schedule(NamedTuple):
    """bits: float32 [L]; history: [W, L], each layer's losses in the last W steps; seen: int32 [L], number of steps
    taken at the layer's present bits."""

    bits: Array
    history: Array
    seen: Array


class Decision(NamedTuple):
    """Whether a layer lost a bit, and why.

    bits: before the decision; impact: relative increase of the validation loss with this layer alone lowered.
    """

    layer: str
    bits: int
    impact: float
    accepted: bool
    reason: str


def init_schedule(bits: Array, window: int) -> Schedule:
    """The schedule before the first step, for layers of `bits` [L]."""
    return Schedule(bits, jnp.zeros((window, len(bits))), jnp.zeros(len(bits), jnp.int32))


@jax.jit
def observe(state: Schedule, losses: Array) -> Schedule:
    """`state` with the losses [L] of one more step, each relative to the mean square of its layer's outputs."""
    return state._replace(history=jnp.concatenate([state.history[1:], losses[None]]), seen=state.seen + 1)


def confident_layers(state: Schedule, method: str, layer_threshold: float, variance_threshold: float) -> np.ndarray:
    """bool [L]: layers whose window is full and whose mean loss is at most `layer_threshold`.

    The method "variance" also requires a variance of at most `variance_threshold` times the squared mean.
    """
    history, is_full = np.asarray(state.history), np.asarray(state.seen) >= len(state.history)
    mean = history.mean(0)
    is_steady = history.var(0) <= variance_threshold * mean**2 if method == "variance" else True
    return is_full & (mean <= layer_threshold) & is_steady


def candidates(state: Schedule, confident: np.ndarray, min_bits: int, max_count: int | None) -> np.ndarray:
    """Indices of the confident layers above `min_bits`, by rising mean loss; the first `max_count`, or all for None."""
    able = np.flatnonzero(confident & (np.asarray(state.bits) > min_bits))
    order = np.argsort(np.asarray(state.history).mean(0)[able], kind="stable")
    return able[order][:max_count]


def reduce_bits(
    state: Schedule,
    names: Sequence[str],
    sizes: np.ndarray,
    tried: np.ndarray,
    impacts: np.ndarray,
    *,
    threshold: float,
    budget: float,
    target: float | None = None,
) -> tuple[Schedule, list[Decision]]:
    """The schedule in which some of the `tried` layers have one bit less, and a decision for each of `tried`.

    names, sizes: of all L layers, sizes in weights; tried: indices of layers; impacts: for each of `tried`, the
    relative increase of the validation loss. All impacts are measured from the same loss, so their sum bounds what a
    round may cost.

    Layers are taken by rising impact per saved bit. A layer is refused when its own impact exceeds `threshold`, when
    the accepted impacts would exceed `budget`, or when the mean bits a weight have reached `target`. A layer that
    loses a bit starts a new history.
    """
    bits, spent, decisions = np.array(state.bits), 0.0, []
    for i in np.argsort(impacts / sizes[tried], kind="stable"):
        layer, impact = tried[i], float(impacts[i])
        if target is not None and (bits * sizes).sum() <= target * sizes.sum():
            reason = "the target is reached"
        elif not impact <= threshold:  # also refuses an impact that is not a number
            reason = f"over the impact threshold of {threshold:g}"
        elif spent + max(impact, 0.0) > budget:
            reason = f"over what is left of the budget of {budget:g}"
        else:
            reason = ""
            bits[layer] -= 1
            spent += max(impact, 0.0)
        decisions.append(Decision(names[layer], int(state.bits[layer]), impact, not reason, reason or "confident"))
    changed = bits != np.asarray(state.bits)
    return Schedule(jnp.asarray(bits), state.history, jnp.where(changed, 0, state.seen)), decisions


def bit_search(errors: Mapping[str, Mapping[int, float]], widths: Sequence[int], threshold: float) -> dict[str, int]:
    """{layer: bits}: the last of `widths`, in falling order, before the first whose error exceeds `threshold`.

    errors: {layer: {bits: relative error of its weight or output}}. Raises UserError if a layer's highest width exceeds
    it.
    """
    chosen = {}
    for layer, error in errors.items():
        falling = sorted(widths, reverse=True)
        over = next((i for i, bits in enumerate(falling) if error[bits] > threshold), len(falling))
        if over == 0:
            raise UserError(
                f"layer {layer}: even {falling[0]} bits err by {error[falling[0]]:.3g}, over "
                f"distill.confidence_threshold {threshold:g}: raise it, or add more bits to distill.bit_candidates"
            )
        chosen[layer] = falling[over - 1]
    return chosen

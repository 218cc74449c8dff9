"""Which layers lose a bit in CDPQ: pure functions of what was measured, without a model.

Letters: L layers that learn under rounding, W the window of losses that confidence looks back on.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError

Array = jax.Array


class Schedule(NamedTuple):
    """bits: float32 [L]; history: [W, L], the last losses of each layer at its present bits; seen: int32 [L], of how
    many steps they are."""

    bits: Array
    history: Array
    seen: Array


class Decision(NamedTuple):
    """impact: how much the validation loss grew, relative to what it was before any layer was touched."""

    layer: str
    bits: int
    impact: float
    accepted: bool
    reason: str


def init_schedule(bits: Array, window: int) -> Schedule:
    """The schedule before the first step."""
    return Schedule(bits, jnp.zeros((window, len(bits))), jnp.zeros(len(bits), jnp.int32))


@jax.jit
def observe(state: Schedule, losses: Array) -> Schedule:
    """`state` with the losses [L] of one more step, each relative to the scale of its layer's outputs."""
    return state._replace(history=jnp.concatenate([state.history[1:], losses[None]]), seen=state.seen + 1)


def confident_layers(state: Schedule, method: str, layer_threshold: float, variance_threshold: float) -> np.ndarray:
    """bool [L]: layers whose window is full and whose mean loss is at most `layer_threshold`; with the method
    "variance" also those only whose variance is at most `variance_threshold` of the squared mean."""
    history, full = np.asarray(state.history), np.asarray(state.seen) >= len(state.history)
    mean = history.mean(0)
    calm = history.var(0) <= variance_threshold * mean**2 if method == "variance" else True
    return full & (mean <= layer_threshold) & calm


def candidates(state: Schedule, sure: np.ndarray, least: int, most: int | None) -> np.ndarray:
    """Indices of the layers to try with a bit less: `sure` ones above `least` bits, the `most` surest of them."""
    able = np.flatnonzero(sure & (np.asarray(state.bits) > least))
    order = np.argsort(np.asarray(state.history).mean(0)[able], kind="stable")
    return able[order][:most]


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
    """The schedule in which some of the `tried` layers have a bit less, and why each has or has not.

    Those go first that cost least for the bits they save, sizes [L] weights each. One is refused whose own impact is
    over `threshold`, and all are once the impacts accepted add up to `budget`, or the mean bits a weight are at
    `target`. impacts are against the loss at the beginning, so that nothing adds up unseen. A layer that lost a bit
    starts a new history.
    """
    bits, spent, decisions = np.array(state.bits), 0.0, []
    for i in np.argsort(impacts / sizes[tried], kind="stable"):
        layer, impact = tried[i], float(impacts[i])
        if target is not None and (bits * sizes).sum() <= target * sizes.sum():
            reason = "the target is reached"
        elif not impact <= threshold:
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


def bit_search(errors: Mapping[str, Mapping[int, float]], rungs: Sequence[int], threshold: float) -> dict[str, int]:
    """{layer: bits}: the lowest of `rungs`, from the top down, before the first whose error is over `threshold`.

    errors: {layer: {bits: relative error of its weight or output}}. ValueError: a layer's highest rung is over it.
    """
    chosen = {}
    for layer, error in errors.items():
        steps = sorted(rungs, reverse=True)
        over = next((i for i, bits in enumerate(steps) if error[bits] > threshold), len(steps))
        if over == 0:
            raise UserError(
                f"layer {layer}: even {steps[0]} bits err by {error[steps[0]]:.3g}, over distill.confidence_threshold "
                f"{threshold:g}: raise it, or add a wider rung to distill.bit_candidates"
            )
        chosen[layer] = steps[over - 1]
    return chosen

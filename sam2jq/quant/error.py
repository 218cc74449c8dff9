"""Errors of arrays and of the outputs they make: what rounding cost, before any mask is looked at."""

import math

import jax
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.exact import einsum, matmul

Array = jax.Array


def output_error(difference: Array, gram: Array) -> Array:
    """[N]: the mean square error of each output when `difference` [K, N] is added to the weight."""
    return einsum("kn,kn->n", difference, matmul(gram, difference))


def relative_error(got, reference) -> float:
    """|got - reference| / |reference|, Euclidean norms over all elements, in float64; 0 when both are zero."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    check_shapes(got, reference)
    size = np.linalg.norm(reference)
    difference = np.linalg.norm(got - reference)
    return float(difference / size) if size else float("inf") if difference else 0.0


def sqnr(got, reference) -> float:
    """10 log10(|reference|^2 / |got - reference|^2) in dB, over all elements; inf when both are the same."""
    error = relative_error(got, reference)
    return -20 * math.log10(error) if error else float("inf")


def cosine(got, reference) -> float:
    """<got, reference> / (|got| |reference|) over all elements, in float64; 1 when both are zero, 0 when one is."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    check_shapes(got, reference)
    sizes = np.linalg.norm(got), np.linalg.norm(reference)
    if not all(sizes):
        return 0.0 if any(sizes) else 1.0
    return float(np.vdot(got / sizes[0], reference / sizes[1]))


def check_shapes(got: np.ndarray, reference: np.ndarray) -> None:
    if got.shape != reference.shape:
        raise UserError(f"shapes differ: {got.shape} and {reference.shape}")

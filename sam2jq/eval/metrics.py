"""Figures of merit: what quantization cost."""

import numpy as np


def relative_error(got, reference) -> float:
    """|got - reference| / |reference|, Euclidean norms over all elements, in float64; 0 when both are zero."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    if got.shape != reference.shape:
        raise ValueError(f"shapes differ: {got.shape} and {reference.shape}")
    size = np.linalg.norm(reference)
    difference = np.linalg.norm(got - reference)
    return float(difference / size) if size else float("inf") if difference else 0.0


def iou(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Intersection over union [...] of boolean masks [..., H, W]; 1 where both are empty."""
    if got.shape != reference.shape:
        raise ValueError(f"shapes differ: {got.shape} and {reference.shape}")
    intersection, union = (f(got, reference).sum((-2, -1)) for f in (np.logical_and, np.logical_or))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)

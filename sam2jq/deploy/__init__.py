"""Predictors for ONNX files: they need numpy, pillow and one engine, neither jax nor torch."""

from sam2jq.deploy.image import OnnxImagePredictor
from sam2jq.deploy.video import OnnxVideoPredictor

__all__ = ["OnnxImagePredictor", "OnnxVideoPredictor"]

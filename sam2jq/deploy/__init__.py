"""Predictors for ONNX files: they need numpy, pillow and one engine, neither jax nor torch."""

from sam2jq.deploy.image import OnnxImagePredictor

__all__ = ["OnnxImagePredictor"]

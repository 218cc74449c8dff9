"""Quantization of SAM 2 in JAX: a params tree in, a params tree out."""

from sam2jq.models.sam2 import SAM2, VARIANTS, abstract_params, build, init_params
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.video import VideoPredictor
from sam2jq.ptq.recipe import layers, weight_specs
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec

__version__ = "0.1.0"
__all__ = [
    "SAM2",
    "VARIANTS",
    "ImagePredictor",
    "QTensor",
    "QuantSpec",
    "VideoPredictor",
    "abstract_params",
    "build",
    "dequantize",
    "init_params",
    "layers",
    "quantize",
    "round_weights",
    "weight_specs",
]

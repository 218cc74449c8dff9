"""Quantization of SAM 2 in JAX: a params tree in, a params tree out. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sam2jq.api import load, quantize, save
    from sam2jq.config.quant import CalibConfig, QuantConfig, WeightsConfig
    from sam2jq.errors import UserError
    from sam2jq.models.sam2 import SAM2, VARIANTS, abstract_params, build, init_params
    from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator
    from sam2jq.predictors.image import ImagePredictor
    from sam2jq.predictors.stream import StreamPredictor
    from sam2jq.predictors.video import VideoPredictor
    from sam2jq.ptq.recipe import layers, weight_specs
    from sam2jq.quant.algorithms.activations import InputsConfig, quantize_activations, quantize_outputs
    from sam2jq.quant.algorithms.bias_correction import bias_correction
    from sam2jq.quant.algorithms.gptq import GptqConfig, gptq
    from sam2jq.quant.algorithms.lowrank import LowRankConfig, low_rank
    from sam2jq.quant.algorithms.ridge import ridge
    from sam2jq.quant.algorithms.rotate import RotationConfig, rotate
    from sam2jq.quant.algorithms.rtn import round_weights, rtn
    from sam2jq.quant.algorithms.smooth import SmoothConfig, smooth
    from sam2jq.quant.leaves import materialize_params
    from sam2jq.quant.qtensor import QTensor, dequantize
    from sam2jq.quant.spec import QuantSpec
    from sam2jq.quant.transform import Transform, chain, each_layer, named_chain

_MODULES = {
    "api": ("load", "quantize", "save"),
    "config.quant": ("CalibConfig", "QuantConfig", "WeightsConfig"),
    "errors": ("UserError",),
    "models.sam2": ("SAM2", "VARIANTS", "abstract_params", "build", "init_params"),
    "predictors.automatic_masks": ("AutomaticMaskGenerator",),
    "predictors.image": ("ImagePredictor",),
    "predictors.stream": ("StreamPredictor",),
    "predictors.video": ("VideoPredictor",),
    "ptq.recipe": ("layers", "weight_specs"),
    "quant.algorithms.activations": ("InputsConfig", "quantize_activations", "quantize_outputs"),
    "quant.algorithms.bias_correction": ("bias_correction",),
    "quant.algorithms.gptq": ("GptqConfig", "gptq"),
    "quant.algorithms.lowrank": ("LowRankConfig", "low_rank"),
    "quant.algorithms.ridge": ("ridge",),
    "quant.algorithms.rotate": ("RotationConfig", "rotate"),
    "quant.algorithms.rtn": ("round_weights", "rtn"),
    "quant.algorithms.smooth": ("SmoothConfig", "smooth"),
    "quant.leaves": ("materialize_params",),
    "quant.qtensor": ("QTensor", "dequantize"),
    "quant.spec": ("QuantSpec",),
    "quant.transform": ("Transform", "chain", "each_layer", "named_chain"),
}
_NAMES = {name: f"sam2jq.{module}" for module, names in _MODULES.items() for name in names}
__all__ = [
    "SAM2",
    "VARIANTS",
    "AutomaticMaskGenerator",
    "CalibConfig",
    "GptqConfig",
    "ImagePredictor",
    "InputsConfig",
    "LowRankConfig",
    "QTensor",
    "QuantConfig",
    "QuantSpec",
    "RotationConfig",
    "SmoothConfig",
    "StreamPredictor",
    "Transform",
    "UserError",
    "VideoPredictor",
    "WeightsConfig",
    "__version__",
    "abstract_params",
    "bias_correction",
    "build",
    "chain",
    "dequantize",
    "each_layer",
    "gptq",
    "init_params",
    "layers",
    "load",
    "low_rank",
    "materialize_params",
    "named_chain",
    "quantize",
    "quantize_activations",
    "quantize_outputs",
    "ridge",
    "rotate",
    "round_weights",
    "rtn",
    "save",
    "smooth",
    "weight_specs",
]


def __getattr__(name: str):
    """The object called `name` in __all__; its module is imported on first use (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module 'sam2jq' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

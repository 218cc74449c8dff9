"""Quantized params as a plain state dict for the original SAM 2 code, and a builder for the original model."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from converters.hydra_config import hydra_config
from converters.names import to_torch
from converters.torch_files import save_torch
from sam2jq.errors import UserError
from sam2jq.models.sam2 import is_image_only
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.package import MODEL_KEYS


def save_vanilla(path: str | Path, params: dict, random: bool = False, model: Mapping | None = None) -> None:
    """Writes {"model": state_dict} with dequantized weights. build_sam2 loads the file strictly, without this package.

    random: whether the weights are random; then the file also has {"random_weights": True}. model: name, version and
    image_size, which the file keeps as "sam2jq". build_sam2 ignores both.
    Raises UserError if the params lack the memory, without which build_sam2 loads nothing.
    """
    if is_image_only(params):
        raise UserError(f"{path}: build_sam2 loads no model without the weights of the memory: keep the package")
    note = {"random_weights": True} if random else {}
    if model:
        note["sam2jq"] = {key: model[key] for key in MODEL_KEYS}
    save_torch(path, {"model": to_torch(materialize_params(params))} | note)


def build_original(
    name: str,
    version: str = "2.1",
    image_size: int | None = None,
    checkpoint: str | Path | None = None,
    *,
    video: bool = False,
) -> torch.nn.Module:
    """The unmodified SAM 2 of the `sam2` package, on the CPU, in eval mode; with `video`, its SAM2VideoPredictor."""
    define_torchvision_operators()
    from sam2.build_sam import build_sam2, build_sam2_video_predictor

    config, overrides = hydra_config(name, version, image_size)
    checkpoint = None if checkpoint is None else os.fspath(checkpoint)
    make = build_sam2_video_predictor if video else build_sam2
    return make(config, checkpoint, device="cpu", hydra_overrides_extra=overrides)


@cache  # the operators exist as long as the library object
def define_torchvision_operators() -> torch.library.Library | None:
    """The library that declares torchvision's nms and qnms if its binary cannot be loaded; None if it can.

    The binary does not load beside a CPU build of torch. torchvision's import fails without the two operators; SAM 2
    itself calls neither.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None

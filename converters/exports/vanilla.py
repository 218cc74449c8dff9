"""Quantized params as a plain state dict for the original SAM 2 code, and a builder for the original model."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from converters.names import to_torch
from converters.torch_files import save_torch
from sam2jq.errors import UserError
from sam2jq.models.sam2 import VARIANTS, is_image_only, variant_name
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.package import MODEL_KEYS

CONFIGS = {"tiny": "t", "small": "s", "base-plus": "b+", "large": "l", "nano": "t"}
NANO = (
    "++model.image_encoder.trunk.embed_dim=32",
    "++model.image_encoder.trunk.stages=[1,2,3,1]",
    "++model.image_encoder.trunk.global_att_blocks=[4]",
    "++model.image_encoder.trunk.window_spec=[8,4,8,4]",
    "++model.image_encoder.neck.d_model=64",
    "++model.image_encoder.neck.position_encoding.num_pos_feats=64",
    "++model.image_encoder.neck.backbone_channel_list=[256,128,64,32]",
    "++model.memory_attention.d_model=64",
    "++model.memory_attention.num_layers=2",
    "++model.memory_attention.layer.d_model=64",
    "++model.memory_attention.layer.dim_feedforward=256",
    "++model.memory_attention.layer.self_attention.embedding_dim=64",
    "++model.memory_attention.layer.cross_attention.embedding_dim=64",
    "++model.memory_attention.layer.cross_attention.kv_in_dim=16",
    "++model.memory_encoder.out_dim=16",
    "++model.memory_encoder.in_dim=64",
    "++model.memory_encoder.position_encoding.num_pos_feats=16",
    "++model.memory_encoder.fuser.layer.dim=64",
    "++model.memory_encoder.mask_downsampler.embed_dim=64",
)


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


def hydra_config(name: str, version: str = "2.1", image_size: int | None = None) -> tuple[str, list[str]]:
    """(config file, `hydra_overrides_extra`) with which build_sam2 builds the model called `name`."""
    name = variant_name(name)
    overrides = list(NANO) if name == "nano" else []
    size = image_size or VARIANTS[name].image_size
    if size != 1024:
        overrides.append(f"++model.image_size={size}")
    family = {"2.0": "sam2", "2.1": "sam2.1"}[version]
    return f"configs/{family}/{family}_hiera_{CONFIGS[name]}.yaml", overrides


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

"""Models, checkpoints and packages as several commands load them."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.cli.run_folder import stage
from sam2jq.config.run import CacheConfig, EvaluateConfig, ModelConfig, PredictConfig, TrackConfig
from sam2jq.deploy import OnnxImagePredictor, OnnxVideoPredictor
from sam2jq.deploy.folder import is_onnx_folder, read_description
from sam2jq.errors import UserError
from sam2jq.models.precision import float_dtype
from sam2jq.models.sam2 import SAM2, is_image_only
from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.predictors.prompted_video import PromptedVideo
from sam2jq.predictors.video import VideoPredictor
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.training.parallel_map import Replicas, replicate

Place = Callable[[Callable, dict], Any]  # (what makes a predictor of params, params) -> the predictor, or several
RANDOM = "warning     the weights are RANDOM: no result here says anything about a trained model"
log = logging.getLogger("sam2jq")


def on_one(make: Callable, params: dict) -> Any:
    """make(params), on jax's default device."""
    return make(params)


def configure_jax(device: str, cache: CacheConfig, key: str = "model.device") -> None:
    """Sets jax's device, float32 precision and the cache of compiled programs.

    A device of jax's first platform is not set as the default one, so that all of that platform are used.
    Raises UserError, which names the setting `key`, if there is no such device.
    """
    if device != "auto":
        try:
            first = jax.local_devices(backend=device)[0]
        except RuntimeError as error:
            raise UserError(f"{key} {device}: no such device here; use auto") from error
        if first.platform != jax.default_backend():
            jax.config.update("jax_default_device", first)
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 products on GPU and TPU too
    use_compilation_cache(cache)


def load_model(config: ModelConfig, cache: CacheConfig, image_size: int | None = None):
    """Returns (SAM2, Checkpoint) of `config`, on its device; image_size: in place of the config's.

    Raises UserError or OSError if the device or the checkpoint is missing, or the checkpoint does not fit the model.
    """
    configure_jax(config.device, cache)
    return load_checkpoint_of(config, image_size)


def load_image_predictor(config: PredictConfig | EvaluateConfig, place: Place = on_one) -> tuple[PromptedImage, bool]:
    """The predictor of a checkpoint or of a folder of ONNX files, and whether its weights are random.

    place: `replicate` for a predictor of a checkpoint on each device.
    """
    return _load_predictor(config, ImagePredictor, OnnxImagePredictor, place)


def load_video_predictor(config: TrackConfig | EvaluateConfig, place: Place = on_one) -> tuple[PromptedVideo, bool]:
    """As `load_image_predictor`, for clips."""
    if config.memory_bits and is_onnx_folder(config.model.checkpoint):
        raise UserError("memory_bits: the ONNX files hold memories in float32 only: leave it out, or give a package")
    return _load_predictor(config, partial(VideoPredictor, memory_bits=config.memory_bits), OnnxVideoPredictor, place)


def load_mask_generators(config: EvaluateConfig) -> Replicas:
    """Pairs of generators of all masks of an image, of `config.model` and of `config.reference`, the same model."""
    if is_onnx_folder(config.model.checkpoint):
        raise UserError("task everything: ONNX files have no mask generator yet: give a package or a checkpoint")
    refuse_engine(config)
    model, checkpoint = load_model(config.model, config.cache)
    settings = asdict(config.everything) | {"dtype": config.model.dtype}
    _, other = load_checkpoint_of(replace(resolved(config.model, model), checkpoint=config.reference))
    pair = tuple(materialize_weights(one.params) for one in (checkpoint, other))
    make = lambda pair: tuple(AutomaticMaskGenerator(model, params, **settings) for params in pair)
    return replicate(make, pair)


def _load_predictor(config: PredictConfig | EvaluateConfig, of_params: Callable, of_onnx: Callable, place: Place):
    if is_onnx_folder(config.model.checkpoint):
        predictor = of_onnx(config.model.checkpoint, config.engine, **onnx_settings(config))
        return predictor, predictor.random
    refuse_engine(config)
    model, checkpoint = load_model(config.model, config.cache)
    make = partial(of_params, model, dtype=config.model.dtype)
    return place(make, materialize_weights(checkpoint.params)), checkpoint.random


def refuse_engine(config: PredictConfig | EvaluateConfig) -> None:
    """Raises UserError if an engine of ONNX files is set for a checkpoint, which jax runs."""
    if config.engine != "auto":
        raise UserError(f"engine {config.engine}: it runs folders of ONNX files, and {config.model.checkpoint} is "
                        "none: leave it out, or give what sam2jq export --to onnx wrote")  # fmt: skip


def onnx_settings(config: PredictConfig | EvaluateConfig) -> dict:
    """The settings of a predictor of ONNX files. Raises UserError if those of the model contradict the files."""
    about = read_description(config.model.checkpoint)
    for key, value in about["model"].items():
        given = getattr(config.model, key)
        if given is not None and str(given).replace("_", "-") != str(value):
            raise UserError(f"model.{key} {given}: {config.model.checkpoint} holds a model with {value}: leave it out")
    if config.model.device not in ("auto", "cpu"):
        raise UserError(f"model.device {config.model.device}: ONNX files run on the CPU: use auto")
    if about["random_weights"]:
        log.warning(RANDOM)
    return {"dtype": config.model.dtype, "cache": str(Path(config.cache.root) / "openvino")}


def load_checkpoint_of(config: ModelConfig, image_size: int | None = None):
    """Returns (SAM2, Checkpoint) of `config`; its device is ignored."""
    from converters.checkpoint import open_checkpoint

    size = config.image_size if image_size is None else image_size
    with stage("load", config.checkpoint):
        model, checkpoint = open_checkpoint(config.checkpoint, config.name, config.version, size)
    if checkpoint.random:
        log.warning(RANDOM)
    return model, checkpoint


def resolved(config: ModelConfig, model: SAM2) -> ModelConfig:
    """`config` with the name, version and image size of the model that was loaded, and the dtype it computes in."""
    from sam2jq.api import describe_model

    return replace(config, **describe_model(model), dtype=float_dtype(config.dtype))


def with_image_size(model: SAM2, image_size: int) -> SAM2:
    """`model` for another image size; its params stay the same."""
    return model.clone(variant=replace(model.variant, image_size=image_size))


def require_memory(checkpoint, what: str) -> None:
    """Raises UserError if a checkpoint is an image-only model, which `what` cannot use."""
    if is_image_only(checkpoint.params):
        raise UserError(
            f"{checkpoint.source} is an image-only model, without the weights of the memory: it cannot be used for "
            f"{what}; give the checkpoint of the video model"
        )

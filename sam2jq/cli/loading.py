"""Models, checkpoints and packages as several commands load them."""

import logging
from dataclasses import replace

import jax

from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.cli.run_folder import stage
from sam2jq.config.run import CacheConfig, ModelConfig
from sam2jq.errors import UserError
from sam2jq.models.sam2 import SAM2, is_image_only

log = logging.getLogger("sam2jq")


def configure_jax(device: str, cache: CacheConfig, key: str = "model.device") -> None:
    """Sets jax's default device, float32 precision and the cache of compiled programs.

    Raises UserError, which names the setting `key`, if there is no such device.
    """
    if device != "auto":
        try:
            jax.config.update("jax_default_device", jax.devices(device)[0])
        except RuntimeError as error:
            raise UserError(f"{key} {device}: no such device here; use auto") from error
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 products on GPU and TPU too
    use_compilation_cache(cache)


def load_model(config: ModelConfig, cache: CacheConfig, image_size: int | None = None):
    """Returns (SAM2, Checkpoint) of `config`, on its device; image_size: in place of the config's.

    Raises UserError or OSError if the device or the checkpoint is missing, or the checkpoint does not fit the model.
    """
    configure_jax(config.device, cache)
    return load_checkpoint_of(config, image_size)


def load_checkpoint_of(config: ModelConfig, image_size: int | None = None):
    """Returns (SAM2, Checkpoint) of `config`; its device is ignored."""
    from converters.checkpoint import open_checkpoint

    size = config.image_size if image_size is None else image_size
    with stage("load", config.checkpoint):
        model, checkpoint = open_checkpoint(config.checkpoint, config.name, config.version, size)
    if checkpoint.random:
        log.warning("warning     the weights are RANDOM: no result here says anything about a trained model")
    return model, checkpoint


def resolved(config: ModelConfig, model: SAM2) -> ModelConfig:
    """`config` with the name, version and image size of the model that was loaded."""
    from sam2jq.api import describe_model

    return replace(config, **describe_model(model))


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

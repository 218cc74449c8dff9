"""Models, checkpoints and packages as several commands load them."""

import logging

import jax

from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.cli.run_folder import stage
from sam2jq.config.quant import QuantConfig
from sam2jq.config.run import CacheConfig, ModelConfig
from sam2jq.errors import UserError
from sam2jq.models.sam2 import SAM2, build
from sam2jq.ptq.run import with_bits_of

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
    """Returns (SAM2, Checkpoint) of `config`, on its device.

    Raises UserError or OSError if the device or the checkpoint is missing, or the checkpoint does not fit the model.
    """
    configure_jax(config.device, cache)
    return load_checkpoint_of(config, image_size)


def load_checkpoint_of(config: ModelConfig, image_size: int | None = None):
    """Returns (SAM2, Checkpoint) of `config`; its device is ignored."""
    from converters.checkpoint import load_checkpoint

    model: SAM2 = build(config.name, config.version, image_size)
    with stage("load", f"{config.name} {config.version} from {config.checkpoint}"):
        checkpoint = load_checkpoint(config.checkpoint, model)
    if checkpoint.random:
        log.warning("warning     the weights are RANDOM: no result here says anything about a trained model")
    return model, checkpoint


def replay_bits(quant: QuantConfig) -> QuantConfig:
    """Returns `quant` with the bits of the package that its `bits_from` names; `quant` itself if it names none."""
    from sam2jq import api

    if not quant.bits_from:
        return quant
    return with_bits_of(quant, api.open_package(quant.bits_from).summary()["layers"])

"""A command in several processes: they join, end together, and share the folder that process 0 writes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from sam2jq.cli.run_folder import job_folder
from sam2jq.config.run import DistributedConfig
from sam2jq.training.distributed import fails_together, initialize_distributed, wait_for_processes

log = logging.getLogger("sam2jq")


@contextmanager
def joined_processes(config: DistributedConfig, device: str) -> Iterator[None]:
    """A block in which this process is part of the run that `config` describes; see `fails_together`.

    device: that models run on, "auto", "cpu", ... Only process 0 logs. Without a coordinator nothing is changed.
    """
    if config.coordinator is None:
        yield
        return
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # the processes connect the devices of jax's first platform
    initialize_distributed(config)
    if jax.process_index():
        log.setLevel(logging.ERROR)
    with fails_together():
        yield


@contextmanager
def shared_job_folder(final: Path, settings: str, resumable: bool = False) -> Iterator[Path]:
    """The `job_folder` of process 0, for all processes."""
    if jax.process_index() == 0:
        with job_folder(final, settings, resumable) as folder:
            wait_for_processes("folder")
            yield folder
    else:
        wait_for_processes("folder")
        yield final.with_name(f".{final.name}.partial")

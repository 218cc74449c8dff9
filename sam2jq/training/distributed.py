"""Several processes that become one run."""

import socket
import time
from contextlib import ExitStack

import jax
from jax.experimental import multihost_utils

from sam2jq.config.distill import DistributedConfig
from sam2jq.errors import UserError


def initialize_distributed(config: DistributedConfig) -> None:
    """Makes this process one of those that the config names; nothing where it names none.

    ValueError: one did not come within the time, and is named; or nothing tells where they are.
    """
    if config.coordinator is None:
        return
    if config.coordinator == "auto":
        try:
            jax.distributed.initialize(initialization_timeout=config.timeout)
        except ValueError as error:
            raise UserError("distributed.coordinator auto: no Slurm job and no TPU pod; give HOST:PORT") from error
    else:
        (connect if config.index else wait_for_workers)(config)  # jax itself would abort a process that waits in vain
        places = config.coordinator, config.processes, config.index
        jax.distributed.initialize(*places, initialization_timeout=config.timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def wait_for_workers(config: DistributedConfig) -> None:
    """Returns once every other process has called."""
    give_up = time.monotonic() + config.timeout
    absent = set(map(str, range(1, config.processes)))
    with socket.create_server(("", port_of(config))) as server, ExitStack() as calls:
        here = []
        while absent:
            server.settimeout(max(give_up - time.monotonic(), 0.01))
            try:
                here.append(calls.enter_context(server.accept()[0]))
                here[-1].settimeout(1)
                absent.discard(here[-1].recv(16).decode(errors="replace"))
            except OSError as error:  # nobody came, or one that went again
                if time.monotonic() > give_up:
                    who = ", ".join(sorted(absent, key=int))
                    raise UserError(f"{waited(config)} {who}: start it, with {config.coordinator}") from error
        for one in here:
            one.sendall(b"go")


def connect(config: DistributedConfig) -> None:
    """Returns once process 0 says that all are there."""
    give_up = time.monotonic() + config.timeout
    host = config.coordinator.rpartition(":")[0]
    while True:
        try:
            with socket.create_connection((host, port_of(config)), timeout=1) as line:
                line.sendall(str(config.index).encode())
                line.settimeout(max(give_up - time.monotonic(), 0.01))
                if line.recv(2) == b"go":
                    return
                raise ConnectionResetError("it ended the call")
        except OSError as error:
            if time.monotonic() > give_up:
                where = f"0 at {config.coordinator} ({error}): start it there, or correct the address"
                raise UserError(f"{waited(config)} {where}") from error
            time.sleep(0.2)


def port_of(config: DistributedConfig) -> int:
    return int(config.coordinator.rpartition(":")[2])


def waited(config: DistributedConfig) -> str:
    return f"distributed: process {config.index} of {config.processes} waited {config.timeout} s for process"


def wait_for_processes(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

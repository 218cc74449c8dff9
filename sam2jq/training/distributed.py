"""Several processes that form one run, and that end together when one of them fails."""

import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Lock, Thread
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the only way to the store of the coordination service
from jax.experimental import multihost_utils

from sam2jq.config.run import DistributedConfig
from sam2jq.errors import UserError

# keys in the store of the coordination service
FAILED, DONE, ARRIVED = "sam2jq/failed", "sam2jq/done/", "sam2jq/arrived/"
POLL_SECONDS = 0.5
GRACE_SECONDS = 10  # that processes wait for each other to disconnect after a failure


def initialize_distributed(config: DistributedConfig) -> None:
    """Makes this process part of the run that `config` describes; does nothing if it has no coordinator.

    Raises UserError if a process does not connect within `timeout` seconds, which it names, or if no coordinator can be
    found.
    """
    if config.coordinator is None:
        return
    if config.coordinator == "auto":
        try:
            jax.distributed.initialize(initialization_timeout=config.timeout)
        except ValueError as error:
            raise UserError("distributed.coordinator auto: no Slurm job and no TPU pod; give HOST:PORT") from error
    else:
        # jax aborts a process that waits in vain, so the processes find each other before it is initialized.
        (connect if config.index else wait_for_workers)(config)
        address = config.coordinator, config.processes, config.index
        jax.distributed.initialize(*address, initialization_timeout=config.timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def wait_for_workers(config: DistributedConfig) -> None:
    """Returns once every other process has connected. Raises UserError that names those that did not in time."""
    deadline = time.monotonic() + config.timeout
    missing = set(map(str, range(1, config.processes)))
    with socket.create_server(("", coordinator_port(config))) as server, ExitStack() as stack:
        connections = []
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connections.append(stack.enter_context(server.accept()[0]))
                connections[-1].settimeout(1)
                missing.discard(connections[-1].recv(16).decode(errors="replace"))
            except OSError as error:  # no connection, or one that was closed again
                if time.monotonic() > deadline:
                    names = ", ".join(sorted(missing, key=int))
                    raise UserError(f"{waited(config)} {names}: start it, with {config.coordinator}") from error
        for connection in connections:
            connection.sendall(b"go")


def connect(config: DistributedConfig) -> None:
    """Returns once process 0 reports that all processes have connected. Raises UserError if it does not in time."""
    deadline = time.monotonic() + config.timeout
    host = config.coordinator.rpartition(":")[0]
    while True:
        try:
            with socket.create_connection((host, coordinator_port(config)), timeout=1) as connection:
                connection.sendall(str(config.index).encode())
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                if connection.recv(2) == b"go":
                    return
                raise ConnectionResetError("it closed the connection")
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"0 at {config.coordinator} ({error}): start it there, or correct the address"
                raise UserError(f"{waited(config)} {where}") from error
            time.sleep(0.2)


def coordinator_port(config: DistributedConfig) -> int:
    """The port in HOST:PORT."""
    return int(config.coordinator.rpartition(":")[2])


def waited(config: DistributedConfig) -> str:
    """The start of the error about a process that did not connect."""
    return f"distributed: process {config.index} of {config.processes} waited {config.timeout} s for process"


def wait_for_processes(name: str) -> None:
    """Returns once all processes have called it with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_gather_objects(value: Any) -> list:
    """[value of process 0, of process 1, ...] in each of the processes, which all call this; sent as pickles."""
    if jax.process_count() == 1:
        return [value]
    wait_without_limit()
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def wait_without_limit() -> None:
    """Returns once all processes have called it as often as this one. Collective operations would end with an error
    after some minutes."""
    client = distributed.global_state.client
    calls = client.key_value_increment(f"{ARRIVED}{jax.process_index()}", 1)
    while sum(int(count) >= calls for _, count in client.key_value_dir_get(ARRIVED)) < jax.process_count():
        time.sleep(POLL_SECONDS / 5)


@contextmanager
def fails_together() -> Iterator[None]:
    """A block that ends in every process within seconds once it fails in one; use it right after initialization.

    The process that fails raises its own error. Each other process prints one line that names that process and its
    error, and exits with code 2, also when it waits in a collective operation, which no exception can interrupt. A
    process whose block ends well waits there for the others, which may take longer.
    """
    client = distributed.global_state.client
    if client is None:
        yield
        return
    index, count, ended, leaving = jax.process_index(), jax.process_count(), Event(), Lock()
    Thread(target=exit_on_failure, args=(client, ended, leaving), daemon=True).start()
    try:
        yield
        client.key_value_set(f"{DONE}{index}", "")
        wait_for_keys(client, DONE, count)
    except BaseException as error:
        with leaving:  # never entered if another process failed first: `exit_on_failure` ends this one
            ended.set()
            announce_failure(client, index, error)
        raise
    ended.set()


def announce_failure(client, index: int, error: BaseException) -> None:
    """Tells the other processes of `error` and disconnects together with them."""
    message = " ".join(str(error).split()) or type(error).__name__
    client.key_value_set(FAILED, f"process {index} failed: {message}", allow_overwrite=True)
    disconnect()


def exit_on_failure(client, ended: Event, leaving: Lock) -> None:
    """Ends this process once another one has announced its failure."""
    while not ended.wait(POLL_SECONDS):
        try:
            message = dict(client.key_value_dir_get(FAILED.rpartition("/")[0])).get(FAILED)
        except jax.errors.JaxRuntimeError:  # no connection to process 0: jax ends this process if it stays so
            continue
        if not message:
            continue
        with leaving:
            if not ended.is_set():
                print(f"sam2jq: error: distributed: {message}", file=sys.stderr, flush=True)
                disconnect()
                os._exit(2)


def disconnect() -> None:
    """Leaves the coordination service as soon as all processes do, or after GRACE_SECONDS.

    jax aborts each process that is still connected when process 0, which runs the service, ends. So process 0 must not
    end before the process that failed has left; and a process that has left can end when it likes.
    """
    leave = Thread(target=distributed.global_state.shutdown, daemon=True)
    leave.start()
    leave.join(GRACE_SECONDS)
    distributed.global_state.client = None  # if a process is missing: at exit, jax would wait for it


def wait_for_keys(client, prefix: str, count: int) -> None:
    """Returns once the store holds `count` keys that start with `prefix`."""
    while len(client.key_value_dir_get(prefix)) < count:
        time.sleep(POLL_SECONDS / 5)

"""Tests in processes of their own: virtual devices, and processes that form one run."""

import os
import socket
from contextlib import suppress


def free_port() -> int:
    """Of the highest 4096, where Slurm's jobs meet."""
    with socket.socket() as free:
        for port in range(61440, 65536):
            with suppress(OSError):
                free.bind(("127.0.0.1", port))
                return port
    raise OSError("no port is free")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many virtual devices, which finds the packages of this folder."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()}

"""What the measurements of this folder share; it imports no framework, so that peak memory is of nothing else."""

import time
from collections.abc import Callable
from pathlib import Path


def seconds(run: Callable[[], object]) -> float:
    """The duration of run()."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def proc(file: str, key: str) -> str:
    """The value of the first line of a file under /proc that starts with `key`."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(key))


def processor() -> str:
    """The name of the processor."""
    return proc("cpuinfo", "model name")


def peak_gigabytes() -> float:
    """The peak memory of this process in GB. ru_maxrss includes the memory of the parent process."""
    return 1024 * int(proc("self/status", "VmHWM").split()[0]) / 1e9

"""What the measurements of this folder share; it imports no framework, so that peak memory is of nothing else."""

import time
from collections.abc import Callable
from pathlib import Path


def seconds(run: Callable[[], object]) -> float:
    """The duration of run()."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))

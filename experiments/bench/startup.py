"""Prints a table of the time that small runs take with an empty and with a full cache of compiled programs.

python experiments/bench/startup.py --runs 3 > experiments/bench/startup.md

Images of 64 pixels make the arithmetic short, so that the seconds are those of starting, tracing and compiling. Each
run is a process of its own, as users have it. A program counts where jax compiles it or reads it from the cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1]
JOBS = {
    "quantize": ["--config", EXPERIMENTS / "nano_w4a16.yaml", "--quant.calib.image_size", 64]
    + ["--quant.calib.num_samples", 12, "--measure.num_images", 2],
    "distill": ["--config", EXPERIMENTS / "cdpq_nano.yaml", "--data.image_size", 64, "--data.train_samples", 12]
    + ["--data.val_samples", 4, "--train.epochs", 2, "--train.checkpoint_every", 1, "--ptq.calib.num_samples", 2]
    + ["--measure.num_images", 2],
}
COMMAND = [sys.executable, "-m", "sam2jq"]
COUNTER = "Finished XLA compilation of"  # a line of jax's log for each program, also if it comes from the cache


def run(job: str, cache: Path) -> tuple[float, int]:
    """The seconds of one run of a job of JOBS, and the number of its programs. `cache` is its cache folder."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_LOG_COMPILES": "1"}
    with tempfile.TemporaryDirectory() as out:
        where = ["--cache.root", cache, "--output.root", out]
        begin = time.perf_counter()
        command = [*COMMAND, job, *map(str, [*JOBS[job], *where])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return seconds, (done.stdout + done.stderr).count(COUNTER)


def measure(job: str, runs: int) -> str:
    """One line of the table."""
    empty, full = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            seconds, programs = run(job, cache)
            empty.append(seconds)
            # the statistics are kept too, but a run that finds them does not calibrate: it would measure less
            for file in (cache / "calibration").glob("*"):
                file.unlink()
            full.append(run(job, cache)[0])
    cell = lambda x: f"{statistics.median(x):.0f} ({min(x):.0f}-{max(x):.0f})"
    return f"| `{job}` | {cell(empty)} | {cell(full)} | {programs} |"


def main() -> None:
    from timing import processor  # beside this script; a test imports this file as a module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    print("# Start-up: seconds of small runs\n")
    print(f"`python experiments/bench/startup.py --runs {runs}` on {os.cpu_count()} cores of {processor()},")
    print(f"jax {version('jax')}; medians of {runs} runs (least to most).\n")
    print("| run | empty cache | full cache | programs |\n|---|---|---|---|")
    for job in JOBS:
        print(measure(job, runs), flush=True)


if __name__ == "__main__":
    main()

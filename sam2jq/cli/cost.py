"""What an image and a click cost in each program that runs a model: seconds, peak memory and size of the files.

`python -m sam2jq.cli.cost JSON` measures one program in a process of its own, so that the peak is of nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sam2jq.deploy import OnnxImagePredictor
from sam2jq.deploy.folder import is_onnx_folder
from sam2jq.errors import UserError
from sam2jq.predictors.prompted_image import PromptedImage

if TYPE_CHECKING:
    from sam2jq.config.run import Config

RUNS = 5  # after one that compiles
log = logging.getLogger("sam2jq")


def measure_costs(config: Config, files: Path, engines: Iterable[str]) -> dict[str, dict[str, float]]:
    """{"full precision" and each engine: {"seconds": median of RUNS, "peak_gb"}}, the engines also with "megabytes".

    Full precision is the checkpoint of `config` in JAX. files: the folder of the ONNX files. A program that fails is
    left out, and a line of the log says why.
    """
    model = asdict(config.model) | {"root": config.cache.root}
    size = folder_megabytes(files)
    programs = {"full precision": model}
    for engine in engines:
        programs[engine] = model | {"checkpoint": str(files), "engine": engine}
        programs[engine]["dtype"] = engine_dtype(engine, config.model.dtype)
    costs = {}
    for name, settings in programs.items():
        try:
            costs[name] = run_alone(settings) | ({} if settings is model else {"megabytes": size})
        except UserError as error:
            log.warning("note        the cost in %s is left out: %s", name, error)
    return costs


def folder_megabytes(folder: Path) -> float:
    """The size of all files of a folder, in MB."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def engine_dtype(engine: str, dtype: str) -> str:
    """The dtype in which an engine computes for a model of `dtype`: bfloat16 in OpenVINO only."""
    return dtype if (engine, dtype) == ("openvino", "bfloat16") else "auto"


def run_alone(settings: dict) -> dict[str, float]:
    """The cost of one program, measured by a new process. Raises UserError with what it wrote last, if it fails."""
    # -P: without it, files of the current folder such as statistics.py would be imported
    command = [sys.executable, "-P", "-m", "sam2jq.cli.cost", json.dumps(settings)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    results = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode == 0 and results:
        return json.loads(results[0])
    reason = f"its process ended with code {done.returncode}"
    if done.returncode > 0:  # what a process that was killed wrote last is not the cause
        reason = (done.stderr.strip().splitlines() or [reason])[-1]
    raise UserError(reason)


def open_predictor(settings: dict) -> PromptedImage:
    """The predictor of a folder of ONNX files, for which jax is not imported, or of a checkpoint."""
    checkpoint, dtype = settings["checkpoint"], settings["dtype"]
    if is_onnx_folder(checkpoint):
        return OnnxImagePredictor(checkpoint, settings["engine"], dtype=dtype)
    from sam2jq import ImagePredictor, load
    from sam2jq.cli.loading import configure_jax
    from sam2jq.config.run import CacheConfig

    configure_jax(settings["device"], CacheConfig(root=settings["root"]))
    model, params = load(checkpoint, **{key: settings[key] for key in ("name", "version", "image_size")})
    return ImagePredictor(model, params, dtype=dtype)


def peak_gigabytes() -> float:
    """The peak memory of this process. ru_maxrss of Linux begins with the memory of the parent process."""
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS, where ru_maxrss is in bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1]) / 1e9


def main(settings: dict) -> None:
    """Prints the cost of the program of `settings` as JSON."""
    predictor = open_predictor(settings)
    side = predictor.image_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    seconds = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        predictor.set_image(image)
        predictor.predict(np.array([[side / 2, side / 2]], np.float32), np.array([1], np.int32))
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_gb": peak_gigabytes()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

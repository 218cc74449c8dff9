"""The programs that run an ONNX file, each as one function: {input: array} -> {output: array}."""

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sam2jq.errors import UserError

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
DTYPES = ("auto", "float32", "bfloat16")
log = logging.getLogger("sam2jq")


def open_onnxruntime(path: Path, dtype: str, cache: str | None) -> Run:
    import onnxruntime

    if dtype == "bfloat16":
        raise UserError("dtype bfloat16: onnxruntime computes in float32 on a CPU; use engine openvino, or dtype auto")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about initializers that its own optimizations left over
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs))))


def open_openvino(path: Path, dtype: str, cache: str | None) -> Run:
    import openvino

    settings = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # else it rounds the inputs of 4-bit layers
        # else it computes in bfloat16 where the processor can, which costs the demo model a point of mIoU
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
    }
    if cache:
        settings["CACHE_DIR"] = cache
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    # an output has the name of the tensor behind it, too
    return lambda inputs: {name: x for output, x in compiled(dict(inputs)).items() for name in output.names}


ENGINES = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}  # the first that is installed is "auto"


def installed_engines() -> list[str]:
    """The names in ENGINES that are installed."""
    return [name for name in ENGINES if find_spec(name)]


def choose_engine(engine: str) -> str:
    """The name in ENGINES that `engine` means. Raises UserError if it is unknown or not installed."""
    if engine != "auto" and engine not in ENGINES:
        raise UserError(f"engine {engine!r}: allowed are auto, {', '.join(ENGINES)}")
    found = [name for name in installed_engines() if engine in ("auto", name)]
    if not found:
        extras = " or ".join(f"pip install 'sam2jq[{name}]'" for name in ENGINES if engine in ("auto", name))
        raise UserError(f"ONNX files need {'an engine' if engine == 'auto' else engine}, which is missing: {extras}")
    return found[0]


def open_graph(path: Path, engine: str, dtype: str = "auto", cache: str | None = None) -> Run:
    """The function of an ONNX file in an engine of ENGINES.

    dtype: of the computation, float32, bfloat16 (OpenVINO only), or auto, which is float32. cache: a folder for what
    OpenVINO compiled.
    Raises UserError for another dtype, or if the engine cannot read the file.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    log.info("%-11s %s", engine, path)
    try:
        return ENGINES[engine](path, dtype, cache)
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {engine} cannot load it: {reason[:300]}") from error

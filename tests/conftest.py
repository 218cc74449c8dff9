import gc
import os
import resource
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from converters.checkpoint import save_checkpoint
from converters.exports.vanilla import build_original
from converters.names import from_torch
from sam2jq import SAM2, abstract_params, build, init_params
from sam2jq.data import draw_scene

CACHE_DIR = "JAX_COMPILATION_CACHE_DIR"
XLA_DEFAULTS = os.environ.get("SAM2JQ_XLA_DEFAULTS") == "1"  # compile as users do: `make test-default-xla`
LONGEST = (
    "test_distill_end_to_end",
    "test_trainer",
    "test_pipeline",
    "test_parity",
    "test_api",
    "test_demo_model",
    "predictors/test_video",
    "predictors/test_image",
    "exports/test_onnx",
    "test_distributed",
)
SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure(config):
    """Makes compiling fast, and shares one cache of compiled programs between all test processes.

    The cache also serves a process after `clear_compiled_programs`. With SAM2JQ_XLA_DEFAULTS=1 in the environment
    XLA compiles with its default flags, as it does for users.
    """
    if not hasattr(config, "workerinput"):  # the main process, whose environment the workers inherit
        if CACHE_DIR not in os.environ:  # a folder that the caller names keeps the programs for the next run
            folder = tempfile.TemporaryDirectory(prefix="compiled")
            config.add_cleanup(folder.cleanup)
            os.environ[CACHE_DIR] = folder.name
        if not XLA_DEFAULTS:  # compiling takes most of the time here; each of these saves a third of it
            os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
            # the older code generator; and one module a program, as there is a test process for each core
            os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    gc.set_threshold(100_000)  # as the command line does: traces are large, and to search them is a tenth of the time
    if not XLA_DEFAULTS:
        jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE_DIR])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Runs the slowest files first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: not item.path.with_suffix("").as_posix().endswith(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """Frees the compiled programs after a file if the process holds more than 2.5 GB: most files would fill 7 GB."""
    yield
    if resident_bytes() > 2.5e9:
        jax.clear_caches()


def resident_bytes() -> float:
    """The memory that this process holds now; infinite where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else float("inf")


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name} folder beside the repository")
    return SHARED


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The flags of a `quantize` run: a random checkpoint, a folder of two images, an output and a cache folder."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "nano.pt", init_params(build("nano"), 0))
    (folder / "images").mkdir()
    for i in range(2):
        Image.fromarray(draw_scene(i, 200).image[: 150 + 50 * i]).save(folder / "images" / f"{i}.png")
    return [
        *("--model.name", "nano", "--model.checkpoint", str(folder / "nano.pt")),
        *("--quant.calib.path", str(folder / "images"), "--quant.calib.num-samples", "2"),
        *("--quant.wgts.dtype", "sint4"),
        *("--output.root", str(folder / "out"), "--cache.root", str(folder / "cache")),
    ]


class Twin(NamedTuple):
    """One set of random weights in both frameworks: `torch` and `model` with `params` are the same network."""

    torch: torch.nn.Module
    model: SAM2
    params: dict

    def apply(self, method: str, *args, **settings):
        run = jax.jit(lambda params, *args: self.model.apply({"params": params}, *args, method=method, **settings))
        return run(self.params, *args)


@cache
def twin(name: str, version: str = "2.1", image_size: int | None = None) -> Twin:
    """A `Twin` of a model size with noise added to every weight, and the bias of the object score raised by 10.

    Some weights are initialized to zero and would be compared with nothing. A negative object score turns every mask
    into the constant -1024.
    """
    torch.manual_seed(0)
    original = build_original(name, version, image_size)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        original.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.add_(10)
    model = build(name, version, image_size)
    return Twin(original, model, from_torch(original.state_dict(), abstract_params(model)))


def relative(got, expected) -> float:
    """|got - expected| / |expected|. Fails if `expected` is constant: such a comparison would show nothing."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert expected.std() > 0
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


@contextmanager
def file_limit(size: int):
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters.checkpoint import save_checkpoint
from sam2jq import build, init_params
from sam2jq.cli.main import main

ROOT = Path(__file__).parents[2]


def failure(capsys, *arguments: str) -> str:
    """The one line that a command prints which fails by an error of the user."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("sam2jq: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Path:
    """The folder of one finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("job")
    save_checkpoint(folder / "nano.pt", init_params(build("nano"), 0))
    model = ["--model.name", "nano", "--model.checkpoint", str(folder / "nano.pt")]
    images = ["--quant.calib.path", "scenes:7", "--quant.calib.num-samples", "2", "--quant.wgts.dtype", "sint4"]
    where = ["--output.root", str(folder / "out"), "--output.job", "w4", "--cache.root", str(folder / "cache")]
    assert main(["quantize", *model, *images, *where]) == 0
    return folder / "out" / "w4"


def run(*arguments: str, **settings) -> subprocess.CompletedProcess:
    """What a command in a process of its own returns and prints; settings: of `subprocess.run`."""
    command = [sys.executable, "-m", "sam2jq", *arguments]
    return subprocess.run(command, text=True, cwd=ROOT, check=False, stderr=subprocess.PIPE,
                          **{"stdout": subprocess.PIPE} | settings)  # fmt: skip


@pytest.fixture
def closed_pipe():
    """The end of a pipe to write to that nobody reads, as behind `| head` when it has enough."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)

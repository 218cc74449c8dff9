from pathlib import Path

import pytest

from converters.checkpoint import save_checkpoint
from sam2jq import build, init_params
from sam2jq.cli.main import main


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

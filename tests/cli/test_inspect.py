"""`sam2jq inspect`."""

from sam2jq.cli.failures import CLOSED_PIPE
from sam2jq.cli.main import main

from .conftest import failure, run


def test_inspect_prints_every_layer_and_the_totals(job, capsys):
    assert main(["inspect", str(job)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sam_mask_decoder.output_upscaling.3", "obj_ptr_proj.layers.2"))
    assert "mask IoU" in printed
    assert main(["inspect", str(job / "package.pt")]) == 0


def test_a_file_that_is_no_package_is_named(tmp_path, capsys):
    assert "no package at" in failure(capsys, "inspect", str(tmp_path))


def test_a_closed_pipe_ends_a_command_quietly(job, closed_pipe):
    done = run("inspect", str(job), stdout=closed_pipe)
    assert (done.stderr, done.returncode) == ("", CLOSED_PIPE)

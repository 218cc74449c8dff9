"""The folder of a run, whatever ends it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sam2jq.cli.run_folder import job_folder
from sam2jq.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from sam2jq.cli.run_folder import job_folder
with job_folder(Path(sys.argv[1]), "seed: 1") as folder:
    (folder / "work").touch()
    print("ready", flush=True)
    sys.stdin.read()
"""


def fails(final: Path, settings: str = "seed: 1", *made: str, resumable: bool = False, error=ValueError):
    """A run that ends with an `error` after it has made some folders."""
    with job_folder(final, settings, resumable) as folder:
        for name in made:
            (folder / name).mkdir(parents=True)
        raise error("on the way")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def other(tmp_path):
    """A process that writes the job tmp_path/job until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "job")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_second_run_of_a_job_is_refused_and_touches_nothing(other, tmp_path):
    who = rf"process {other.pid} on host {socket.gethostname()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(UserError, match=rf"job is being written by {who}: wait for it, or give --output.job"):
        fails(tmp_path / "job")
    assert names(tmp_path) == {".job.partial", ".job.lock"}
    assert names(tmp_path / ".job.partial") == {"work", "config.yaml", "run.log"}
    with job_folder(tmp_path / "another", ""):
        pass
    other.communicate()
    assert other.returncode == 0
    assert names(tmp_path) == {"job", "another"}
    assert names(tmp_path / "job") == {"work", "config.yaml", "run.log"}


def test_a_killed_process_holds_no_lock(other, tmp_path):
    other.kill()
    other.wait()
    assert names(tmp_path) == {".job.partial", ".job.lock"}
    with job_folder(tmp_path / "job", "seed: 2") as folder:
        assert not (folder / "work").exists()
    assert names(tmp_path) == {"job"}


def test_the_lock_names_its_owner_and_one_process_cannot_take_it_twice(tmp_path):
    with job_folder(tmp_path / "job", ""):
        owner = json.loads((tmp_path / ".job.lock").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        (tmp_path / ".job.lock").write_text("")  # as it is before the owner has written its name
        with pytest.raises(UserError, match="job is being written by another process"):
            fails(tmp_path / "job")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_keeps_its_log_with_the_error_and_its_settings(tmp_path, error):
    with pytest.raises(error):
        fails(tmp_path / "job", "seed: 1", "work", error=error)
    assert names(tmp_path) == {"job.failed"}
    assert names(tmp_path / "job.failed") == {"config.yaml", "run.log"}
    assert (tmp_path / "job.failed/config.yaml").read_text() == "seed: 1"
    log = (tmp_path / "job.failed/run.log").read_text()
    assert f"error: {error.__name__}: on the way" in log
    assert "Traceback" in log


def test_the_next_run_of_a_job_replaces_the_failed_one(tmp_path):
    for settings in ("seed: 1", "seed: 2"):
        with pytest.raises(ValueError, match="on the way"):
            fails(tmp_path / "job", settings)
    assert (tmp_path / "job.failed/config.yaml").read_text() == "seed: 2"
    assert (tmp_path / "job.failed/run.log").read_text().count("Traceback") == 1
    with job_folder(tmp_path / "job", "seed: 3"):
        assert names(tmp_path) == {".job.partial", ".job.lock"}
    assert names(tmp_path) == {"job"}


def test_a_folder_that_no_failed_run_left_is_not_deleted(tmp_path):
    (tmp_path / "job.failed").mkdir()
    (tmp_path / "job.failed/package.pt").touch()
    with pytest.raises(FileExistsError, match="job.failed is in the way"):
        fails(tmp_path / "job")
    assert (tmp_path / "job.failed/package.pt").exists()


def test_only_a_job_with_checkpoints_can_be_resumed_after_its_error(tmp_path):
    """And only then are other settings refused."""
    job = tmp_path / "job"
    for settings in ("one", "other"):
        with pytest.raises(ValueError, match="on the way"):
            fails(job, settings, resumable=True)
        assert names(tmp_path) == {"job.failed"}
    with pytest.raises(ValueError, match="on the way"):
        fails(job, "one", "checkpoints/3", resumable=True)
    with pytest.raises(FileExistsError, match="holds an unfinished job with other settings"):
        fails(job, "other", resumable=True)
    with pytest.raises(ValueError, match="on the way"):
        fails(job, "one", resumable=True)
    assert names(tmp_path) == {".job.partial"}
    assert (tmp_path / ".job.partial/checkpoints/3").is_dir()
    assert (tmp_path / ".job.partial/run.log").read_text().count("Traceback") == 2
    with job_folder(job, "one", resumable=True):
        pass
    assert (job / "checkpoints/3").is_dir()

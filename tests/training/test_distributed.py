import os
import subprocess
import sys
import time

import pytest

from tests.processes import free_port

PROGRAM = """
import sys
from sam2jq.config.run import DistributedConfig
from sam2jq.training.distributed import fails_together, initialize_distributed, wait_for_processes
port, index, failing = map(int, sys.argv[1:])
initialize_distributed(DistributedConfig(f"127.0.0.1:{port}", 2, index, timeout=60))
with fails_together():
    wait_for_processes("start")
    if index == failing:
        raise FileNotFoundError("nowhere: no such folder")
    wait_for_processes("folder")
print("ended well")
"""


def start(failing):
    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, "-c", PROGRAM, str(port)]
    return [subprocess.Popen([*command, str(index), str(failing)], **pipes) for index in (0, 1)]


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_process_fails_during_set_up_the_others_end_too_and_name_the_cause(failing):
    begin, processes = time.monotonic(), start(failing)
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "FileNotFoundError: nowhere: no such folder" in errors[failing]
    expected = f"sam2jq: error: distributed: process {failing} failed: nowhere: no such folder"
    assert expected in errors[1 - failing].splitlines()
    assert processes[1 - failing].returncode == 2
    assert time.monotonic() - begin < 60


def test_processes_that_end_well_end_together():
    for process in start(failing=-1):
        assert "ended well" in process.communicate(timeout=90)[0]
        assert process.returncode == 0

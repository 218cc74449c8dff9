"""The cache of compiled programs."""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from sam2jq.cli.compiled import FOLDER, delete_oldest, use_compilation_cache
from sam2jq.config.run import CacheConfig

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.config.run import CacheConfig

use_compilation_cache(CacheConfig(sys.argv[1]))
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
assert jax.jit(lambda x: x @ x + 3)(jnp.ones((7, 7)))[0, 0] == 10
print(events.count("cache_hits"), events.count("cache_misses"))
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch):
    """Without the folder that the tests share; jax's settings and the handler of warnings are put back."""
    monkeypatch.delenv(FOLDER)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def hits_and_misses(root: Path) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, root], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_two_processes_may_share_a_folder_and_a_copy_serves_every_program(tmp_path):
    command = [sys.executable, "-c", PROGRAM, tmp_path / "a"]
    together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [sum(map(int, process.communicate()[0].split())) for process in together]
    assert [process.returncode for process in together] == [0, 0]
    assert counts[0] == counts[1] > 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert hits_and_misses(tmp_path / "b") == (counts[0], 0)


def test_a_program_that_another_process_deletes_is_passed_over(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}-cache").write_bytes(bytes(100))
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # is listed, and cannot be asked for its size
    delete_oldest(tmp_path, 150)
    assert len(list(tmp_path.glob("*-cache"))) == 1


def test_damaged_programs_are_compiled_again_with_one_warning(tmp_path):
    hits_and_misses(tmp_path)
    for path in (tmp_path / "compiled").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count("compiled programs are not all kept") == 1


def test_without_a_folder_that_can_be_written_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "sam2jq"):
        use_compilation_cache(CacheConfig(str(tmp_path / "file")))
    assert len(caplog.records) == 1
    assert "compiled programs are not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


def test_the_programs_not_used_for_longest_are_deleted_first(tmp_path):
    for i in range(5):
        path = tmp_path / f"{i}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - i, 1000 - i))
    delete_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-cache", "1-cache"]


def test_jax_s_own_variable_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "shared"))
    use_compilation_cache(CacheConfig(str(tmp_path / "root")))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")
    assert not (tmp_path / "root").exists()

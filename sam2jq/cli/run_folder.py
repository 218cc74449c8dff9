"""The folder of a run: locked while it is written, named `.partial` until it is complete, `.failed` after an error."""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from sam2jq.cli.failures import raising
from sam2jq.config.run import OutputConfig
from sam2jq.errors import UserError

KEPT_AFTER_FAILURE = ("config.yaml", "run.log")
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems without flock
log = logging.getLogger("sam2jq")


@contextmanager
def stage(name: str, what: str, record: list | None = None) -> Iterator[list[str]]:
    """Logs one aligned line with the seconds that the block took, and appends them to `record`.

    Yields a list for notes, which the line ends with.
    """
    begin, notes = time.perf_counter(), []
    yield notes
    seconds, what = time.perf_counter() - begin, ", ".join([what, *notes])
    log.info("%-11s %-60s %6.1f s", name, what, seconds)
    if record is not None:
        record.append({"name": name, "what": what, "seconds": seconds})


def job_path(output: OutputConfig, config_file: str | None, default: str) -> Path:
    """<output.root>/<job>; the job is named `output.job`, or after the config file, or `default`."""
    return Path(output.root) / (output.job or (Path(config_file).stem if config_file else default))


@contextmanager
def job_folder(final: Path, settings: str, resumable: bool = False) -> Iterator[Path]:
    """A folder beside `final` that holds config.yaml and run.log, and is renamed to `final` when the block ends.

    settings: the text of config.yaml. When the block raises, config.yaml and run.log, which ends with the error, move
    to `<final>.failed`, and everything else is deleted. The next run of the job deletes that folder.
    resumable: a folder with files in checkpoints/ is kept as it is, whatever ends the block, and the next run with the
    same settings continues in it. What a killed run left without checkpoints is deleted.

    Raises FileExistsError if `final` exists or an unfinished job has other settings, and UserError if another process
    is writing this job.
    """
    partial = final.with_name(f".{final.name}.partial")
    with locked(final):
        if final.exists():
            raise FileExistsError(f"{final} already holds a finished job: remove it, or give --output.job another name")
        remove_failed(final)
        open_partial(partial, final, settings, resumable)
        try:
            with logged_to(partial / "run.log"):
                yield partial
            os.replace(partial, final)
        except BaseException:
            if not has_checkpoints(partial, resumable):
                mark_failed(partial, final)
            raise


def has_checkpoints(partial: Path, resumable: bool) -> bool:
    return resumable and any((partial / "checkpoints").glob("*"))


def open_partial(partial: Path, final: Path, settings: str, resumable: bool) -> None:
    """Makes the folder `partial` with config.yaml, or leaves it as it is if the job can be resumed from it."""
    if has_checkpoints(partial, resumable):
        if (partial / "config.yaml").read_text() != settings:
            raise FileExistsError(
                f"{partial} holds an unfinished job with other settings: go on with its config.yaml, remove it, or "
                "give --output.job another name"
            )
        log.info("resume      %s was not finished: continuing from its last checkpoint", final)
        return
    if partial.exists():
        log.info("restart     %s was not finished and holds nothing to resume from: starting over", final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.yaml").write_text(settings)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Appends log lines to `path` during the block, and the traceback of the error that ends it, if there is one."""
    handler = raising(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        message = f"error: {type(error).__name__}: {error}"
        handler.handle(logging.makeLogRecord({"msg": message, "exc_info": sys.exc_info()}))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def failed_path(final: Path) -> Path:
    return final.with_name(f"{final.name}.failed")


def remove_failed(final: Path) -> None:
    """Deletes what an earlier failed run of the job left. Raises FileExistsError if the folder holds other files."""
    failed = failed_path(final)
    if not failed.exists():
        return
    if not failed.is_dir() or {path.name for path in failed.iterdir()} - set(KEPT_AFTER_FAILURE):
        raise FileExistsError(f"{failed} is in the way, and is not what a failed run leaves: rename or remove it")
    shutil.rmtree(failed)


def mark_failed(partial: Path, final: Path) -> None:
    """Moves run.log and config.yaml to `<final>.failed` and deletes the rest of `partial`."""
    failed = failed_path(final)
    failed.mkdir(exist_ok=True)
    for name in KEPT_AFTER_FAILURE:
        if (partial / name).exists():
            os.replace(partial / name, failed / name)
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Holds `.<name>.lock` beside `final` during the block. The kernel frees the lock when the process dies.

    Raises UserError, which names the process, its host and its start, if another process holds the lock.
    """
    path = final.with_name(f".{final.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with acquire(path, final) as file:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        file.truncate(0)
        file.write(json.dumps(owner))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while the lock is held: `acquire` notices that the file is gone


def acquire(path: Path, final: Path) -> IO[str]:
    """The open file `path` with an exclusive lock on it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                raise UserError(f"{final} is being written by {owner_in(file)}: wait for it, or give --output.job "
                                "another name") from error  # fmt: skip
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            log.warning("warning     this file system has no locks: do not run %s twice at a time", final)
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its last owner deleted it between open and flock


def owner_in(file: IO[str]) -> str:
    """The owner of a lock in words: "process 12 on host a since 2026-01-31 12:00:00"."""
    file.seek(0)
    try:
        return "process {pid} on host {host} since {since}".format(**json.loads(file.read()))
    except (ValueError, KeyError):  # the owner has not written its name yet
        return "another process"

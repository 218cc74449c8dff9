"""Paths as users write them, atomic writing of files, and names of cache files."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sam2jq.errors import UserError


class WriteError(OSError):
    """A file that cannot be written; the message names it."""


@contextmanager
def atomic_write(path: str | Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yields a temporary path in the same folder, renamed to `path` at the end, or removed if the block raises.

    failures: what the block's writer raises, beside OSError, if it cannot write.
    Raises WriteError that names `path` if the disk is full, or the file cannot be written for another reason, and
    UserError before the block runs as `check_target` does.
    """
    path = check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_errors(path, temporary):
            yield temporary
            os.replace(temporary, path)
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WriteError(f"cannot write {path}; is the disk full? ({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it at the end, or removed if the block raises.

    Raises UserError before the block runs if there is something at `path`, unless it is an empty folder.
    """
    path = check_folder_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        with write_errors(path, temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors(path: Path, temporary: Path) -> Iterator[None]:
    """A block that writes `temporary`. Its OSErrors become WriteErrors of `path`, except those of other files."""
    try:
        yield
    except OSError as error:
        other = error.filename is not None and not str(error.filename).startswith(str(temporary))
        if other or isinstance(error, WriteError):
            raise
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


class ScratchFile:
    """A file in the folder of temporary files, made when it is first written, and deleted with this object.

    what: its content, for errors.
    """

    def __init__(self, what: str):
        self._what = what
        self._file: Any = None

    def write(self, place: int, content: bytes) -> None:
        """Writes `content` at byte `place`. Raises WriteError if the disk is full."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="sam2jq", buffering=0)  # noqa: SIM115
            self._file.seek(place)
            while content:  # before a full disk is an error, a part is written
                content = content[self._file.write(content) :]
        except OSError as error:
            raise WriteError(
                f"cannot write {self._what} to {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to "
                "another folder"
            ) from error

    def read(self, place: int, size: int) -> bytes:
        """The `size` bytes that were written at `place`."""
        self._file.seek(place)
        return self._file.read(size)


def check_folder_target(path: str | Path) -> Path:
    """`path`. Raises UserError if no new folder can be made there: it holds files, is a file, or lies below one."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"cannot write to {str(path)!r}: the folder holds files; give another name")
    if path.is_file():
        raise UserError(f"cannot write to {str(path)!r}: it is a file; give the name of a new folder")
    return path if path.is_dir() else check_target(path)


def check_target(path: str | Path, *inputs: str | Path | None) -> Path:
    """`path`. Raises UserError if no file can be written there: it is a folder or a device, or lies below a file.

    inputs: files and folders that are read, of which none may be replaced, or get another file.
    """
    path = Path(path)
    for source in inputs:
        if source and Path(source).resolve() in (path.resolve(), path.resolve().parent):
            raise UserError(f"cannot write {str(path)!r}: {source} is read; give another name")
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"cannot write {str(path)!r}: it is not the name of a file")
    check_folder(path.parent)
    return path


def check_folder(path: str | Path) -> Path:
    """`path`. Raises UserError if no folder can be there: it is a file, or lies below one."""
    path = Path(path)
    found = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not found.is_dir():
        raise UserError(f"cannot write into {str(path)!r}: {found} is not a folder")
    return path


@cache
def code_fingerprint(*patterns: str) -> str:
    """A hash of the version of jax and of the files of this package that match `patterns`, such as "models/*.py".

    It is a part of the names of cache files, so that these are never read by other code than wrote them.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256(version("jax").encode())
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def home(path: str) -> str:
    """`path` with a user's folder in place of a leading ~ or ~user, also in a flag such as --out=~/masks.png.

    A name without a slash that begins with ~ and is no user's, such as ~$plan.png, stays as it is.
    Raises UserError that names a path whose first part is no user's folder.
    """
    flag, equals, value = path.partition("=")
    if path.startswith("--") and equals:
        return f"{flag}={home(value)}"
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and "/" in path:
        raise UserError(
            f"{path}: {path.partition('/')[0]} is no user's folder; write ./{path} for a folder of this name"
        )
    return expanded

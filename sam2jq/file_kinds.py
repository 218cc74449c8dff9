"""What a file is by its first bytes, where that is not what its name says."""

from pathlib import Path

from sam2jq.errors import UserError

HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def check_kind(path: str | Path, kind: str) -> None:
    """Raises UserError, which says what the file is, if it is known not to be of `kind`: "torch" or "safetensors"."""
    with open(path, "rb") as file:
        begin = file.read(512)
    if begin.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull, or download the file")
    if begin.lstrip().lower().startswith(HTML):
        raise UserError(f"{path} is a page of HTML, not a checkpoint: download the file itself, which may need a login")
    if kind == "torch" and is_safetensors(begin):
        raise UserError(f"{path} is a safetensors file: rename it to end in .safetensors")
    if kind == "safetensors" and not is_safetensors(begin) and begin.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise UserError(f"{path} is a torch file: rename it to end in .pt")


def is_safetensors(begin: bytes) -> bool:
    """Whether the first bytes of a file are those of a safetensors file: the header's length, and JSON."""
    return begin[8:10] in (b'{"', b"{}") and int.from_bytes(begin[:8], "little") < 100_000_000

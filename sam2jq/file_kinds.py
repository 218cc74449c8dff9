"""What a file is by its first bytes or its ending, where that is no checkpoint."""

from pathlib import Path

from sam2jq.errors import UserError

WAY_OUT = "give the .pt or .safetensors file that it was made from"
TORCH = (b"PK\x03\x04", b"\x80\x02")  # the first bytes of a zip archive, and of a pickle
HTML = (b"<!doctype html", b"<html", b"<head")
# what files of other programs are, by their first bytes and by their endings
BEGINNINGS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy array",
    b"\x1f\x8b": "a file compressed by gzip",
    b"ftrt": "a TensorRT engine",
    b"<?xml": "an XML file, as servers send for errors",
}
ENDINGS = {
    ".gguf": "a GGUF file",
    ".onnx": "an ONNX model",
    ".mlmodel": "a Core ML model",
    ".mlpackage": "a Core ML model",
    ".mlmodelc": "a Core ML model",
    ".tflite": "a TensorFlow Lite model",
    ".pb": "a TensorFlow model",
    ".engine": "a TensorRT engine",
}


def check_kind(path: str | Path, kind: str) -> None:
    """Raises UserError, which says what the file is, if it is known not to be of `kind`: "torch" or "safetensors"."""
    with open(path, "rb") as file:
        begin = file.read(512)
    if not begin:
        raise UserError(f"{path} is not a readable {kind} file: it is empty; fetch or copy it again")
    if begin.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull, or download the file")
    if begin.lstrip().lower().startswith(HTML):
        raise UserError(f"{path} is a page of HTML, not a checkpoint: download the file itself, which may need a login")
    if what := foreign_kind(path, begin):
        raise UserError(f"{path} is {what}, not a checkpoint: {WAY_OUT}")
    if kind == "torch" and is_safetensors(begin):
        raise UserError(f"{path} is a safetensors file: rename it to end in .safetensors")
    if kind == "safetensors" and not is_safetensors(begin) and begin.startswith(TORCH):
        raise UserError(f"{path} is a torch file: rename it to end in .pt")


def foreign_kind(path: str | Path, begin: bytes = b"") -> str | None:
    """What a file or a folder of another program is, by its first bytes or its ending; None if that is not known."""
    if begin[4:8] == b"TFL3":
        return ENDINGS[".tflite"]
    found = next((what for known, what in BEGINNINGS.items() if begin.startswith(known)), None)
    return found or (None if begin.startswith(TORCH) else ENDINGS.get(Path(path).suffix.lower()))


def is_safetensors(begin: bytes) -> bool:
    """Whether the first bytes of a file are those of a safetensors file: the header's length, and JSON."""
    return begin[8:10] in (b'{"', b"{}") and int.from_bytes(begin[:8], "little") < 100_000_000

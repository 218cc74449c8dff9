"""The folder that `sam2jq export --to onnx` writes, and its description."""

import hashlib
import json
from pathlib import Path

from sam2jq.errors import UserError
from sam2jq.files import home

FORMAT, FORMAT_VERSION, DESCRIPTION = "sam2jq-onnx", 1, "model.json"
AGAIN = "write the folder again with sam2jq export --to onnx"


def is_onnx_folder(path: str | Path) -> bool:
    """Whether a path is a folder with ONNX files of this project."""
    return (Path(home(str(path))) / DESCRIPTION).is_file()


def read_description(folder: str | Path) -> dict:
    """The content of DESCRIPTION. Raises UserError if there is none, or if another program wrote it."""
    path = Path(home(str(folder))) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} has no {DESCRIPTION}: give the folder that sam2jq export --to onnx wrote")
    try:
        about = json.loads(path.read_text())
        known = about["format"] == FORMAT and about["format_version"]
        about["files"], about["model"]["image_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe ONNX files of sam2jq: {AGAIN}") from error
    if known != FORMAT_VERSION:
        raise UserError(f"{path} has format {about['format']} {about['format_version']}, this sam2jq reads {FORMAT} "
                        f"{FORMAT_VERSION}: {AGAIN}")  # fmt: skip
    return about


def find_graph(folder: str | Path, about: dict, name: str) -> Path:
    """The file of a graph. Raises UserError if it is missing, or is not the one that DESCRIPTION describes."""
    path = Path(home(str(folder))) / f"{name}.onnx"
    entry = about["files"].get(path.name)
    if entry is None:
        raise UserError(f"{folder} has no {path.name}, as exports of an image-only model: it cannot track objects")
    if not path.is_file():
        raise UserError(f"{path} is missing: {AGAIN}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is not the file that {DESCRIPTION} describes, by its hash: {AGAIN}")
    return path

"""Torch files: read without running code, written atomically."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from converters.inert import inert_classes
from sam2jq.errors import UserError, few
from sam2jq.file_kinds import WAY_OUT, check_kind
from sam2jq.files import atomic_write


def save_torch(path: str | Path, content: dict) -> None:
    """Writes `content` with torch.save, atomically."""
    with atomic_write(path, failures=(RuntimeError,)) as temporary:  # torch's zip writer raises no OSError
        torch.save(content, temporary)


def check_archive(path: str | Path) -> None:
    """Raises UserError if the content of a torch file does not match its checksums, which torch.load ignores.

    Also for archives of other programs than torch.save. Files of old versions of torch, which are no zip archives, and
    those written without checksums are not checked.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
            damaged = archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    except Exception as error:  # zipfile and the decoders raise errors of many classes for damaged archives
        raise UserError(f"{path} is damaged ({error}): copy or fetch it again") from error
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} does not match its checksum; copy or fetch it again")
    if "constants.pkl" in names:
        raise UserError(f"{path} is a TorchScript program: {WAY_OUT}, or its state_dict(), saved by torch.save")
    if "data.pkl" not in names:
        raise UserError(f"{path} is a zip archive of another program than torch.save: it holds {few(sorted(names), 3)}")


def load_torch(path: str | Path) -> object:
    """The content of a torch file, on the CPU: tensors and plain containers (`weights_only=True`).

    Objects of other classes are `Inert`: what they were saved from, of which no code is run.
    Raises UserError if the file is of another kind, calls functions of Python or is damaged, also where torch does
    not notice.
    """
    check_kind(path, "torch")
    with open(path, "rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # the first bytes of a zip archive, and of a pickle
            raise UserError(f"{path} is not a readable torch file, maybe truncated: fetch or copy it again")
    check_archive(path)
    try:
        names = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with safe_globals(inert_classes(names)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error) and zipfile.is_zipfile(path):
            raise UserError(f"{path} has a pickle protocol above 2: save it again, without pickle_protocol") from error
        raise UserError(
            f"{path} holds more than tensors and could run code when loaded; it was not loaded: "
            "save it again as {'model': state_dict} from a source you trust"
        ) from error
    except Exception as error:  # torch's unpickler raises errors of many classes for damaged files
        raise UserError(f"{path} is not a readable torch file, maybe truncated: fetch or copy it again") from error

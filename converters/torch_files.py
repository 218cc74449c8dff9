"""Torch files: read without running code, written atomically."""

import pickle
from pathlib import Path

import torch

from sam2jq.errors import UserError
from sam2jq.files import atomic_write


def save_torch(path: str | Path, content: dict) -> None:
    """Writes `content` with torch.save, atomically."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_torch(path: str | Path) -> object:
    """The content of a torch file, on the CPU: tensors and plain containers only (`weights_only=True`).

    Raises UserError if the file holds anything else or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and could run code when loaded; it was not loaded: "
            "save it again as {'model': state_dict} from a source you trust"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable torch file, maybe truncated: fetch or copy it again") from error

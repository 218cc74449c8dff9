"""Json files that list images: reading them, checking the names in them, and finding the files that they name."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sam2jq.data.folders import images_below
from sam2jq.errors import UserError, few

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # {word in a name: its split}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "minival"), "val")


def read_json(path: Path):
    """The content of a json file. Raises UserError if it is not valid json, or an object in it has a key twice."""

    def as_dict(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{path}: the key {twice!r} is there twice in one object; remove one of them")
        return content

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=as_dict)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken json ({error}); download it again or move it away") from error


def check_ids(file: Path, ids: Iterable[int | str]) -> None:
    """Raises UserError if two annotations of a json file have one id: scores and messages name them by it."""
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise UserError(
            f"{file}: annotation {twice[0]} is there twice ({len(twice)} ids are); give each annotation its own id"
        )


def check_file_name(name: str, file: Path) -> str:
    """`name`, which `file` lists, as the name of a file or folder without a path.

    Raises UserError if it is empty, ".." or holds a separator: it could name something outside its folder.
    """
    if set(name) & set("/\\"):
        raise UserError(f"{file}: {name!r} must be the name of one file or folder, without a path")
    check_relative_path(name, file)
    return name


def read_names(path: Path) -> list[str]:
    """The names of files or folders in a text file, one per line, as `check_file_name` takes them."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [check_file_name(line.strip(), path) for line in lines if line.strip()]


def check_relative_path(name: str, file: Path) -> str:
    """`name`, which `file` lists, as a normalized relative path with forward slashes.

    Raises UserError if it is empty, absolute, or holds ".." or a backslash: it could lead out of its folder.
    """
    if "\\" in name:
        raise UserError(
            f"{file}: {name!r} holds a backslash; write / between folders, as in {name.replace(chr(92), '/')!r}"
        )
    path = PurePosixPath(name)
    if not name.strip() or not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{file}: {name!r} is empty or leads out of its folder; it must be a relative path without ..")
    return str(path)


def file_name(entry: dict, file: Path) -> str | None:
    """The relative path of an image in the list "images" of COCO's format; None if the entry has no name.

    It is "file_name" or, as in LVIS, the end of "coco_url", such as val2017/000000397133.jpg.
    """
    match entry:
        case {"file_name": str(name)}:
            return check_relative_path(name, file)
        case {"coco_url": str(url)}:
            return check_relative_path("/".join(url.split("/")[-2:]), file)
    return None


def coco_files(root: Path) -> list[str] | None:
    """The sorted names of the images below `root` that annotations/*.json list; None if they list none.

    Raises FileNotFoundError if none of them is there, UserError if a name fits several files.
    """
    names = {file: set(listed_names(file)) for file in sorted(root.glob("annotations/[!.]*.json"))}
    if not any(names.values()):
        return None
    index = index_images(root)
    found = {find_image(index, name, file) for file, listed in names.items() for name in listed} - {None}
    if not found:
        every = set().union(*names.values())
        raise FileNotFoundError(
            f"{root}: none of the {len(every)} images that annotations/*.json name lies below this folder; "
            f"put the images (such as {min(every)}) there"
        )
    return sorted(map(str, found))


def listed_names(path: Path) -> list[str]:
    """The name of every image in the list "images" of a json file; empty for other content, such as SA-V's."""
    match read_json(path):
        case {"images": [*entries]}:
            names = [file_name(entry, path) for entry in entries if isinstance(entry, dict)]
            return [name for name in names if name is not None]
        case _:
            return []


class ImageIndex(NamedTuple):
    """The images below `root`: {"1.jpg": paths, "train/1.jpg": paths, ...}, by every ending of their paths."""

    root: Path
    paths: dict[str, list[Path]]


def index_images(root: Path) -> ImageIndex:
    """The index of the images below `root`."""
    paths = defaultdict(list)
    for path in images_below(root, aliases=True):
        parts = path.relative_to(root).parts
        for start in range(len(parts)):
            paths["/".join(parts[start:])].append(path)
    return ImageIndex(root, dict(paths))


def find_image(index: ImageIndex, name: str, file: Path) -> Path | None:
    """The image that `file` calls `name`; None if it is missing.

    It lies anywhere below the root or, unless `file` lies in a folder annotations*, below the folder of `file`. It is
    not in a folder of another split: instances_train.json does not name val/1.jpg. Of several, the one in a folder of
    the split that the json is named after is taken. Raises UserError with the candidates if several are left.
    """
    base = index.root if file.parent.name.lower().startswith("annotations") else file.parent
    split, words = split_words(file.stem), set(file.stem.split("_"))
    folders = lambda path: path.relative_to(index.root).parts[: -len(PurePosixPath(name).parts)]
    splits = lambda path: {word for folder in folders(path) for word in split_words(folder)}
    found = [path for path in index.paths.get(name, ()) if path.is_relative_to(base)]
    found = [path for path in found if len(split) != 1 or splits(path) <= split]
    preferences = (
        lambda path: "/" in name and path == base / name,
        lambda path: path.parent == file.parent,
        lambda path: bool(words & set(folders(path))),  # such as val2017
        lambda path: bool(split & splits(path)),
    )
    for preferred in preferences:
        if len(found) > 1:
            found = [path for path in found if preferred(path)] or found
    if len(set(map(os.path.realpath, found))) > 1:
        shown = few(found)
        raise UserError(f"{file}: {name} fits {len(found)} files: {shown}; keep one, or write its folder into the json")
    return found[0] if found else None


def split_words(name: str) -> set[str]:
    """The splits in the name of a file or folder: {"val"} for instances_val2017 and for valid."""
    return {SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS}

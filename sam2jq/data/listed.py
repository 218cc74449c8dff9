"""Json files that list images: reading them, checking the names in them, and finding the files that they name."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sam2jq.data.folders import MASK_WORDS, images_below, is_image, listed
from sam2jq.errors import UserError, few

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # {word in a name: its split}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "minival", "eval", "evaluation"), "val")


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


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises UserError that names it if it is not."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error.reason} {error.start}); save it in UTF-8") from error


def read_names(path: Path) -> list[str]:
    """The names of files or folders in a text file, one per line, as `check_file_name` takes them.

    Raises UserError if a name is there twice.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if name := line.strip():
            first = lines.setdefault(check_file_name(name, path), number)
            if first != number:
                raise UserError(f"{path}: lines {first} and {number} are both {name!r}; remove one of them")
    return list(lines)


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


def image_names(entry: dict, file: Path) -> list[str]:
    """The relative paths that an image in the list "images" of COCO's format may have; [] if the entry has no name.

    It is "file_name" or, as in LVIS, the end of "coco_url", such as val2017/000000397133.jpg. LVIS 0.5 has both, of
    which "file_name" is that in COCO of 2014.
    """
    match entry:
        case {"file_name": str(name), "coco_url": str(url)} if name.startswith("COCO_") and "/" in url:
            names = [name, end_of(url)]
        case {"file_name": str(name)}:
            names = [name]
        case {"coco_url": str(url)}:
            names = [end_of(url)]
        case _:
            names = []
    return [check_relative_path(name, file) for name in names]


def end_of(url: str) -> str:
    """The last folder and the name in an url."""
    return "/".join(url.split("/")[-2:])


def annotation_files(root: Path, pattern: str = "[!.]*.json") -> list[Path]:
    """The json files in root/annotations or else, as COCO's archives unpack, annotations_trainval2017/annotations."""
    folders = ("annotations", "annotations*", "annotations*/annotations")
    found = (sorted(root.glob(f"{folder}/{pattern}")) for folder in folders)
    return next(filter(None, found), [])


def coco_root(root: Path, is_coco: Callable[[Path], bool]) -> Path:
    """`root`, or the one folder in it if `is_coco` holds for that alone: an archive was unpacked into `root`."""
    content = [] if is_coco(root) or not root.is_dir() else listed(root)
    folders = [path for path in content if path.is_dir()]
    alone = len(folders) == 1 and not any(is_image(path.name) for path in content)
    return folders[0] if alone and is_coco(folders[0]) else root


def coco_files(root: Path) -> list[str] | None:
    """The sorted names of the images below `root` that annotations/*.json list; None if they list none.

    Raises FileNotFoundError if none of them is there, UserError if a name fits several files.
    """
    root = coco_root(root, lambda folder: bool(annotation_files(folder)))
    listed = [(file, names) for file in annotation_files(root) for names in listed_names(file)]
    if not listed:
        return None
    index = index_images(root)
    found = {find_image(index, names, file) for file, names in listed} - {None}
    if not found:
        every = {names[0] for _, names in listed}
        raise FileNotFoundError(
            f"{root}: none of the {len(every)} images that annotations/*.json name lies below this folder; "
            f"put the images (such as {min(every)}) there"
        )
    return sorted(map(str, found))


def listed_names(path: Path) -> list[list[str]]:
    """The `image_names` of the list "images" of a json file; empty for other content, such as SA-V's."""
    match read_json(path):
        case {"images": [*entries]}:
            names = [image_names(entry, path) for entry in entries if isinstance(entry, dict)]
            return [each for each in names if each]
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


def find_image(index: ImageIndex, names: list[str], file: Path) -> Path | None:
    """The image that `file` calls by one of `names`, the first that is there; None if it is missing.

    It lies anywhere below the root or, unless `file` lies in a folder annotations*, below the folder of `file`. It is
    not in a folder of another split or fold: instances_train.json does not name val/1.jpg. Of several, the one in a
    folder whose name is in that of the json is taken. Raises UserError with the candidates if none or several are so.
    """
    return next((path for name in names if (path := find_named(index, name, file))), None)


def find_named(index: ImageIndex, name: str, file: Path) -> Path | None:
    """As `find_image`, for one name."""
    base = index.root if file.parent.name.lower().startswith("annotations") else file.parent
    folders = lambda path: path.relative_to(index.root).parts[: -len(PurePosixPath(name).parts)]
    words_in = lambda path, words: set().union(*map(words, folders(path)))
    candidates = found = [path for path in index.paths.get(name, ()) if path.is_relative_to(base)]
    for words in (split_words, fold_words):
        if own := words(file.stem):
            own = own | words(name)  # COCO_val2014_1.jpg is a part of train2017
            found = [path for path in found if words_in(path, words) <= own]
    if len(candidates) < 2 or not found:
        return found[0] if found else None
    json_words, splits = f" {words_of(file.stem)} ", split_words(file.stem)

    def rank(path: Path) -> tuple:
        return (
            MASK_WORDS.isdisjoint(map(str.lower, folders(path))),
            "/" in name and path == base / name,
            path.parent == file.parent,
            sum(f" {words_of(folder)} " in json_words for folder in folders(path)),  # such as val2017
            bool(splits & words_in(path, split_words)),
        )

    best = max(map(rank, found))
    if len(found) == len(candidates) or any(best[1:]):
        found = [path for path in found if rank(path) == best]
    else:  # the others are of other splits, but nothing says that these are of the json's own
        found = candidates
    if len(set(map(os.path.realpath, found))) > 1:
        raise UserError(
            f"{file}: {name} fits {len(found)} files: {few(found)}; keep one, or write its folder into the json"
        )
    return found[0]


def words_of(name: str) -> str:
    """The words and numbers in the name of a file or folder, in lower case: "instances val2017"."""
    return " ".join(re.findall("[a-z0-9]+", name.lower()))


def split_words(name: str) -> set[str]:
    """The splits in the name of a file or folder: {"val"} for instances_val2017 and for valid."""
    return {SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS}


def fold_words(name: str) -> set[str]:
    """The folds of cross-validation in the name of a file or folder: {"1"} for fold1 and instances_fold_1."""
    return set(re.findall("fold[^a-z0-9]?([0-9]+)", name.lower()))

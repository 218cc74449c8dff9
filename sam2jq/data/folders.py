"""Folders of images: which files and folders in them count, and what lies below them."""

import os
from collections.abc import Iterator
from pathlib import Path

from sam2jq.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# what file managers, archives and disks leave behind, in lower case
FOREIGN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found")
SAV_FRAMES = "JPEGImages_24fps"
SAV_SPLITS = ("sav_train", "sav_val", "sav_test")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data, such as .DS_Store, .ipynb_checkpoints and __MACOSX."""
    return name.startswith(".") or name.lower() in FOREIGN


def is_image(name: str) -> bool:
    """Whether a file name has an image's ending and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, and links to folders, sorted by name, without hidden ones.

    Raises FileNotFoundError for a link that leads nowhere.
    """
    return [Path(entry) for entry in entries(folder) if entry.is_dir()]


def listed(folder: Path) -> list[Path]:
    """The files and folders in a folder, as `entries` finds them."""
    return [Path(entry) for entry in entries(folder)]


def entries(folder: Path) -> list[os.DirEntry]:
    """The files and folders in a folder, sorted by name, without hidden ones.

    Raises FileNotFoundError for a link that leads nowhere: what it should hold would be missing without a word.
    """
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    broken = next((entry.path for entry in found if entry.is_symlink() and not os.path.exists(entry.path)), None)
    if broken:
        raise FileNotFoundError(f"{broken}: a link to {os.readlink(broken)}, which is not there; mend or remove it")
    return found


def walk(root: Path, skipped: str | None = None, *, aliases: bool = False) -> Iterator[list[Path]]:
    """Yields the files in `root` and in every folder below it, without hidden ones.

    skipped: the beginning of the lower-case names of folders that are left out. Links to folders are followed, but not
    to a folder that holds them. A folder with several names is visited by one of them, not by that of a link if it has
    another; aliases: by all of them.
    """
    folders, links, visited = [(root, frozenset[str]())], [], set()
    while folders or links:
        folder, holders = folders.pop() if folders else links.pop(0)
        identity = os.path.realpath(folder)
        if identity in (holders if aliases else visited):
            continue
        visited.add(identity)
        content = entries(folder)
        for entry in content:
            if entry.is_dir() and not (skipped and entry.name.lower().startswith(skipped)):
                (links if entry.is_symlink() else folders).append((Path(entry), holders | {identity}))
        yield [Path(entry) for entry in content if not entry.is_dir()]


def images_below(root: Path, *, aliases: bool = False) -> list[Path]:
    """All images below `root`, sorted, without hidden files and sub folders called annotations*, which hold masks.

    aliases: also the other names that images have by links to folders.
    """
    files = (path for content in walk(root, "annotations", aliases=aliases) for path in content)
    return sorted(path for path in files if is_image(path.name))


def frame_folders(root: Path) -> list[Path]:
    """The folders with the frames of an SA-V root, split or frame folder; empty for any other folder."""
    if root.resolve().name == SAV_FRAMES:
        return [root]
    candidates = [root / SAV_FRAMES, *(root / split / SAV_FRAMES for split in SAV_SPLITS)]
    return [folder for folder in candidates if folder.is_dir()]


def clip_folders(root: Path) -> list[Path]:
    """The folders of frames in `root`, sorted by name; folders without any image below them are passed over.

    Raises UserError for a folder that has images only in folders below it.
    """
    clips = []
    for folder in subfolders(root):
        if any(is_image(path.name) for path in listed(folder)):
            clips.append(folder)
        elif images := images_below(folder):
            raise UserError(f"{folder}: holds no frame, but {images[0]} lies below it; give the folder of the clips")
    return clips

"""Folders of images: which files and folders in them count, and what lies below them."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from sam2jq.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# images that are not read: a clip without those of its frames is another clip
UNREAD = (".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".ppm", ".pgm", ".tga", ".exr", ".dng")
# what file managers, archives and disks leave behind, in lower case
FOREIGN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found")
# beginnings of the names of folders that hold masks and never photographs, in lower case
SKIPPED = ("annotations", "segmentationclass", "segmentationobject")
# words of a name that says "masks" or the like, but may mean photographs, such as those of people with a mask
MASK_WORDS = {"mask", "label", "gt", "groundtruth", "gtfine", "gtcoarse", "trimap", "seg", "segmentation", "annotation"}
MASK_WORDS |= {"depth", "disparity"}
MASK_WORDS |= {f"{word}s" for word in MASK_WORDS}
MASK_NAME = re.compile(rf"(.+?)[ _.-]+(?:{'|'.join(sorted(MASK_WORDS))})[ _.-]*\d*", re.IGNORECASE)  # cat_mask_1
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


def walk(root: Path, skipped: tuple[str, ...] = (), *, aliases: bool = False) -> Iterator[list[Path]]:
    """Yields the files in `root` and in every folder below it, without hidden ones.

    skipped: beginnings of the lower-case names of folders that are left out. Links to folders are followed, but not
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
            if entry.is_dir() and not entry.name.lower().startswith(skipped):
                (links if entry.is_symlink() else folders).append((Path(entry), holders | {identity}))
        yield [Path(entry) for entry in content if not entry.is_dir()]


def images_below(root: Path, *, aliases: bool = False) -> list[Path]:
    """All images below `root`, sorted, without hidden files and sub folders with names in SKIPPED, which hold masks.

    aliases: also the other names that images have by links to folders.
    """
    files = (path for content in walk(root, SKIPPED, aliases=aliases) for path in content)
    return sorted(path for path in files if is_image(path.name))


def is_mask_name(name: str) -> bool:
    """Whether the name of a folder, or of a file without its ending, begins or ends with a word for masks."""
    words = re.findall("[a-z]+", name.lower()) or [""]
    return name.lower().startswith(SKIPPED) or not MASK_WORDS.isdisjoint((words[0], words[-1], "".join(words)))


def check_no_masks(root: Path, images: Iterable[Path]) -> None:
    """Raises UserError if some of the images below `root` seem to be masks of others: they lie in a folder such as
    masks, beside other folders, or are called as another image in their folder and _mask."""
    by_folder = defaultdict(list)
    for image in images:
        folder, name = os.path.split(image)
        by_folder[folder].append(name)
    below = {folder: Path(folder).relative_to(root) for folder in by_folder}
    masks = {folder for folder, path in below.items() if any(map(is_mask_name, path.parts))}
    if 0 < len(masks) < len(below):
        first = below[min(masks)]
        named = next(path for path in (first, *first.parents) if is_mask_name(path.name))
        other = min(below.keys() - masks)
        raise UserError(
            f"{root / named}: holds masks or the like by its name, and there are images elsewhere, such as "
            f"{below[other] / by_folder[other][0]}; give the folder of the images alone, or rename it if it holds some"
        )
    for folder, names in by_folder.items():
        stems = {os.path.splitext(name)[0] for name in names}
        for name in names:
            found = MASK_NAME.fullmatch(os.path.splitext(name)[0])
            if found and found[1] in stems:
                raise UserError(
                    f"{os.path.join(folder, name)}: by its name a mask or the like of {found[1]} in the same folder; "
                    "move masks to another folder, and give that of the images"
                )


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

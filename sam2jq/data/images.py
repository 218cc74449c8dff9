"""Image files: the images in a folder, their pixels, and the array that is SAM 2's input."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from sam2jq.data.synthetic.names import scene_seed
from sam2jq.data.synthetic.scenes import draw_scene
from sam2jq.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SAV_FRAMES = "JPEGImages_24fps"
SAV_SPLITS = ("sav_train", "sav_val", "sav_test")
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, in RGB order
STD = np.array([0.229, 0.224, 0.225], np.float32)


def is_image(name: str) -> bool:
    """Whether a file name has an image's ending and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def images_below(root: Path) -> list[Path]:
    """All images below `root`, sorted, without hidden files and sub folders called annotations*."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.lower().startswith((".", "annotations"))]
        found += [Path(folder, name) for name in files if is_image(name)]
    return sorted(found)


def frame_folders(root: Path) -> list[Path]:
    """The folders with the frames of an SA-V root, split or frame folder; empty for any other folder."""
    if root.resolve().name == SAV_FRAMES:
        return [root]
    candidates = [root / SAV_FRAMES, *(root / split / SAV_FRAMES for split in SAV_SPLITS)]
    return [folder for folder in candidates if folder.is_dir()]


def coco_names(root: Path) -> set[str]:
    """The file names that annotations/*.json list; empty if `root` is not a COCO folder."""
    return {name for path in root.glob("annotations/[!.]*.json") for name in listed_names(path)}


def listed_names(path: Path) -> list[str]:
    """Every "file_name" in the list "images" of a json file; empty for other content, such as SA-V's."""
    match read_json(path):
        case {"images": [*entries]}:
            names = [entry.get("file_name") for entry in entries if isinstance(entry, dict)]
            return [check_relative_path(name, path) for name in names if isinstance(name, str)]
        case _:
            return []


def check_file_name(name: str, file: Path) -> str:
    """`name`, which `file` lists, as the name of a file or folder without a path.

    Raises UserError if it is empty, ".." or holds a separator: it could name something outside its folder.
    """
    if "/" in check_relative_path(name, file):
        raise UserError(f"{file}: {name!r} must be the name of one file or folder, without a path")
    return name


def check_relative_path(name: str, file: Path) -> str:
    """`name`, which `file` lists, as a normalized relative path with forward slashes.

    Raises UserError if it is empty, absolute, or holds ".." or a backslash: it could lead out of its folder.
    """
    path = PurePosixPath(name)
    if not name.strip() or not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\\0"):
        raise UserError(f"{file}: {name!r} is empty or leads out of its folder; it must be a relative path without ..")
    return str(path)


def read_json(path: Path):
    """The content of a json file. Raises UserError if it is not valid json."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: broken json ({error}); download it again or move it away") from error


def images_by_ending(root: Path) -> dict[str, Path]:
    """{"1.jpg": path, "train/1.jpg": path, ...} of the images below `root`; the first in order if several match."""
    index = {}
    for path in images_below(root):
        parts = path.relative_to(root).parts
        for start in range(len(parts)):
            index.setdefault("/".join(parts[start:]), path)
    return index


def images_named(root: Path, names: set[str]) -> list[Path]:
    """The images below `root` whose path ends in one of `names`."""
    index = images_by_ending(root)
    found = {index[name] for name in names if name in index}
    if not found:
        raise FileNotFoundError(
            f"{root}: none of the {len(names)} images that annotations/*.json name lies below this folder; "
            f"put the images (such as {min(names)}) there"
        )
    return sorted(found)


def read_image(name: str) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of an image file or of the drawn scene "scenes:<seed>/<index>".

    As in SAM 2, the EXIF orientation tag is not applied. Raises UserError if the file is not readable.
    """
    if name.startswith("scenes:"):
        return draw_scene(scene_seed(name)).image
    with open_image(name) as image:
        return np.array(image.convert("RGB"))


def image_size(name: str) -> tuple[int, int]:
    """(H, W) in pixels of an image file, from its header alone."""
    with open_image(name) as image:
        return image.height, image.width


@contextmanager
def open_image(name: str) -> Iterator[Image.Image]:
    """The PIL image of a file. Raises UserError with the file's name if PIL fails inside the `with` block."""
    try:
        with Image.open(name) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error}); remove it or convert it to jpg or png") from error


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, size, 3] of a uint8 [H, W, 3] image, as SAM2Transforms computes it, channels last.

    The image is resized as floats in 0..1, not as bytes (PIL's resize of mode F equals torch's antialiased bilinear
    one), then normalized. Raises UserError for any other shape or dtype.
    """
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UserError(f"an image must be uint8 [H, W, 3], got {dtype} {list(shape)}; read_image returns one")
    channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    resized = [Image.fromarray(c).resize((size, size), Image.Resampling.BILINEAR) for c in channels]
    return normalize(np.stack([np.asarray(c) for c in resized], axis=-1))


def preprocess_frame(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, size, 3] of a frame uint8 [H, W, 3], as SAM 2 reads clips: resized as bytes, bicubic."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return normalize(np.asarray(resized, np.float32) / 255)


def normalize(image):
    """`image` [..., 3], RGB in 0..1, normalized by ImageNet's mean and standard deviation."""
    return (image - MEAN) / STD

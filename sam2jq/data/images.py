"""Images on disk: which ones a folder holds, their pixels, and the array SAM 2 is fed."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from sam2jq.data.synthetic.scenes import draw_scene, scene_seed
from sam2jq.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SAV_FRAMES = "JPEGImages_24fps"
SAV_SPLITS = ("sav_train", "sav_val", "sav_test")
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, in RGB order
STD = np.array([0.229, 0.224, 0.225], np.float32)


def find_images(spec: str, num_samples: int | None, seed: int) -> list[str]:
    """The sorted names of `num_samples` images under `spec`, drawn by `seed` without repeats; all if None or too few.

    `spec` is an image file, `scenes:<seed>` (drawn scenes, no files), or a folder of one of these layouts:
      SA-V    {sav_train,sav_val,sav_test}/JPEGImages_24fps/<video>/<frame>.jpg, one split, or JPEGImages_24fps:
              the frames only;
      COCO    annotations/*.json with "images": [{"file_name"}]: the images named there, wherever below they lie;
      plain   all images below. SA-1B is such a folder: sa_*.jpg, beside sa_*.json that are not images.
    Hidden files and folders, links to folders, and sub folders called annotations* (they hold masks) are left out.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"{spec}: num_samples must be at least 1, got {num_samples}; leave it out to take every image")
    if spec.startswith("scenes:"):
        return scene_names(spec, num_samples)
    names = sorted(map(str, list_images(spec)))
    if num_samples is None or num_samples >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, num_samples))


def scene_names(spec: str, num_samples: int | None) -> list[str]:
    """["scenes:7/0000", "scenes:7/0001", ...] for "scenes:7"."""
    seed = spec.removeprefix("scenes:")
    if not seed.isdecimal():
        raise UserError(f"{spec}: the seed must be a whole number that is not negative; write it like scenes:7")
    if num_samples is None:
        raise UserError(f"{spec}: drawn scenes have no end; give num_samples")
    return [f"scenes:{int(seed)}/{index:04d}" for index in range(num_samples)]


def list_images(spec: str) -> list[Path]:
    """The image paths that a file or folder stands for, never none."""
    root = Path(spec)
    if not spec or not root.exists():
        raise FileNotFoundError(f"{spec or 'empty path'}: no such file or folder; give a folder of images or scenes:7")
    if root.is_file() and not is_image(root.name):
        raise UserError(f"{spec}: not an image file; allowed: a folder or a file that ends in {' '.join(SUFFIXES)}")
    if root.is_file():
        return [root]
    if folders := frame_folders(root):
        found = [image for folder in folders for image in images_below(folder)]
    elif listed := coco_names(root):
        return images_named(root, listed)
    else:
        found = images_below(root)
    if not found:
        where = " or ".join(map(str, folders)) or spec
        raise FileNotFoundError(f"{where}: holds no image; looked for {' '.join(SUFFIXES)} in it and all folders below")
    return found


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def images_below(root: Path) -> list[Path]:
    """Every image below `root` in sorted order, but for hidden ones and those in sub folders called annotations*."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.lower().startswith((".", "annotations"))]
        found += [Path(folder, name) for name in files if is_image(name)]
    return sorted(found)


def frame_folders(root: Path) -> list[Path]:
    """The folders with the frames of an SA-V root, split or frame folder; none if `root` is none of these."""
    if root.resolve().name == SAV_FRAMES:
        return [root]
    candidates = [root / SAV_FRAMES, *(root / split / SAV_FRAMES for split in SAV_SPLITS)]
    return [folder for folder in candidates if folder.is_dir()]


def coco_names(root: Path) -> set[str]:
    """The file names that annotations/*.json list; none if `root` is no COCO folder."""
    return {name for path in root.glob("annotations/[!.]*.json") for name in listed_names(path)}


def listed_names(path: Path) -> list[str]:
    """Every "file_name" in the list "images" of a json file; none where it is about something else, as SA-V's are."""
    match read_json(path):
        case {"images": [*entries]}:
            names = [entry.get("file_name") for entry in entries if isinstance(entry, dict)]
            return [str(PurePosixPath(name)) for name in names if isinstance(name, str)]
        case _:
            return []


def read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: broken json ({error}); download it again or move it away") from error


def images_by_ending(root: Path) -> dict[str, Path]:
    """{"1.jpg": path, "train/1.jpg": path, ...} of the images below `root`; the first in order where several fit."""
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
    """uint8 [H, W, 3] RGB pixels of an image file, or of the drawn scene "scenes:<seed>/<index>".

    As in SAM 2, an EXIF orientation tag is not applied: the pixels come as they are stored.
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
    """The PIL image of a file; what PIL cannot read inside the `with` is an error that names the file."""
    try:
        with Image.open(name) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error}); remove it or convert it to jpg or png") from error


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, size, 3] of a uint8 [H, W, 3] image: what SAM2Transforms makes of it, channels last.

    Resized on floats in [0, 1], not on bytes (PIL's resize of mode F is torch's antialiased bilinear one), then
    normalised by ImageNet's mean and standard deviation.
    """
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UserError(f"an image must be uint8 [H, W, 3], got {dtype} {list(shape)}; read_image returns one")
    channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    resized = [Image.fromarray(c).resize((size, size), Image.Resampling.BILINEAR) for c in channels]
    return normalize(np.stack([np.asarray(c) for c in resized], axis=-1))


def preprocess_frame(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, size, 3] of a frame uint8 [H, W, 3] as SAM 2 reads clips: resized on bytes, bicubically."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return normalize(np.asarray(resized, np.float32) / 255)


def normalize(image):
    """`image` [..., 3], RGB in 0..1, less ImageNet's mean and over its deviation."""
    return (image - MEAN) / STD

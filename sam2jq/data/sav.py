"""Video object segmentation data in the SA-V layout: annotated clips, their objects, and their masks.

ROOT/<split>/JPEGImages_24fps/<video>/00000.jpg, 00001.jpg, ...
ROOT/<split>/Annotations_6fps/<video>/<object>/00000.png, 00004.png, ...   one object each, may overlap
ROOT/<split>/<split>.txt or ROOT/<split>.txt                               the videos, one per line; optional
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.folders import SAV_FRAMES, clip_folders, is_image, listed, subfolders
from sam2jq.data.images import open_image
from sam2jq.data.listed import check_file_name, read_names
from sam2jq.data.masks import has_soft_edges, read_labels, write_labels
from sam2jq.data.video import find_frames
from sam2jq.errors import UserError, few

SAV_MASKS = "Annotations_6fps"
PARTS = (SAV_FRAMES, SAV_MASKS)


class VosVideo(NamedTuple):
    """frames: folder of the clip; objects: {object: {index into find_frames(frames): mask file}}, both sorted."""

    name: str
    frames: str
    objects: dict[str, dict[int, str]]


def vos_videos(root: str, split: str) -> list[VosVideo]:
    """The videos of a split with their masks, in the order of its list, or by name if there is no list.

    Raises FileNotFoundError if a folder is missing.
    """
    folder = split_folder(Path(root), split)
    names = listed_videos(folder)
    missing = [f"{part}/{name}" for name in names for part in PARTS if not (folder / part / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: has no folder {', '.join(missing)}; put it there or remove it from the list"
        )
    return [vos_video(name, folder / SAV_FRAMES / name, folder / SAV_MASKS / name) for name in names]


def split_folder(root: Path, split: str) -> Path:
    """root/split. Raises FileNotFoundError unless it holds the folders of frames and of masks."""
    if not root.is_dir():
        missing = f"{root}: {'a file, not a folder' if root.exists() else 'no such folder'}"
        raise FileNotFoundError(
            f"{missing}; give the SA-V folder that holds {split}, or one of DAVIS, MOSE or YouTube-VOS"
        )
    missing = [part for part in PARTS if not (root / split / part).is_dir()]
    if missing:
        complete = [path.name for path in subfolders(root) if all((path / part).is_dir() for part in PARTS)]
        raise FileNotFoundError(
            f"{root / split}: has no folder {' and no '.join(missing)}; "
            f"splits that have both: {', '.join(complete) or 'none'}"
        )
    return root / split


def listed_videos(folder: Path) -> list[str]:
    """The videos in <split>/<split>.txt, else in <split>.txt beside the split's folder, else all with frames or masks.

    Raises UserError if there is none, or if a line is not the name of a folder.
    """
    name = f"{folder.name}.txt"
    path = next(filter(Path.is_file, [folder / name, folder.parent / name]), folder / SAV_FRAMES)
    if path.is_file():
        names = read_names(path)
    else:
        masks = [masks for masks in subfolders(folder / SAV_MASKS) if subfolders(masks)]
        names = sorted({check_file_name(clip.name, path) for clip in [*clip_folders(path), *masks]})
    if not names:
        raise UserError(f"{path}: names no video; {SAV_FRAMES} needs a folder of frames for each")
    return names


def vos_video(name: str, frames: Path, masks: Path) -> VosVideo:
    """A video and its mask files. Raises FileNotFoundError if it has no object."""
    index = {Path(frame).stem: index for index, frame in enumerate(find_frames(str(frames)))}
    objects = [folder.name for folder in subfolders(masks)]
    if not objects:
        raise FileNotFoundError(f"{masks}: holds no object; each needs a folder of its own, such as 000/00000.png")
    return VosVideo(name, str(frames), {object: find_masks(masks / object, index) for object in objects})


def find_masks(folder: Path, index: dict[str, int]) -> dict[int, str]:
    """{frame index: mask file} of one object; index: {file name without ending: frame index}.

    Raises UserError for an image that is no png, or belongs to no frame or to that of another file.
    """
    files = [path for path in listed(folder) if is_image(path.name)]
    if others := [path.name for path in files if path.suffix.lower() != ".png"]:
        raise UserError(f"{folder}: holds {few(others, 3)}; masks must be png files: convert them, or move them away")
    if not files:
        raise FileNotFoundError(f"{folder}: holds no mask; put masks such as 00000.png there or remove the folder")
    unknown = [file.name for file in files if file.stem not in index]
    if unknown:
        raise UserError(f"{folder}: no frame belongs to {few(unknown)}; add the frames or remove the masks")
    masks = {index[file.stem]: str(file) for file in files}
    if len(masks) < len(files):
        twice = [file.name for file in files if str(file) not in masks.values()]
        raise UserError(f"{folder}: {twice[0]} and another file are masks of one frame; remove one of them")
    return dict(sorted(masks.items()))


def object_masks(
    objects: dict[str, dict[int, str]], size: tuple[int, int], bad: Callable | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """{object: {frame: bool [H, W]}} of the mask files of a video.

    bad: called with an object and the error if one of its files cannot be read; the object is left out.
    Raises that error without `bad`.
    """
    masks = {}
    for name, files in objects.items():
        try:
            masks[name] = {frame: annotated_mask(path, size) for frame, path in files.items()}
        except (UserError, OSError) as error:
            if bad is None:
                raise
            bad(name, error)
    return masks


def read_mask(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """bool [H, W], the mask of an object that is to be tracked, as `annotated_mask` reads it.

    Raises UserError if it is empty.
    """
    mask = annotated_mask(path, size)
    if not mask.any():
        raise UserError(f"{path}: holds no object, all its pixels are 0; give a mask that is not 0 where the object is")
    return mask


def annotated_mask(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """bool [H, W], true where the file of one object's mask is not 0, as in SAM 2; empty where the object is absent.

    A mask with soft edges is read so, too. Raises UserError as `read_labels` does, for several objects, and for several
    values without 0.
    """
    labels = read_labels(path, size)
    values = np.unique(labels).tolist()
    if len(values) > 1 and 0 not in values:
        shown = few(values, 5)
        raise UserError(f"{path}: holds the values {shown}, and no 0; a mask must be 0 where the object is not")
    objects = [value for value in values if value > 0]
    if len(objects) > 1 and (has_palette(path) or not has_soft_edges(labels)):
        raise UserError(
            f"{path}: holds {len(objects)} objects, {few(objects, 5)}; a mask file in SA-V's layout holds one: save "
            "the one that is meant, or a mask with soft edges or traces of JPEG, as 0 and 1"
        )
    return labels != 0


def has_palette(path: str) -> bool:
    """Whether the values of an image file are indices of a palette."""
    with open_image(path) as image:
        return image.mode == "P"


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Writes a mask, bool [H, W], as a png of palette indices 0 and 1, as SAM 2's vos_inference.py does."""
    if mask.dtype != bool or mask.ndim != 2:
        raise UserError(f"{path}: a mask must be bool [H, W], got {mask.dtype} {list(mask.shape)}")
    write_labels(path, mask.astype(np.uint8))

"""Data sources: what a string such as "scenes:7" or a folder's name stands for.

A new dataset is one entry of SOURCES, before "folder". Nothing is read until it is needed.
"""

import random
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco import CocoImage, coco_images, read_instances
from sam2jq.data.images import (
    SUFFIXES,
    coco_names,
    frame_folders,
    images_below,
    images_named,
    is_image,
    read_image,
)
from sam2jq.data.sav import VosVideo, read_mask, vos_videos
from sam2jq.data.synthetic.scenes import Clip, draw_clip, draw_scene, scene_names, scene_seed
from sam2jq.data.video import Video, find_frames, open_video, video_of
from sam2jq.errors import UserError


class Item(NamedTuple):
    """A short clip for training: read() -> uint8 [H, W, 3] of each of `frames`, names for `read_image`."""

    name: str
    frames: tuple[str, ...]
    read: Callable[[], list[np.ndarray]]


class LabeledImage(NamedTuple):
    """An image with masks: read() -> uint8 [H, W, 3], bool [objects, H, W]."""

    name: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


class LabeledClip(NamedTuple):
    """A clip with masks: open() -> its frames, masks() -> {object: {frame: bool [H, W]}}, frames sorted."""

    name: str
    open: Callable[[], Video]
    masks: Callable[[], dict[str, dict[int, np.ndarray]]]


class Source(NamedTuple):
    """One kind of data source. Each function takes the string first; None: the source has nothing of that kind.

    matches(spec) -> whether this is the kind. images(spec, count) -> names for `read_image`.
    windows(spec, count, frames, stride) -> items of `frames` frames. labeled_images(spec, count) and
    labeled_clips(spec, split, count) -> the first `count`, all when None. Only scenes need `count` in the first two.
    """

    matches: Callable[[str], bool]
    images: Callable[[str, int | None], list[str]]
    windows: Callable[[str, int | None, int, int], list[Item]]
    labeled_images: Callable[[str, int | None], list[LabeledImage]] | None = None
    labeled_clips: Callable[[str, str, int | None], list[LabeledClip]] | None = None


def source_of(spec: str) -> Source:
    """The first entry of SOURCES that matches."""
    return next(source for source in SOURCES.values() if source.matches(spec))


def find_images(spec: str, num_samples: int | None, seed: int) -> list[str]:
    """The sorted names of `num_samples` images of a data source, sampled by `seed` without repeats; all if None.

    `spec` is an image file, `scenes:<seed>` (drawn scenes, no files), or a folder of one of these layouts:
      SA-V    {sav_train,sav_val,sav_test}/JPEGImages_24fps/<video>/<frame>.jpg, one split, or JPEGImages_24fps:
              the frames only;
      COCO    annotations/*.json with "images": [{"file_name"}]: these images, wherever below the folder they are;
      plain   all images below. SA-1B is such a folder: sa_*.jpg, and sa_*.json, which are ignored.
    Hidden files and folders, links to folders, and sub folders called annotations* (they hold masks) are skipped.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"{spec}: num_samples must be at least 1, got {num_samples}; leave it out to take every image")
    names = source_of(spec).images(spec, num_samples)
    if num_samples is None or num_samples >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, num_samples))


def find_samples(spec: str, count: int | None) -> list[LabeledImage]:
    """The first `count` images with masks of scenes:<seed> or of a COCO folder; all when None."""
    return (source_of(spec).labeled_images or coco_labeled_images)(spec, count)  # COCO's error says what is missing


def find_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """The first `count` clips with masks of scenes:<seed> or of a split of an SA-V folder; all when None."""
    return (source_of(spec).labeled_clips or sav_labeled_clips)(spec, split, count)


def read_images(names: tuple[str, ...]) -> list[np.ndarray]:
    """The pixels of each image, uint8 [H, W, 3]."""
    return [read_image(name) for name in names]


# drawn scenes


def scene_windows(spec: str, count: int | None, frames: int, stride: int) -> list[Item]:
    """One item per drawn clip."""

    def read(name: str) -> list[np.ndarray]:
        return list(draw_clip(scene_seed(name), (frames - 1) * stride + 1).frames[::stride])

    return [Item(name, (name,), partial(read, name)) for name in scene_names(spec, count)]


def scene_labeled_images(spec: str, count: int | None) -> list[LabeledImage]:
    """Drawn scenes with their masks."""
    read = lambda name: tuple(draw_scene(scene_seed(name)))
    return [LabeledImage(name, partial(read, name)) for name in scene_names(spec, count)]


@lru_cache(maxsize=1)
def drawn_clip(name: str) -> Clip:
    """The clip of the scene "scenes:<seed>/<index>"; the last one is cached for its frames and its masks."""
    return draw_clip(scene_seed(name))


def drawn_video(name: str) -> Video:
    """The frames of the clip of a scene."""
    return video_of(drawn_clip(name).frames)


def scene_labeled_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """Drawn clips with the masks of all frames; there are no splits."""

    def masks(name: str) -> dict[str, dict[int, np.ndarray]]:
        by_object = np.moveaxis(drawn_clip(name).masks, 1, 0)
        return {f"{i:03d}": dict(enumerate(object_masks)) for i, object_masks in enumerate(by_object)}

    names = scene_names(spec, count)
    return [LabeledClip(name, partial(drawn_video, name), partial(masks, name)) for name in names]


# folders


def folder_images(spec: str, count: int | None) -> list[str]:
    """The sorted names of an image file, or of all images below a folder; never empty."""
    root = Path(spec)
    if not spec or not root.exists():
        raise FileNotFoundError(f"{spec or 'empty path'}: no such file or folder; give a folder of images or scenes:7")
    if root.is_file() and not is_image(root.name):
        raise UserError(f"{spec}: not an image file; allowed: a folder or a file that ends in {' '.join(SUFFIXES)}")
    return [str(root)] if root.is_file() else images_in([root], spec)


def sav_images(spec: str, count: int | None) -> list[str]:
    """The sorted names of all frames of an SA-V folder."""
    folders = frame_folders(Path(spec))
    return images_in(folders, " or ".join(map(str, folders)))


def images_in(folders: list[Path], where: str) -> list[str]:
    """The sorted names of all images below `folders`. Raises FileNotFoundError if there is none."""
    names = sorted(str(image) for folder in folders for image in images_below(folder))
    if not names:
        raise FileNotFoundError(f"{where}: holds no image; looked for {' '.join(SUFFIXES)} in it and all folders below")
    return names


def coco_image_names(spec: str, count: int | None) -> list[str]:
    """The sorted names of the images that annotations/*.json list, of all images where they list none."""
    names = coco_names(Path(spec))
    return sorted(map(str, images_named(Path(spec), names))) if names else folder_images(spec, count)


def folder_windows(spec: str, count: int | None, frames: int, stride: int) -> list[Item]:
    """All non-overlapping runs of `frames` frames, `stride` apart, of the videos in a folder or an SA-V folder."""
    roots = frame_folders(Path(spec)) or [Path(spec)]
    items = []
    for video in (path for root in roots for path in sorted(root.iterdir()) if path.is_dir()):
        files = find_frames(str(video))
        length = (frames - 1) * stride + 1
        for first in range(0, len(files) - length + 1, length):
            names = tuple(files[first : first + length : stride])
            items.append(Item(f"{video.name}/{first}", names, partial(read_images, names)))
    return items


def coco_labeled_images(spec: str, count: int | None) -> list[LabeledImage]:
    """The images of a COCO folder with the masks of their instances."""

    def read(image: CocoImage) -> tuple[np.ndarray, np.ndarray]:
        masks = [instance.mask for instance in read_instances(image)]
        return read_image(image.path), np.stack(masks) if masks else np.zeros((0, *image.size), bool)

    return [LabeledImage(image.path, partial(read, image)) for image in coco_images(spec)[:count]]


def sav_labeled_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """The videos of a split of an SA-V folder with the masks of their objects."""

    def masks(video: VosVideo) -> dict[str, dict[int, np.ndarray]]:
        size = open_video(video.frames).size
        read = lambda files: {frame: read_mask(path, size) for frame, path in files.items()}
        return {name: read(files) for name, files in video.objects.items()}

    videos = vos_videos(spec, split)[:count]
    return [LabeledClip(video.name, partial(open_video, video.frames), partial(masks, video)) for video in videos]


SOURCES = {  # the first that matches is used
    "scenes:<seed>": Source(
        lambda spec: spec.startswith("scenes:"),
        scene_names,
        scene_windows,
        scene_labeled_images,
        scene_labeled_clips,
    ),
    "SA-V folder": Source(
        lambda spec: bool(spec) and bool(frame_folders(Path(spec))),
        sav_images,
        folder_windows,
        labeled_clips=sav_labeled_clips,
    ),
    "COCO folder": Source(
        lambda spec: bool(spec) and any(Path(spec).glob("annotations/[!.]*.json")),
        coco_image_names,
        folder_windows,
        labeled_images=coco_labeled_images,
    ),
    "folder": Source(lambda spec: True, folder_images, folder_windows),  # also an image file, and SA-1B
}

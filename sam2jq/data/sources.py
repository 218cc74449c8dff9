"""Data sources: images, clips and masks of a source given as a string, such as "scenes:7" or a folder.

A new type of source is one entry of SOURCES, before "folder". Pixels and masks are read lazily.
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
from sam2jq.data.synthetic.names import scene_names, scene_seed
from sam2jq.data.synthetic.scenes import Clip, draw_clip, draw_scene
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
    """A type of data source. The first argument of each function is the string; None: the type has no such data.

    matches(spec) -> whether the string is of this type. images(spec, count) -> names for `read_image`.
    windows(spec, count, frames, stride) -> items of `frames` frames. labeled_images(spec, count) and
    labeled_clips(spec, split, count) -> the first `count`, all if None. Only scenes need `count` in `images` and
    `windows`.
    """

    matches: Callable[[str], bool]
    images: Callable[[str, int | None], list[str]]
    windows: Callable[[str, int | None, int, int], list[Item]]
    labeled_images: Callable[[str, int | None], list[LabeledImage]] | None = None
    labeled_clips: Callable[[str, str, int | None], list[LabeledClip]] | None = None


def source_of(spec: str) -> Source:
    """The first entry of SOURCES that matches `spec`."""
    return next(source for source in SOURCES.values() if source.matches(spec))


def find_images(spec: str, num_samples: int | None, seed: int) -> list[str]:
    """The sorted names of `num_samples` images of a data source, sampled by `seed` without repeats; all if None.

    `spec` is an image file, `scenes:<seed>` (synthetic scenes, no files), or a folder of one of these layouts:
      SA-V    {sav_train,sav_val,sav_test}/JPEGImages_24fps/<video>/<frame>.jpg, one split, or JPEGImages_24fps:
              the frames only;
      COCO    annotations/*.json with "images": [{"file_name"}]: these images, anywhere below the folder;
      plain   all images below. SA-1B is such a folder: sa_*.jpg, and sa_*.json, which are ignored.
    Hidden files and folders, links to folders, and sub folders called annotations* (they hold masks) are skipped.
    Raises UserError if `num_samples` is below 1.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"{spec}: num_samples must be at least 1, got {num_samples}; leave it out to take every image")
    names = source_of(spec).images(spec, num_samples)
    if num_samples is None or num_samples >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, num_samples))


def find_samples(spec: str, count: int | None) -> list[LabeledImage]:
    """The first `count` images with masks of scenes:<seed> or of a COCO folder; all when None."""
    return (source_of(spec).labeled_images or coco_labeled_images)(
        spec, count
    )  # whose error says what the folder lacks


def find_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """The first `count` clips with masks of scenes:<seed> or of a split of an SA-V folder; all when None."""
    return (source_of(spec).labeled_clips or sav_labeled_clips)(spec, split, count)


def read_images(names: tuple[str, ...]) -> list[np.ndarray]:
    """The pixels of each image, uint8 [H, W, 3]."""
    return [read_image(name) for name in names]


# synthetic scenes


def scene_windows(spec: str, count: int | None, frames: int, stride: int) -> list[Item]:
    """`count` items, one per synthetic clip."""

    def read(name: str) -> list[np.ndarray]:
        return list(draw_clip(scene_seed(name), (frames - 1) * stride + 1).frames[::stride])

    return [Item(name, (name,), partial(read, name)) for name in scene_names(spec, count)]


def scene_labeled_images(spec: str, count: int | None) -> list[LabeledImage]:
    """`count` synthetic scenes with their masks."""
    read = lambda name: tuple(draw_scene(scene_seed(name)))
    return [LabeledImage(name, partial(read, name)) for name in scene_names(spec, count)]


@lru_cache(maxsize=1)
def cached_clip(name: str) -> Clip:
    """The clip "scenes:<seed>/<index>"; the last one is cached: frames and masks are read separately."""
    return draw_clip(scene_seed(name))


def scene_video(name: str) -> Video:
    """The frames of a synthetic clip."""
    return video_of(cached_clip(name).frames)


def scene_labeled_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """`count` synthetic clips with the masks of all frames; `split` is ignored."""

    def masks(name: str) -> dict[str, dict[int, np.ndarray]]:
        by_object = np.moveaxis(cached_clip(name).masks, 1, 0)
        return {f"{i:03d}": dict(enumerate(object_masks)) for i, object_masks in enumerate(by_object)}

    names = scene_names(spec, count)
    return [LabeledClip(name, partial(scene_video, name), partial(masks, name)) for name in names]


# folders


def folder_images(spec: str, count: int | None) -> list[str]:
    """The sorted names of an image file, or of all images below a folder.

    Raises FileNotFoundError if there is none, UserError if the file is not an image.
    """
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
    """The sorted names of the images that annotations/*.json list, or of all images if they list none."""
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

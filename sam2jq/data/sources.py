"""Data sources: images, clips and masks of a source given as a string, such as "scenes:7" or a folder.

A new type of source is one entry of SOURCES, before "folder". Pixels and masks are read lazily.
"""

import os
import random
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco import has_instances, is_coco
from sam2jq.data.davis import davis_frame_folders, is_davis
from sam2jq.data.folders import SUFFIXES, check_no_masks, clip_folders, frame_folders, images_below, is_image, listed
from sam2jq.data.images import read_image
from sam2jq.data.labeled import (
    Found,
    LabeledClip,
    LabeledImage,
    allow_some_missing,
    coco_labeled_images,
    davis_labeled_clips,
    sa1b_labeled_images,
    sav_labeled_clips,
)
from sam2jq.data.listed import coco_files
from sam2jq.data.sa1b import is_sa1b
from sam2jq.data.synthetic.names import scene_names, scene_seed
from sam2jq.data.synthetic.scenes import Clip, draw_clip, draw_scene
from sam2jq.data.video import VIDEO_SUFFIXES, Video, find_frames, video_of
from sam2jq.data.video_frames import count_frames, frame_name, is_video, read_frames, videos_below
from sam2jq.errors import UserError
from sam2jq.files import home


class Item(NamedTuple):
    """A short clip for training: read() -> uint8 [H, W, 3] of each of `frames`, names for `read_image`."""

    name: str
    frames: tuple[str, ...]
    read: Callable[[], list[np.ndarray]]


class Source(NamedTuple):
    """A type of data source. The first argument of each function is the string; None: the type has no such data.

    matches(spec) -> whether the string is of this type. images(spec, count) -> names for `read_image`.
    windows(spec, count, frames, stride) -> items of `frames` frames. labeled_images(spec, count) and
    labeled_clips(spec, split, count) -> the first `count`, all if None; `Found` says which images are missing. Only
    scenes need `count` in `images` and `windows`.
    """

    matches: Callable[[str], bool]
    images: Callable[[str, int | None], list[str]]
    windows: Callable[[str, int | None, int, int], list[Item]]
    labeled_images: Callable[[str, int | None], list[LabeledImage] | Found] | None = None
    labeled_clips: Callable[[str, str, int | None], list[LabeledClip]] | None = None


def source_of(spec: str, part: str = "images") -> Source:
    """The first entry of SOURCES that matches `spec` and has the `part`, a field of Source; else the last entry."""
    sources = (source for source in SOURCES.values() if getattr(source, part) and source.matches(spec))
    return next(sources, SOURCES["folder"])


def find_images(spec: str | os.PathLike, num_samples: int | None, seed: int) -> list[str]:
    """The sorted names of `num_samples` images of a data source, sampled by `seed` without repeats; all if None.

    `spec` is an image or video file, `scenes:<seed>` (synthetic scenes, no files), or a folder of one of these layouts:
      SA-V    {sav_train,sav_val,sav_test}/JPEGImages_24fps/<video>/<frame>.jpg, one split, or JPEGImages_24fps:
              the frames only;
      COCO    annotations/*.json with "images": [{"file_name"}]: these images, anywhere below the folder;
      plain   all images below. SA-1B is such a folder: sa_*.jpg, and sa_*.json, which are ignored;
      videos  without any image: every frame of the video files below, such as SA-V's sav_000/sav_000001.mp4.
    Hidden files and folders, and sub folders called annotations* or Segmentation* (they hold masks) are skipped, links
    are followed. Raises UserError if `num_samples` is below 1, or a folder may hold masks, such as masks beside images.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"{spec}: num_samples must be at least 1, got {num_samples}; leave it out to take every image")
    spec = home(os.fspath(spec))
    names = source_of(spec).images(spec, num_samples)
    if num_samples is None or num_samples >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, num_samples))


def find_samples(
    spec: str | os.PathLike, count: int | None, allow_missing: int = 0, say: Callable[[str], None] = lambda line: None
) -> list[LabeledImage]:
    """The first `count` images with masks of scenes:<seed>, or of a COCO, LVIS, Roboflow or SA-1B folder; all if None.

    allow_missing: the number of annotated images that may be missing. say: called with a line on what is left out.
    Raises FileNotFoundError if more are missing, UserError if an image has another size than its masks.
    """
    spec = home(os.fspath(spec))
    source = source_of(spec, "labeled_images")
    found = (source.labeled_images or coco_labeled_images)(spec, count)  # the latter's error says what is lacking
    return allow_some_missing(found, allow_missing, say) if isinstance(found, Found) else found


def find_clips(spec: str | os.PathLike, split: str, count: int | None) -> list[LabeledClip]:
    """The first `count` clips with masks of scenes:<seed>, or of a split of SA-V, DAVIS, MOSE or YouTube-VOS.

    All when `count` is None. split: "" for the layout's validation split. Raises UserError if no object has a score.
    """
    spec = home(os.fspath(spec))
    return (source_of(spec, "labeled_clips").labeled_clips or sav_labeled_clips)(spec, split, count)


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

    def masks(name: str, bad: Callable | None = None) -> dict[str, dict[int, np.ndarray]]:
        by_object = np.moveaxis(cached_clip(name).masks, 1, 0)
        return {f"{i:03d}": dict(enumerate(object_masks)) for i, object_masks in enumerate(by_object)}

    names = scene_names(spec, count)
    return [LabeledClip(name, partial(scene_video, name), partial(masks, name)) for name in names]


# folders


def folder_images(spec: str, count: int | None) -> list[str]:
    """The sorted names of an image file, of all images below a folder, or else of the frames of the videos below it.

    Raises FileNotFoundError if there is none, UserError if a file is neither an image nor a video.
    """
    root = Path(spec)
    if not spec or not root.exists():
        raise FileNotFoundError(f"{spec or 'empty path'}: no such file or folder; give a folder of images or scenes:7")
    if root.is_file() and is_image(root.name):
        return [str(root)]
    if root.is_file() and not is_video(root.name):
        endings = " ".join((*SUFFIXES, *VIDEO_SUFFIXES))
        raise UserError(f"{spec}: not an image or video file; allowed: a folder or a file that ends in {endings}")
    images = [] if root.is_file() else images_below(root)
    if not images and (videos := videos_below(root)):
        return [frame_name(video, index) for video in videos for index in range(count_frames(video))]
    check_no_masks(root, images)
    return images_in([root], spec)


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
    files = coco_files(Path(spec))
    return files if files is not None else folder_images(spec, count)


def folder_windows(spec: str, count: int | None, frames: int, stride: int) -> list[Item]:
    """All non-overlapping runs of `frames` frames, `stride` apart, of the clips in a folder or an SA-V folder.

    Clips are folders of frames, or else video files anywhere below the folder. `spec` may be one video file.
    """
    if Path(spec).is_file() and not is_video(spec):
        raise UserError(f"{spec}: not a video file; allowed: a folder of clips or a file in {' '.join(VIDEO_SUFFIXES)}")
    roots = frame_folders(Path(spec)) or ([] if Path(spec).is_file() else [Path(spec)])
    clips = []
    for root in roots:
        found, images = clip_folders(root), [path for path in listed(root) if is_image(path.name)]
        check_no_masks(root, [*images, *(clip / "0" for clip in found)])
        clips += found
    length = (frames - 1) * stride + 1
    items = []
    for clip in clips:
        files = find_frames(str(clip))
        for first in range(0, len(files) - length + 1, length):
            names = tuple(files[first : first + length : stride])
            items.append(Item(f"{clip.name}/{first}", names, partial(read_images, names)))
    for video in [] if clips else videos_below(Path(spec)):
        for first in range(0, count_frames(video) - length + 1, length):
            indices = range(first, first + length, stride)
            names = tuple(frame_name(video, index) for index in indices)
            items.append(Item(f"{video.stem}/{first}", names, partial(read_frames, str(video), indices)))
    return items


def davis_windows(spec: str, count: int | None, frames: int, stride: int) -> list[Item]:
    """As `folder_windows`, of all folders JPEGImages of a DAVIS, MOSE or YouTube-VOS folder."""
    folders = davis_frame_folders(Path(spec))
    return [item for folder in folders for item in folder_windows(str(folder), count, frames, stride)]


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
        lambda spec: bool(spec) and is_coco(Path(spec)) and (has_instances(Path(spec)) or not is_davis(Path(spec))),
        coco_image_names,
        folder_windows,
        labeled_images=coco_labeled_images,
    ),
    "SA-1B folder": Source(
        lambda spec: bool(spec) and is_sa1b(Path(spec)),
        folder_images,
        folder_windows,
        labeled_images=sa1b_labeled_images,
    ),
    "DAVIS, MOSE or YouTube-VOS folder": Source(
        lambda spec: bool(spec) and is_davis(Path(spec)),
        folder_images,
        davis_windows,
        labeled_clips=davis_labeled_clips,
    ),
    "folder": Source(lambda spec: True, folder_images, folder_windows),  # also an image file
}

"""Images and clips with masks, read lazily, from folders in the layouts of COCO, SA-1B, SA-V and DAVIS."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco import CocoImage, check_missing, find_coco, readable_instances
from sam2jq.data.davis import LabeledVideo, label_masks, label_videos
from sam2jq.data.images import check_size, image_size, is_turned, read_image
from sam2jq.data.sa1b import sa1b_files, sa1b_image
from sam2jq.data.sav import VosVideo, object_masks, vos_videos
from sam2jq.data.video import Video, find_frames, open_video
from sam2jq.errors import UserError, few

SCORED = 3  # annotated frames that an object needs at least: the first and the last have no score


class LabeledImage(NamedTuple):
    """An image with masks: read() -> uint8 [H, W, 3], bool [objects, H, W], none of them empty.

    left_out() -> {annotation: why `read` leaves it out}: its mask is empty or cannot be read.
    """

    name: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    left_out: Callable[[], dict[int, str]] = dict


class Found(NamedTuple):
    """missing: {json: names of its images that are not there}, of SA-1B also {image: [name of its missing json]}.

    notes: a line on every json that is left out.
    """

    images: list[LabeledImage]
    missing: dict[Path, list[str]]
    notes: list[str]


class LabeledClip(NamedTuple):
    """A clip with masks: open() -> its frames, masks(bad) -> {object: {frame: bool [H, W]}}, frames sorted.

    bad: called with an object and the error if its masks cannot be read; without it the error is raised.
    unscored: {object: why no frame of it has a score}, as far as it is known without reading masks.
    exclusive: whether each pixel belongs to one object at most, as in the label images of DAVIS. group: of clips whose
    scores are averaged apart: "seen" and "unseen" in LVOS, else "".
    """

    name: str
    open: Callable[[], Video]
    masks: Callable[..., dict[str, dict[int, np.ndarray]]]
    unscored: Mapping[str, str] = MappingProxyType({})
    exclusive: bool = False
    group: str = ""


def allow_some_missing(found: Found, allowed: int, say: Callable[[str], None]) -> list[LabeledImage]:
    """The images of `found`; `say` gets a line on each json with images that are left out.

    Raises FileNotFoundError if more than `allowed` images are missing.
    """
    check_missing(found.missing, allowed)
    for note in found.notes:
        say(note)
    names = [name for each in found.missing.values() for name in each]
    for what, some in (
        ("annotated images are missing and", [name for name in names if not name.endswith(".json")]),
        ("images have no json and are", [name for name in names if name.endswith(".json")]),
    ):
        if some:
            say(f"{len(some)} {what} left out, such as {some[0]}")
    return found.images


def coco_labeled_images(spec: str, count: int | None) -> Found:
    """The images of a COCO, LVIS or Roboflow folder with the masks of their instances."""
    folder = find_coco(spec)
    return Found(labeled(folder.images[:count]), folder.missing, folder.notes)


def sa1b_labeled_images(spec: str, count: int | None) -> Found:
    """The images of an SA-1B folder with the masks of their objects."""
    files, missing = sa1b_files(spec)
    return Found(labeled([sa1b_image(file) for file in files[:count]]), missing, [])


def labeled(images: list[CocoImage]) -> list[LabeledImage]:
    """The images with masks. Raises UserError if one has another size than its annotations."""
    for image in images:
        check_file_size(image.path, image.size, f"its annotations in {image.file} are for")

    def read(image: CocoImage) -> tuple[np.ndarray, np.ndarray]:
        masks = [instance.mask for instance in readable_instances(image)[0]]
        return read_image(image.path), np.stack(masks) if masks else np.zeros((0, *image.size), bool)

    left_out = lambda image: readable_instances(image)[1]
    return [LabeledImage(image.path, partial(read, image), partial(left_out, image)) for image in images]


def check_file_size(path: str, expected: tuple[int, int], whose: str) -> None:
    """Raises UserError unless an image has the `expected` (H, W). It says nothing about a file that is not readable:
    the evaluation names it, and goes on with the others."""
    try:
        size = image_size(path)
    except (UserError, OSError):
        return
    if size != expected and size == expected[::-1] and is_turned(path):
        raise UserError(
            f"{path}: {size[1]} x {size[0]} pixels are stored, but {whose} {expected[1]} x {expected[0]}, as viewers "
            "turn it by its EXIF orientation; save it upright, without that tag"
        )
    check_size(path, size, expected, whose)


def sav_labeled_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """The videos of a split of an SA-V folder with the masks of their objects; split: "" for sav_val."""

    def masks(video: VosVideo, bad: Callable | None = None) -> dict[str, dict[int, np.ndarray]]:
        return object_masks(video.objects, open_video(video.frames).size, bad)

    videos = vos_videos(spec, split or "sav_val")[:count]
    for video in videos:
        check_mask_sizes(video.frames, [path for files in video.objects.values() for path in files.values()])
    few_masks = {video.name: unscored(video.objects) for video in videos}
    check_scored({f"{video.name}/{name}": files for video in videos for name, files in video.objects.items()})
    return [
        LabeledClip(video.name, partial(open_video, video.frames), partial(masks, video), few_masks[video.name])
        for video in videos
    ]


def davis_labeled_clips(spec: str, split: str, count: int | None) -> list[LabeledClip]:
    """The videos of a split of a DAVIS, MOSE or YouTube-VOS folder with the masks of their objects."""

    def masks(video: LabeledVideo, bad: Callable | None = None) -> dict[str, dict[int, np.ndarray]]:
        return label_masks(video, open_video(video.frames).size, bad)

    videos = label_videos(spec, split)[:count]
    for video in videos:
        check_mask_sizes(video.frames, list(video.labels.values()))
    check_scored({video.name: video.labels for video in videos})
    return [
        LabeledClip(
            video.name, partial(open_video, video.frames), partial(masks, video), exclusive=True, group=video.group
        )
        for video in videos
    ]


def check_mask_sizes(frames: str, masks: list[str]) -> None:
    """Raises UserError if a mask file has another size than the first frame of its clip."""
    first = find_frames(frames)[0]
    size = image_size(first)
    for path in masks:
        check_file_size(path, size, "its frame has")


def unscored(objects: dict[str, dict[int, str]]) -> dict[str, str]:
    """{object: why it has no score} of the objects with too few masks; objects: {object: {frame: file}}."""
    return {name: too_few(len(files)) for name, files in objects.items() if len(files) < SCORED}


def too_few(count: int) -> str:
    return f"{count} annotated frame{'s' if count > 1 else ''}, but the first and the last have no score"


def check_scored(annotated: dict[str, dict[int, str]]) -> None:
    """Raises UserError if no object can have a score; annotated: {object or clip: its mask files}."""
    if annotated and not unscored(annotated).keys() < annotated.keys():
        names = [f"{name} ({len(files)})" for name, files in annotated.items()]
        raise UserError(f"too few annotated frames for a score, of {few(names)}: {SCORED} are needed for each")

"""The two benchmarks of `sam2jq evaluate`: prompted objects of images, and objects followed through clips."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco import coco_images, read_instances
from sam2jq.data.images import read_image, scene_names
from sam2jq.data.sav import read_mask, vos_videos
from sam2jq.data.synthetic.scenes import Clip, draw_clip, draw_scene, scene_seed
from sam2jq.data.video import Video, open_video, video_of
from sam2jq.errors import UserError
from sam2jq.eval.metrics import VideoScores, mean_scores, video_scores
from sam2jq.eval.prompted import mean_ious, object_ious, segment_objects, track_from_masks
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.video import VideoPredictor


class Sample(NamedTuple):
    """An image that is read when it is its turn: read() -> uint8 [H, W, 3], bool [objects, H, W]."""

    name: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


class Annotated(NamedTuple):
    """A clip that is read when it is its turn; masks() -> {object: {frame: bool [H, W]}}, frames sorted."""

    name: str
    open: Callable[[], Video]
    masks: Callable[[], dict[str, dict[int, np.ndarray]]]


def find_samples(data: str, count: int | None) -> list[Sample]:
    """The first `count` images with masks of scenes:<seed> or of a COCO folder; all when None."""
    if data.startswith("scenes:"):
        return [
            Sample(name, lambda name=name: tuple(draw_scene(scene_seed(name)))) for name in scene_names(data, count)
        ]

    def read(image) -> tuple[np.ndarray, np.ndarray]:
        masks = [instance.mask for instance in read_instances(image)]
        return read_image(image.path), np.stack(masks) if masks else np.zeros((0, *image.size), bool)

    return [Sample(image.path, lambda image=image: read(image)) for image in coco_images(data)[:count]]


def find_clips(data: str, split: str, count: int | None) -> list[Annotated]:
    """The first `count` clips with masks of scenes:<seed> or of a split of an SA-V folder; all when None."""
    if data.startswith("scenes:"):
        return [drawn_clip(name) for name in scene_names(data, count)]
    return [sav_clip(*entry) for entry in vos_videos(data, split)[:count]]


def sav_clip(name: str, frames: str, files: dict[str, dict[int, str]]) -> Annotated:
    """A clip of an SA-V folder; files: {object: {frame: its mask}}."""

    def masks() -> dict[str, dict[int, np.ndarray]]:
        size = open_video(frames).size
        return {obj: {frame: read_mask(path, size) for frame, path in of.items()} for obj, of in files.items()}

    return Annotated(name, lambda: open_video(frames), masks)


@lru_cache(maxsize=1)
def drawn(name: str) -> Clip:
    """The clip of the scene "scenes:<seed>/<index>"; the last one is kept, since its masks are asked for next."""
    return draw_clip(scene_seed(name))


def drawn_video(name: str) -> Video:
    """The frames of the clip `drawn`."""
    return video_of(drawn(name).frames)


def drawn_clip(name: str) -> Annotated:
    """The clip `drawn` with the masks of all its frames."""

    def masks() -> dict[str, dict[int, np.ndarray]]:
        return {f"{i:03d}": dict(enumerate(of)) for i, of in enumerate(np.moveaxis(drawn(name).masks, 1, 0))}

    return Annotated(name, lambda: drawn_video(name), masks)


def evaluate_images(model: SAM2, params: dict, samples: Iterator[Sample], dtype: str = "float32") -> dict:
    """{"miou": {"box", "1 click", "3 clicks"}, "images", "instances"}: means over all instances, in 0..1."""
    pairs = (pair for pair in (sample.read() for sample in samples) if len(pair[1]))
    ious = [object_ious(segment_objects(model, params, *pair, dtype), pair[1]) for pair in pairs]
    if not ious:
        raise UserError("no image has an object to segment: every annotation is a crowd or missing")
    return {"miou": mean_ious(ious), "images": len(ious), "instances": sum(len(of["box"]) for of in ious)}


def track_objects(
    predictor: VideoPredictor, clip: Annotated, write: Callable[[str, str, np.ndarray], None] | None = None
) -> dict[str, VideoScores]:
    """{object: J and F} of a clip's objects, each given by its first mask; write(object, frame name, mask), if given,
    gets every mask. An object that is in no scored frame has no score."""
    video, truth = clip.open(), clip.masks()
    first = {}
    for obj, masks in truth.items():
        seen = [frame for frame, mask in masks.items() if mask.any()]
        if seen:
            first[obj] = seen[0], masks[seen[0]]
    found = {obj: {frame: np.zeros_like(mask) for frame, mask in masks.items()} for obj, masks in truth.items()}
    for frame, obj, mask in track_from_masks(predictor, video, first):
        if frame in found[obj]:
            found[obj][frame] = mask
        if write:
            write(obj, video.names[frame], mask)
    stacked = {obj: (np.stack(list(found[obj].values())), np.stack(list(truth[obj].values()))) for obj in truth}
    return {obj: video_scores(got, wanted) for obj, (got, wanted) in stacked.items() if wanted[1:-1].any()}


def evaluate_clips(
    predictor: VideoPredictor,
    clips: Iterator[Annotated],
    write: Callable[[str, str, str, np.ndarray], None] | None = None,
) -> dict:
    """{"j", "f", "j&f": in percent, means over all objects; "clips", "objects", "scores": {clip: {object: {j, f}}}}.

    write(clip, object, frame name, mask), if given, gets every mask.
    """
    scores = {}
    for clip in clips:
        writer = write and (lambda *args, name=clip.name: write(name, *args))
        scores[clip.name] = track_objects(predictor, clip, writer)
    every = [score for of_clip in scores.values() for score in of_clip.values()]
    mean = mean_scores(every)
    return {
        "j": 100 * mean.j,
        "f": 100 * mean.f,
        "j&f": 100 * mean.jf,
        "clips": len(scores),
        "objects": len(every),
        "scores": {name: {obj: {"j": s.j, "f": s.f} for obj, s in of.items()} for name, of in scores.items()},
    }

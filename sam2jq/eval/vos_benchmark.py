"""Video object segmentation: objects given by their first mask, tracked through clips, scored by J and F."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, groupby

import numpy as np

from sam2jq.data.labeled import SCORED, LabeledClip, too_few
from sam2jq.data.video import Video
from sam2jq.errors import UserError, few
from sam2jq.eval.metrics import LongVideoScores, VideoScores, lvos_scores, mean_scores, video_scores
from sam2jq.predictors.video import VideoPredictor
from sam2jq.training.parallel_map import Replicas, parallel_map

Masks = dict[str, dict[int, np.ndarray]]  # {object: {frame: bool [H, W]}}


def evaluate_clips(
    predictor: VideoPredictor | Replicas,
    clips: Iterable[LabeledClip],
    write: Callable[[str, str, str, np.ndarray], None] | None = None,
) -> dict:
    """{"j", "f", "j&f": means over all objects in percent; "clips", "objects": counts; "scores": by clip and object}.

    For clips in groups, as in LVOS, "groups" has these means and "v" of each group, and "j", "f", "j&f" and "v" are
    means over the groups.

    "left_out" is {clip or clip/object: why it has no score}: its files cannot be read, or no scored frame shows it.
    The clips are split as by `parallel_map`. write: called with the clip's name, the object, the frame's name and the
    bool mask [H, W] of every frame, in the process that tracks the clip; for clips with label images once for a frame,
    with "" and the labels, unsigned [H, W].
    Raises UserError if no object has a score.
    """
    scores, left_out, groups = {}, {}, defaultdict(list)
    for name, group, found, without in parallel_map(partial(try_clip, write), predictor, clips, "clip"):
        left_out |= without
        if found is not None:
            scores[name] = found
            groups[group] += found.values()
    means = {group: mean_scores(found) for group, found in groups.items() if found}
    if not means:
        raise UserError(f"no object has a score: {few([f'{name}: {why}' for name, why in left_out.items()], 3)}")
    mean = percent(mean_scores(list(means.values())))
    return {
        **mean,
        "j&f": (mean["j"] + mean["f"]) / 2,
        **({"groups": {group: percent(one) for group, one in means.items()}} if any(means) else {}),
        "clips": len(scores),
        "objects": sum(map(len, groups.values())),
        "left_out": left_out,
        "scores": {name: {obj: s._asdict() for obj, s in objects.items()} for name, objects in scores.items()},
    }


def try_clip(
    write: Callable[[str, str, str, np.ndarray], None] | None, predictor: VideoPredictor, clip: LabeledClip
) -> tuple[str, str, dict[str, VideoScores | LongVideoScores] | None, dict[str, str]]:
    """(name, group, scores of the objects or None, {clip or clip/object: why it has no score}) of a clip."""
    left_out = {}
    writer = write and partial(write, clip.name)
    bad = lambda obj, why: left_out.__setitem__(f"{clip.name}/{obj}", why)
    try:
        return clip.name, clip.group, track_objects(predictor, clip, writer, bad), left_out
    except (UserError, FileNotFoundError) as error:  # no other OSError: a full disk ends the run
        return clip.name, clip.group, None, left_out | {clip.name: str(error)}


def percent(score: VideoScores | LongVideoScores) -> dict[str, float]:
    """{"j", "f" and, for LVOS, "v"} in percent."""
    return {name: 100 * value for name, value in score._asdict().items()}


def track_objects(
    predictor: VideoPredictor,
    clip: LabeledClip,
    write: Callable[[str, str, np.ndarray], None] | None = None,
    bad: Callable[[str, str], None] | None = None,
) -> dict[str, VideoScores | LongVideoScores]:
    """{object: J and F, for LVOS also V} of a clip's objects, each given by its first mask that is not empty.

    write: called with the object, the frame's name and the mask of every frame, as in `evaluate_clips`. bad: called
    before the clip is tracked with each object that has no score, and why.
    Raises UserError for an object whose masks cannot be read, without `bad`, and for a clip that cannot be read.
    """
    video = clip.open()
    truth = clip.masks(bad and (lambda obj, error: bad(obj, str(error))))
    without_score = {obj: why for obj, masks in truth.items() if (why := why_unscored(masks, clip.exclusive))}
    for obj, why in without_score.items():
        if bad:
            bad(obj, why)
    track = track_labels if clip.exclusive else track_apart
    predicted = track(predictor, video, truth, write or (lambda *_: None))
    scores = {}
    for obj in truth.keys() - without_score.keys():
        got, expected = (np.stack(list(masks[obj].values())) for masks in (predicted, truth))
        scores[obj] = (
            lvos_scores(got, expected) if clip.group else video_scores(got, expected, from_first_mask=clip.exclusive)
        )
    return {obj: scores[obj] for obj in truth if obj in scores}


def why_unscored(masks: dict[int, np.ndarray], exclusive: bool) -> str:
    """Why an object with these masks, by annotated frame, has no score; "" if it has one."""
    if len(masks) < SCORED:
        return too_few(len(masks))
    between = list(masks.values())[1:-1]
    return "" if exclusive or any(mask.any() for mask in between) else "no annotated frame between the ends shows it"


def track_apart(predictor: VideoPredictor, video: Video, truth: Masks, write: Callable) -> Masks:
    """The predicted masks in the annotated frames; masks of several objects may overlap."""
    predicted = {obj: {frame: np.zeros_like(mask) for frame, mask in masks.items()} for obj, masks in truth.items()}
    for frame, obj, mask in track_from_masks(predictor, video, first_masks(truth)):
        if frame in predicted[obj]:
            predicted[obj][frame] = mask
        write(obj, video.names[frame], mask)
    return predicted


def track_labels(predictor: VideoPredictor, video: Video, truth: Masks, write: Callable) -> Masks:
    """The predicted masks in the annotated frames; each pixel belongs to the object with the highest positive logit.

    This is how SAM 2 makes one label image of several objects (`non_overlap_masks` in its vos_inference.py). The names
    of objects are their labels.
    """
    predicted = {obj: {frame: np.zeros(video.size, bool) for frame in masks} for obj, masks in truth.items()}
    first, blank = len(video), np.zeros(video.size, np.min_scalar_type(max(map(int, truth), default=0)))
    for frame, rows in groupby(track_logits(predictor, video, first_masks(truth)), key=lambda row: row[0]):
        first = min(first, frame)
        labels, best = blank.copy(), np.zeros(video.size, np.float32)
        for _, obj, logits in rows:
            higher = logits > best
            best[higher], labels[higher] = logits[higher], int(obj)
        write("", video.names[frame], labels)
        for obj, masks in predicted.items():
            if frame in masks:
                masks[frame] = labels == int(obj)
    for name in video.names[:first]:
        write("", name, blank)
    return predicted


def first_masks(truth: Masks) -> dict[str, tuple[int, np.ndarray]]:
    """{object: (frame, mask)} of the first mask that is not empty, of the objects that have one."""
    visible = {obj: [frame for frame, mask in masks.items() if mask.any()] for obj, masks in truth.items()}
    return {obj: (frames[0], truth[obj][frames[0]]) for obj, frames in visible.items() if frames}


def track_from_masks(
    predictor: VideoPredictor, clip, first_masks: dict[str, tuple[int, np.ndarray]]
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (frame, object, bool mask [H, W]) of objects tracked from their first masks, as `track_logits` does."""
    for frame, name, logits in track_logits(predictor, clip, first_masks):
        yield frame, name, logits > 0


def track_logits(
    predictor: VideoPredictor, clip, first_masks: dict[str, tuple[int, np.ndarray]]
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (frame, object, mask logits [H, W]) of objects tracked from their first masks, frame after frame.

    clip: as `VideoPredictor.init_state` takes it. first_masks: {object: (frame, bool mask)}. Nothing is yielded for an
    object before its frame.
    """
    order = sorted(first_masks, key=lambda name: first_masks[name][0])
    groups = []
    for start, group in groupby(order, key=lambda name: first_masks[name][0]):
        state = predictor.init_state(clip, keep_outputs=False)
        for name in group:
            predictor.add_new_mask(state, start, name, first_masks[name][1])
        groups.append((start, predictor.propagate_in_video(state)))
    for frame in count(groups[0][0] if groups else 0):
        found = [next(tracked, None) for start, tracked in groups if start <= frame]
        if not any(found):
            return
        for number, names, logits in filter(None, found):
            yield from ((number, name, mask) for name, mask in zip(names, logits[:, 0]))

"""Video object segmentation: objects given by their first mask, tracked through clips, scored by J and F."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import numpy as np

from sam2jq.data.sources import LabeledClip
from sam2jq.eval.metrics import VideoScores, mean_scores, video_scores
from sam2jq.predictors.video import VideoPredictor


def evaluate_clips(
    predictor: VideoPredictor,
    clips: Iterable[LabeledClip],
    write: Callable[[str, str, str, np.ndarray], None] | None = None,
) -> dict:
    """{"j", "f", "j&f": means over all objects in percent; "clips", "objects": counts; "scores": by clip and object}.

    write: called with the clip's name, the object, the frame's name and the bool mask [H, W] of every frame.
    """
    scores = {}
    for clip in clips:
        writer = write and (lambda *args, name=clip.name: write(name, *args))
        scores[clip.name] = track_objects(predictor, clip, writer)
    all_scores = [score for by_object in scores.values() for score in by_object.values()]
    mean = mean_scores(all_scores)
    return {
        "j": 100 * mean.j,
        "f": 100 * mean.f,
        "j&f": 100 * mean.jf,
        "clips": len(scores),
        "objects": len(all_scores),
        "scores": {name: {obj: score_dict(s) for obj, s in objects.items()} for name, objects in scores.items()},
    }


def score_dict(score: VideoScores) -> dict[str, float]:
    """J and F, 0..1, for a json file."""
    return {"j": score.j, "f": score.f}


def track_objects(
    predictor: VideoPredictor, clip: LabeledClip, write: Callable[[str, str, np.ndarray], None] | None = None
) -> dict[str, VideoScores]:
    """{object: J and F} of a clip's objects, each given by its first mask that is not empty.

    write: called with the object, the frame's name and the bool mask [H, W] of every frame. An object that is absent
    from all scored frames has no score.
    """
    video, ground_truth = clip.open(), clip.masks()
    first_masks = {}
    for obj, masks in ground_truth.items():
        visible = [frame for frame, mask in masks.items() if mask.any()]
        if visible:
            first_masks[obj] = visible[0], masks[visible[0]]
    zeros = lambda masks: {frame: np.zeros_like(mask) for frame, mask in masks.items()}
    predicted = {obj: zeros(masks) for obj, masks in ground_truth.items()}
    for frame, obj, mask in track_from_masks(predictor, video, first_masks):
        if frame in predicted[obj]:
            predicted[obj][frame] = mask
        if write:
            write(obj, video.names[frame], mask)
    stacked = {obj: [np.stack(list(masks[obj].values())) for masks in (predicted, ground_truth)] for obj in predicted}
    return {obj: video_scores(got, expected) for obj, (got, expected) in stacked.items() if expected[1:-1].any()}


def track_from_masks(
    predictor: VideoPredictor, clip, first_masks: dict[str, tuple[int, np.ndarray]]
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (frame, object, bool mask [H, W]) of objects tracked from their first masks.

    clip: as `VideoPredictor.init_state` takes it. first_masks: {object: (frame, bool mask)}. Nothing is yielded for an
    object before its frame.
    """
    order = sorted(first_masks, key=lambda name: first_masks[name][0])
    for start, group in groupby(order, key=lambda name: first_masks[name][0]):
        state = predictor.init_state(clip)
        for name in group:
            predictor.add_new_mask(state, start, name, first_masks[name][1])
        for frame, names, logits in predictor.propagate_in_video(state):
            yield from ((frame, name, mask) for name, mask in zip(names, logits[:, 0] > 0))

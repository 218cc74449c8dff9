"""Whole folders and long clips of video object segmentation."""

from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.labeled import LabeledClip
from sam2jq.data.masks import write_labels
from sam2jq.data.sources import find_clips
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.data.video import video_of
from sam2jq.eval.vos_benchmark import evaluate_clips, track_objects

from .test_metrics import slow_contour_accuracy
from .test_vos_benchmark import FRAMES, SIDE, GroundTruthPredictor


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_long_clip_is_not_held_in_memory(exclusive):
    """Of all masks those of annotated frames are kept, and an object that comes later is tracked beside the others."""
    drawn, length = draw_clip(11, FRAMES, SIDE), 40 * FRAMES
    shown = SimpleNamespace(masks=np.concatenate([drawn.masks] * (length // FRAMES)))
    video = video_of(np.zeros((length, SIDE, SIDE, 3), np.uint8))
    late = FRAMES * 3
    truth = {
        "1": {i: shown.masks[i, 0] for i in range(0, length, FRAMES)},
        "2": {i: shown.masks[i, 1] for i in range(late, length, FRAMES)},
    }

    class Predictor(GroundTruthPredictor):
        def propagate_in_video(self, state):
            for frame in range(state["start"], length):
                alive.append((frame, sum(each() is not None for each in made)))
                masks = np.stack([self.masks[frame, int(name) - 1] for name in state["first"]])[:, None] - 0.5
                made.append(ref(masks))
                yield frame, state["first"], masks

    made, alive, written = [], [], []
    clip = LabeledClip("v", lambda: video, lambda bad: truth, exclusive=exclusive)
    scores = track_objects(Predictor(shown, 0), clip, lambda obj, frame, mask: written.append((frame, obj)))
    assert [frame for frame, _ in alive] == sorted(frame for frame, _ in alive)
    assert max(count for _, count in alive) <= 3
    assert len(written) == (length if exclusive else 2 * length - late)
    assert scores["2"].j == (1 if not exclusive else pytest.approx(1, abs=0.2))


LAYOUTS = {  # {layout: (folders of frames and label images, every n-th frame is annotated)}
    "DAVIS 2017": ("JPEGImages/480p", "Annotations/480p", 1),
    "MOSE": ("valid/JPEGImages", "valid/Annotations", 1),
    "LVOS": ("valid/JPEGImages", "valid/Annotations", 5),
}


def slow_davis_scores(masks: Path, written: dict) -> tuple[float, float]:
    """J and F as davis2017-evaluation defines them: per video and object the mean over its annotated frames but the
    first and the last, and then the mean over all objects. written: {(video, frame): labels}, the predictions."""
    j, f = [], []
    for video in sorted(masks.iterdir()):
        frames = {file.stem: np.asarray(Image.open(file)) for file in sorted(video.iterdir())}
        for label in range(1, 1 + max(image.max() for image in frames.values())):
            first = next(i for i, image in enumerate(frames.values()) if (image == label).any())
            inner = list(frames)[first + 1 : -1]
            pairs = [(written[video.name, frame] == label, frames[frame] == label) for frame in inner]
            j.append(np.mean([(a & b).sum() / (a | b).sum() if (a | b).any() else 1 for a, b in pairs]))
            f.append(np.mean([slow_contour_accuracy(a, b) for a, b in pairs]))
    return float(np.mean(j)), float(np.mean(f))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_a_folder_equal_those_of_a_slow_evaluator(tmp_path, layout):
    """Two videos, of two objects and of one, of which the second one appears in the second annotated frame."""
    frames, masks, every = LAYOUTS[layout]
    count, clips = 5 * every + 1, {}
    for name, objects in (("cat", 2), ("dog", 1)):
        drawn = draw_clip(len(clips), count, SIDE).masks[:, :objects].copy()
        drawn[:every, 1:] = False
        clips[name] = drawn
        for i in range(count):
            (tmp_path / frames / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((SIDE, SIDE, 3), i, np.uint8)).save(tmp_path / frames / name / f"{i:08d}.jpg")
            if i % every == 0:
                labels = np.zeros((SIDE, SIDE), np.uint8)
                for obj in range(objects):
                    labels[drawn[i, obj]] = obj + 1
                (tmp_path / masks / name).mkdir(parents=True, exist_ok=True)
                write_labels(tmp_path / masks / name / f"{i:08d}.png", labels)

    class Shifted(GroundTruthPredictor):
        def propagate_in_video(self, state):
            for frame in range(state["start"], count):
                found = [np.roll(self.masks[frame, int(name) - 1], frame % 4, 1) for name in state["first"]]
                yield frame, state["first"], np.stack(found)[:, None] - 0.5

    j, f, written = {}, {}, {}
    for clip in find_clips(str(tmp_path), "", None):
        write = lambda name, obj, frame, labels: written.__setitem__((name, frame), labels)
        scores = evaluate_clips(Shifted(SimpleNamespace(masks=clips[clip.name]), 0), [clip], write)["scores"]
        j |= {(clip.name, obj): score["j"] for obj, score in scores[clip.name].items()}
        f |= {(clip.name, obj): score["f"] for obj, score in scores[clip.name].items()}
    assert list(j) == [("cat", "1"), ("cat", "2"), ("dog", "1")]
    expected = slow_davis_scores(tmp_path / masks, written)
    assert (np.mean(list(j.values())), np.mean(list(f.values()))) == pytest.approx(expected, rel=1e-12)
    assert 0.3 < expected[0] < 0.95

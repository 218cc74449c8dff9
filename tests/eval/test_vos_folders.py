"""Whole folders and long clips of video object segmentation."""

import json
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
from sam2jq.errors import UserError
from sam2jq.eval.vos_benchmark import evaluate_clips, track_objects
from sam2jq.report.text import scores

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


def write_clips(root: Path, layout: str) -> dict[str, np.ndarray]:
    """{video: masks [T, objects, H, W]} of two videos that are written below `root`, of two objects and of one.

    The second object appears in the second annotated frame.
    """
    frames, masks, every = LAYOUTS[layout]
    count, clips = 5 * every + 1, {}
    for name, objects in (("cat", 2), ("dog", 1)):
        drawn = draw_clip(len(clips), count, SIDE).masks[:, :objects].copy()
        drawn[:every, 1:] = False
        clips[name] = drawn
        for i in range(count):
            (root / frames / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((SIDE, SIDE, 3), i, np.uint8)).save(root / frames / name / f"{i:08d}.jpg")
            if i % every == 0:
                labels = np.zeros((SIDE, SIDE), np.uint8)
                for obj in range(objects):
                    labels[drawn[i, obj]] = obj + 1
                (root / masks / name).mkdir(parents=True, exist_ok=True)
                write_labels(root / masks / name / f"{i:08d}.png", labels)
    return clips


class Shifted(GroundTruthPredictor):
    """Tracks the objects of the clip `name` by their true masks, moved by up to three pixels."""

    def __init__(self, clips: dict[str, np.ndarray]):
        self.clips, self.name = clips, ""

    def propagate_in_video(self, state):
        masks = self.clips[self.name]
        for frame in range(state["start"], len(masks)):
            found = [np.roll(masks[frame, int(name) - 1], frame % 4, 1) for name in state["first"]]
            yield frame, state["first"], np.stack(found)[:, None] - 0.5


def evaluate_folder(root: Path, clips: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """(the result of `evaluate_clips`, {(video, frame): labels that were written})."""
    written, predictor = {}, Shifted(clips)

    def each():
        for clip in find_clips(str(root), "", None):
            predictor.name = clip.name
            yield clip

    write = lambda name, obj, frame, labels: written.__setitem__((name, frame), labels)
    return evaluate_clips(predictor, each(), write), written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_a_folder_equal_those_of_a_slow_evaluator(tmp_path, layout):
    results, written = evaluate_folder(tmp_path, write_clips(tmp_path, layout))
    assert {name: list(found) for name, found in results["scores"].items()} == {"cat": ["1", "2"], "dog": ["1"]}
    expected = slow_davis_scores(tmp_path / LAYOUTS[layout][1], written)
    assert (results["j"], results["f"]) == pytest.approx([100 * score for score in expected], rel=1e-12)
    assert 0.3 < expected[0] < 0.95


SPANS = {"cat": {"1": (0, 26), "2": (5, 21)}, "dog": {"1": (0, 25)}}  # first frame, and one behind the last


def write_lvos_lists(root: Path) -> None:
    span = lambda start, end: {"frame_range": {"start": f"{start:08d}", "end": f"{end:08d}", "frame_nums": "5"}}
    videos = {name: {"objects": {obj: span(*ends) for obj, ends in each.items()}} for name, each in SPANS.items()}
    (root / "valid/valid_meta.json").write_text(json.dumps({"videos": videos}))
    (root / "valid/unseen_videos.txt").write_text("dog\n")


def slow_lvos_scores(masks: Path, written: dict) -> dict[str, tuple[float, float, float]]:
    """{video: mean J, F and V of its objects} as lvos-evaluation defines them: over every fifth frame of an object's
    span but the first and the last; V is the root of the variance of (J + F) / 2, which is rounded to 4 digits."""
    found = {}
    for video, objects in SPANS.items():
        rows = []
        for obj, (start, end) in objects.items():
            j, f = [], []
            for i in list(range(start, end, 5))[1:-1]:
                truth = np.asarray(Image.open(masks / video / f"{i:08d}.png")) == int(obj)
                got = written[video, f"{i:08d}"] == int(obj)
                j.append((got & truth).sum() / (got | truth).sum() if (got | truth).any() else 1)
                f.append(slow_contour_accuracy(got, truth))
            both = (np.array(j) + np.array(f)) / 2
            rows.append((np.mean(j), np.mean(f), round(np.mean((both - both.mean()) ** 2), 4) ** 0.5))
        found[video] = tuple(np.mean(rows, 0))
    return found


def test_lvos_is_scored_by_spans_and_by_seen_and_unseen_categories(tmp_path):
    clips = write_clips(tmp_path, "LVOS")
    write_lvos_lists(tmp_path)
    results, written = evaluate_folder(tmp_path, clips)
    expected = slow_lvos_scores(tmp_path / "valid/Annotations", written)
    for group, video in (("seen", "cat"), ("unseen", "dog")):
        assert list(results["groups"][group].values()) == pytest.approx([100 * x for x in expected[video]], rel=1e-9)
    means = 100 * np.mean(list(expected.values()), 0)
    assert [results[name] for name in ("j", "f", "v")] == pytest.approx(means.tolist(), rel=1e-9)
    assert results["j&f"] == pytest.approx(means[:2].mean(), rel=1e-9)
    assert means[2] > 1
    assert "\nunseen      J " in scores(results)


def test_lvos_without_the_list_of_unseen_videos_or_with_a_broken_json_is_refused(tmp_path):
    write_clips(tmp_path, "LVOS")
    write_lvos_lists(tmp_path)
    (tmp_path / "valid/unseen_videos.txt").unlink()
    with pytest.raises(FileNotFoundError, match="means over seen and unseen categories: put the file"):
        find_clips(str(tmp_path), "", None)
    write_lvos_lists(tmp_path)
    (tmp_path / "valid/valid_meta.json").write_text('{"videos": {"cat": {"objects": {"1": {}}}}}')
    with pytest.raises(UserError, match="not in LVOS' format"):
        find_clips(str(tmp_path), "", None)

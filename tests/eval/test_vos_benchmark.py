import json

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data.sav import read_mask, write_mask
from sam2jq.data.sources import find_clips, find_samples
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.eval.metrics import video_scores
from sam2jq.eval.vos_benchmark import track_objects

FRAMES, SIDE = 6, 64


@pytest.fixture
def sav(tmp_path):
    """One clip of two objects in the SA-V layout; the second has masks from frame 2 on."""
    clip = draw_clip(11, FRAMES, SIDE)
    root = tmp_path / "sav"
    frames = root / "sav_val" / "JPEGImages_24fps" / "v1"
    frames.mkdir(parents=True)
    for i, (frame, masks) in enumerate(zip(clip.frames, clip.masks)):
        Image.fromarray(frame).save(frames / f"{i:05d}.jpg")
        for obj in (0, 1):
            mask = masks[obj] if i >= 2 * obj else np.zeros_like(masks[obj])
            write_mask(root / "sav_val" / "Annotations_6fps" / "v1" / f"{obj:03d}" / f"{i:05d}.png", mask)
    return root


class GroundTruthPredictor:
    """A predictor that returns the ground-truth masks of `late` frames before."""

    def __init__(self, clip, late):
        self.masks, self.late = clip.masks, late

    def init_state(self, video):
        return {"first": [], "video": video}

    def add_new_mask(self, state, frame, name, mask):
        state["start"] = frame
        state["first"].append(name)

    def propagate_in_video(self, state):
        for frame in range(state["start"], len(state["video"])):
            masks = [self.masks[max(frame - self.late, state["start"]), int(name)] for name in state["first"]]
            yield frame, state["first"], np.stack(masks)[:, None] - 0.5


def test_perfect_masks_score_one_and_late_ones_less(sav):
    (clip,) = find_clips(str(sav), "sav_val", None)
    drawn = draw_clip(11, FRAMES, SIDE)
    scores = track_objects(GroundTruthPredictor(drawn, 0), clip)
    assert {name: (s.j, s.f) for name, s in scores.items()} == {"000": (1, 1), "001": (1, 1)}
    written = {}
    late = track_objects(
        GroundTruthPredictor(drawn, 1), clip, lambda obj, frame, mask: written.setdefault((obj, frame), mask)
    )
    assert all(s.j < 1 for s in late.values())
    masks = drawn.masks[:, 0]
    expected = video_scores(np.concatenate([masks[:1], masks[:-1]]), masks)
    assert late["000"] == expected
    assert sorted(frame for obj, frame in written if obj == "001") == [f"{i:05d}" for i in range(2, FRAMES)]


def test_the_command_writes_scores_and_a_mask_per_object_and_frame(sav, tmp_path, capsys):
    flags = ["--model.name", "nano", "--model.checkpoint", "random:0", "--output.root", str(tmp_path / "out")]
    cache = ["--cache.root", str(tmp_path / "cache")]
    assert main(["evaluate", "--task", "vos", "--data", str(sav), *flags, *cache]) == 0
    folder = tmp_path / "out" / "evaluate_vos"
    results = json.loads((folder / "metrics.json").read_text())
    assert results["objects"] == 2
    assert f"J&F         {results['j&f']:.2f}" in capsys.readouterr().out
    assert len(list((folder / "masks" / "v1").glob("*/*.png"))) == FRAMES + FRAMES - 2
    read_mask(str(folder / "masks" / "v1" / "001" / "00003.png"), (SIDE, SIDE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "video", "--data", "scenes:0"], "task 'video': allowed are image, vos"),
        (["--task", "image"], "data is not set"),
        (["--data", "scenes:0", "--num_samples", "0"], "num_samples must be at least 1"),
        (["--data", "scenes:0"], "drawn scenes have no end; give num_samples"),
        (["--data", "nowhere"], "nowhere/annotations: no such folder"),
        (["--task", "vos", "--data", "nowhere"], "nowhere: no such folder; give the SA-V folder that holds sav_val"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    flags = ["--model.name", "nano", "--output.root", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert all(path.name.endswith(".failed") for path in tmp_path.glob("out/*"))


def test_a_missing_split_names_those_that_are_there(sav):
    with pytest.raises(FileNotFoundError, match=r"no folder JPEGImages_24fps.*splits that have both: sav_val"):
        find_clips(str(sav), "sav_test", None)


def test_real_photographs_and_clips_are_found(shared):
    samples = find_samples(str(shared / "data/coco"), 3)
    image, masks = samples[0].read()
    assert masks.shape[1:] == image.shape[:2]
    clips = find_clips(str(shared / "data/sa-v"), "sav_val", None)
    assert len(clips) == 4
    assert all(masks for clip in clips for masks in clip.masks().values())

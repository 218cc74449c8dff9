import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data.labeled import LabeledClip
from sam2jq.data.masks import read_labels, write_labels
from sam2jq.data.sav import read_mask, write_mask
from sam2jq.data.sources import find_clips, find_samples
from sam2jq.data.synthetic.scenes import draw_clip, draw_scene
from sam2jq.data.video import open_video, video_of
from sam2jq.errors import UserError
from sam2jq.eval.metrics import video_scores
from sam2jq.eval.vos_benchmark import evaluate_clips, track_objects

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

    def init_state(self, video, keep_outputs):
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


def label_clip(exclusive: bool, masks, drawn) -> LabeledClip:
    return LabeledClip("v", lambda: video_of(drawn.frames), masks, exclusive=exclusive)


def test_overlapping_masks_of_label_images_go_to_the_higher_logit(tmp_path):
    """As SAM 2's `_apply_non_overlapping_constraints`, and the labels are what DAVIS' evaluator reads."""
    misc = pytest.importorskip("sam2.modeling.sam2_base").SAM2Base
    rng, drawn = np.random.default_rng(0), draw_clip(11, FRAMES, SIDE)
    logits = rng.normal(size=(FRAMES, 2, SIDE, SIDE)).astype(np.float16).astype(np.float32)

    class Random(GroundTruthPredictor):
        def propagate_in_video(self, state):
            for frame in range(FRAMES):
                yield frame, state["first"], logits[frame, :, None]

    truth = {str(obj + 1): dict(enumerate(drawn.masks[:, obj])) for obj in range(2)}
    written = {}
    clip = label_clip(True, lambda bad: truth, drawn)
    scores = track_objects(Random(drawn, 0), clip, lambda obj, frame, labels: written.setdefault(frame, labels))
    expected = np.stack(
        [misc._apply_non_overlapping_constraints(None, torch.from_numpy(each[:, None])).numpy() for each in logits]
    )[:, :, 0] > 0  # fmt: skip
    for obj in range(2):
        np.testing.assert_array_equal(np.stack(list(written.values())) == obj + 1, expected[:, obj])
        assert scores[str(obj + 1)] == video_scores(expected[:, obj], drawn.masks[:, obj], from_first_mask=True)


def test_labels_above_255_are_written_as_greys(tmp_path):
    drawn = draw_clip(11, FRAMES, SIDE)

    class Known(GroundTruthPredictor):
        def propagate_in_video(self, state):
            for frame in range(FRAMES):
                yield frame, state["first"], self.masks[frame, :1, None] - 0.5

    clip = label_clip(True, lambda bad: {"1001": dict(enumerate(drawn.masks[:, 0]))}, drawn)
    write = lambda obj, frame, labels: write_labels(tmp_path / f"{frame}.png", labels)
    assert track_objects(Known(drawn, 0), clip, write)["1001"].j == 1
    np.testing.assert_array_equal(read_labels(str(tmp_path / "00002.png")), 1001 * drawn.masks[2, 0])


def test_davis_scores_are_means_over_all_frames_but_the_first_and_the_last():
    """An object that is hidden right after its first frame, and predicted so, scores 1 there; SA-V starts later."""
    visible = np.zeros((8, 8), bool)
    visible[2:6, 2:6] = True
    hidden = np.zeros_like(visible)
    reference = np.stack([visible, hidden, visible, visible, visible])
    predicted = np.stack([visible, hidden, visible, hidden, hidden])
    davis, sav = video_scores(predicted, reference, from_first_mask=True), video_scores(predicted, reference)
    assert davis.j == pytest.approx(2 / 3)
    assert sav.j == pytest.approx(1 / 2)


def test_a_bad_object_is_named_and_the_others_keep_their_scores(sav):
    drawn, masks = draw_clip(11, FRAMES, SIDE), sav / "sav_val/Annotations_6fps/v1"
    shutil.copytree(masks / "000", masks / "002")
    shutil.copytree(masks / "000", masks / "003")
    (masks / "002/00003.png").write_text("no image")
    for frame in range(2, FRAMES):
        (masks / f"003/{frame:05d}.png").unlink()
    clips = find_clips(str(sav), "", None)
    assert dict(clips[0].unscored) == {"003": "2 annotated frames, but the first and the last have no score"}

    class Known(GroundTruthPredictor):
        def propagate_in_video(self, state):
            for frame in range(state["start"], FRAMES):
                yield (
                    frame,
                    state["first"],
                    np.stack([self.masks[frame, int(n) % 2] for n in state["first"]])[:, None] - 0.5,
                )

    broken = LabeledClip("v0", lambda: open_video("gone"), lambda bad: {})
    results = evaluate_clips(Known(drawn, 0), [broken, *clips])
    assert (results["j&f"], results["objects"], results["clips"]) == (100, 2, 1)
    assert sorted(results["left_out"]) == ["v0", "v1/002", "v1/003"]
    assert "002/00003.png: not a readable image" in results["left_out"]["v1/002"]


def test_clips_without_any_score_are_refused_before_tracking(sav):
    for obj in ("000", "001"):
        for frame in range(2, FRAMES):
            (sav / f"sav_val/Annotations_6fps/v1/{obj}/{frame:05d}.png").unlink()
    with pytest.raises(UserError, match=r"too few annotated frames for a score, of v1/000 \(2\), v1/001 \(2\): 3 are"):
        find_clips(str(sav), "", None)


def test_a_mask_of_another_size_is_found_before_tracking(sav):
    path = sav / "sav_val/Annotations_6fps/v1/001/00004.png"
    write_mask(path, np.ones((SIDE, SIDE + 1), bool))
    with pytest.raises(UserError, match=r"00004.png: 65 x 64 pixels, but its frame has 64 x 64"):
        find_clips(str(sav), "", None)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder with four drawn scenes as val2017, and a json of a train2017 that is not there."""
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/val2017").mkdir()
    square = [[8, 8, 40, 8, 40, 40, 8, 40]]
    for split in ("train", "val"):
        entries = [{"id": i, "file_name": f"{split}{i}.png", "height": SIDE, "width": SIDE} for i in range(4)]
        fields = {"category_id": 1, "iscrowd": 0, "segmentation": square}
        content = {
            "images": entries,
            "annotations": [{"id": i, "image_id": i} | fields for i in range(4)],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    for i in range(4):
        Image.fromarray(draw_scene(i, SIDE).image).save(tmp_path / f"coco/val2017/val{i}.png")
    return tmp_path / "coco"


def test_evaluate_keeps_what_it_measured_and_says_what_is_left_out(coco, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--model.name", "nano", "--model.checkpoint", "random:0", "--cache.root", "~/cache"]
    command = ["evaluate", "--task", "image", "--data", "~/coco", *flags, "--output.root=~/out"]
    (coco / "val2017/val3.png").unlink()
    assert main(command) == 2
    assert "1 images with instances are missing" in (error := capsys.readouterr().err)
    assert "such as val3.png; put them there, or set allow_missing to 1 to leave them out" in error
    file = coco / "annotations/instances_val2017.json"
    listed = json.loads(file.read_text())
    for id, segmentation in {8: {"size": [SIDE, SIDE], "counts": [9, 9]}, 9: [[90, 90, 99, 90, 99, 99]]}.items():
        listed["annotations"].append(listed["annotations"][0] | {"id": id, "segmentation": segmentation})
    file.write_text(json.dumps(listed))
    content = (coco / "val2017/val1.png").read_bytes()
    (coco / "val2017/val1.png").write_bytes(content[: len(content) // 2])
    assert main([*command, "--allow_missing", "1"]) == 0
    printed = capsys.readouterr().out
    assert "instances_train2017.json: none of its 4 images is there, this file is left out" in printed
    assert "1 annotated images are missing and left out, such as val3.png" in printed
    assert f"left out    {coco / 'val2017/val1.png'}: not a readable image" in printed
    results = json.loads((tmp_path / "out/evaluate_image/metrics.json").read_text())
    assert (results["images"], results["instances"]) == (2, 2)
    names = {Path(name).relative_to(coco).as_posix(): why for name, why in results["left_out"].items()}
    assert list(names) == ["val2017/val0.png/8", "val2017/val0.png/9", "val2017/val1.png"]
    assert "annotation 8 is not readable: its run lengths cover 18 pixels" in names["val2017/val0.png/8"]
    assert names["val2017/val0.png/9"] == "its mask is empty"
    assert "left out    3, such as" in printed


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

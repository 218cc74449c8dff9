"""Label images in which objects appear later, and the meta.json of YouTube-VOS that lists the frames of objects."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.masks import write_labels
from sam2jq.data.sources import find_clips
from sam2jq.errors import UserError

from .test_coco import SIZE, write_image

NAMES = ["00000", "00005", "00010", "00015", "00020"]


def write_clip(root: Path, shown: dict[str, set[int]], meta=None) -> Path:
    """A clip "v" of the split train; shown: {frame: labels of its label image}, each in a row of its own."""
    for name in NAMES:
        write_image(root / f"train/JPEGImages/v/{name}.jpg")
    for name, labels in shown.items():
        rows = np.isin(np.arange(SIZE[0]), list(labels)) * np.arange(SIZE[0])
        image = np.broadcast_to(rows[:, None], SIZE).astype(np.uint8)
        write_labels(root / f"train/Annotations/v/{name}.png", image)
    if meta is not None:
        (root / "train/meta.json").write_text(json.dumps({"videos": {"v": {"objects": meta}}}))
    return root


def truth_of(root: Path) -> tuple[dict[str, dict[int, bool]], dict[str, str]]:
    """{object: {frame: whether the truth shows it}}, and {object: why it is left out}."""
    left_out = {}
    (clip,) = find_clips(str(root), "", None)
    masks = clip.masks(lambda obj, error: left_out.__setitem__(obj, str(error)))
    return {obj: {i: bool(mask.any()) for i, mask in frames.items()} for obj, frames in masks.items()}, left_out


def frames_from(first: int) -> dict[str, list[str]]:
    return {"category": "dog", "frames": NAMES[first:]}


DENSE = {NAMES[0]: {1}, NAMES[1]: {1, 2}, NAMES[2]: {1}, NAMES[3]: {2}, NAMES[4]: {1, 2}}


@pytest.mark.parametrize("meta", [None, {"1": frames_from(0), "2": frames_from(1)}, {"1": NAMES, "2": NAMES[1:]}])
def test_an_object_starts_at_its_first_appearance_and_is_absent_where_it_is_not_shown(tmp_path, meta):
    truth, left_out = truth_of(write_clip(tmp_path, DENSE, meta))
    assert truth == {
        "1": {0: True, 1: True, 2: True, 3: False, 4: True},
        "2": {1: True, 2: False, 3: True, 4: True},
    }
    assert left_out == {}


def test_an_object_starts_where_meta_json_says(tmp_path):
    truth, _ = truth_of(write_clip(tmp_path, DENSE, {"1": frames_from(0), "2": frames_from(2)}))
    assert truth["2"] == {3: True, 4: True}


@pytest.mark.parametrize("meta", [None, {"1": NAMES, "2": NAMES[1:]}, {"1": NAMES[:1], "2": NAMES[1:2]}])
def test_label_images_of_first_appearances_are_no_ground_truth(tmp_path, meta):
    """As those of the validation set: an object that is not in a later label image is not absent there."""
    root = write_clip(tmp_path, {NAMES[0]: {1}, NAMES[1]: {2, 3}, NAMES[3]: {4}, NAMES[4]: set()}, meta)
    (clip,) = find_clips(str(root), "", None)
    with pytest.raises(UserError, match="v: no two of its label images show the same object: .*; give label images of"):
        clip.masks()


def test_objects_of_meta_json_without_ground_truth_are_left_out_by_name(tmp_path):
    meta = {"1": frames_from(0), "2": frames_from(1), "4": frames_from(0)}
    truth, left_out = truth_of(
        write_clip(tmp_path, {n: {1, 3} | ({2} if n == NAMES[1] else set()) for n in NAMES}, meta)
    )
    assert list(truth) == ["1"]
    assert left_out["2"].startswith("v/2: one label image shows it, but meta.json lists it in 3 more of them")
    assert left_out["3"].startswith("v/3: the label images show it, but meta.json does not list it")
    assert left_out["4"].startswith("v/4: meta.json lists it, but no label image shows it")


@pytest.mark.parametrize("meta", [{"1": {"category": "dog"}}, [], {"1": {"frames": "all"}}, {"1": [[0]]}])
def test_a_meta_json_without_lists_of_frames_is_not_used(tmp_path, meta):
    assert list(truth_of(write_clip(tmp_path, DENSE, meta))[0]) == ["1", "2"]


def test_label_images_with_palettes_of_their_own_are_refused(tmp_path):
    """A program that chose each palette numbered the objects of each image anew."""
    root = write_clip(tmp_path, DENSE)
    path = root / f"train/Annotations/v/{NAMES[3]}.png"
    image = Image.open(path)
    image.putpalette([0, 0, 0, 0, 128, 0, 128, 0, 0])
    image.save(path)
    (clip,) = find_clips(str(root), "", None)
    with pytest.raises(
        UserError, match=r"15.png: label 2 has the color \(128, 0, 0\), but \(0, 128, 0\) in .*05.png: the"
    ):
        clip.masks()

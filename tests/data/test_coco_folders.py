"""COCO's format in folders of several splits, folds and archives: which image and which json are taken."""

import json
from pathlib import Path

import numpy as np
import pytest

from sam2jq.data import find_images
from sam2jq.data.coco import coco_images
from sam2jq.data.masks import write_labels
from sam2jq.data.sources import SOURCES, find_clips, find_samples, source_of
from sam2jq.errors import UserError

from .test_coco import SIZE, SQUARE, annotation, write_image, write_json


def paths(root: Path) -> list[str]:
    return [Path(image.path).relative_to(root).as_posix() for image in coco_images(str(root))]


@pytest.mark.parametrize(
    ("file", "folders", "taken"),
    [
        ("instances_val.json", ["train", "val"], "val"),
        ("instances_train.json", ["train", "val"], "train"),
        ("instances_val2017.json", ["val2014", "val2017", "train2017"], "val2017"),
        ("instances_val2017.json", ["images/train2017", "images/val2017"], "images/val2017"),
        ("instances_val.json", ["test_images", "valid"], "valid"),
        ("instances.json", ["photos"], "photos"),
        ("instances_eval.json", ["train", "val", "eval", "fold1"], "eval"),
        ("instances_val.json", ["train", "val", "eval"], "val"),
        ("fold1.json", ["fold1", "fold2"], "fold1"),
        ("fold1.json", ["train"], "train"),
        ("instances-Fold_1.json", ["fold_1/train", "fold_2/train", "fold_1x"], "fold_1/train"),
        ("instances_train_fold2.json", ["fold1/train", "fold2/train", "fold2/val"], "fold2/train"),
        ("instances_night.json", ["day", "night"], "night"),
        ("instances_default.json", ["images", "masks"], "images"),
    ],
)
def test_of_several_files_that_of_the_jsons_split_is_taken(tmp_path, file, folders, taken):
    for folder in folders:
        write_image(tmp_path / folder / "0001.png")
    write_json(tmp_path, [annotation(SQUARE)], ["0001.png"], file)
    assert paths(tmp_path) == [f"{taken}/0001.png"]
    assert find_images(str(tmp_path), None, 0) == [str(tmp_path / taken / "0001.png")]


def test_equal_names_in_two_splits_belong_each_to_its_json(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "0001.png")
        write_json(tmp_path, [annotation(SQUARE)], ["0001.png"], f"instances_{split}.json")
    assert paths(tmp_path) == ["train/0001.png", "val/0001.png"]


@pytest.mark.parametrize(
    ("file", "folders"),
    [
        ("instances.json", ["a", "b"]),
        ("instances_val.json", ["a", "b"]),
        ("instances_eval.json", ["fold1", "train"]),
        ("instances_test.json", ["eval", "fold1", "train", "val"]),
        ("fold1.json", ["train", "val"]),
    ],
)
def test_a_name_that_fits_several_files_is_an_error_that_lists_them(tmp_path, file, folders):
    for folder in folders:
        write_image(tmp_path / folder / "0001.png")
    write_json(tmp_path, [annotation(SQUARE)], ["0001.png"], file)
    listed = ", ".join(str(tmp_path / folder / "0001.png") for folder in sorted(folders))
    for read in (coco_images, lambda root: find_images(root, None, 0)):
        with pytest.raises(UserError, match=rf"0001.png fits {len(folders)} files: {listed}; keep one"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("instances_val.json", "train"),
        ("instances_test.json", "eval"),
        ("fold1.json", "fold2"),
        ("instances_train_fold1.json", "fold2/train"),
    ],
)
def test_a_file_of_another_split_is_not_taken_for_a_missing_one(tmp_path, file, folder):
    write_image(tmp_path / folder / "0001.png")
    write_json(tmp_path, [annotation(SQUARE)], ["0001.png"], file)
    with pytest.raises(FileNotFoundError, match="1 of 1 images .* or only in a folder of another split"):
        coco_images(str(tmp_path))


def test_a_linked_folder_of_images_is_followed(tmp_path):
    write_image(tmp_path / "disk/a.jpg")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017").symlink_to(tmp_path / "disk")
    write_json(tmp_path / "coco", [annotation(SQUARE)], ["a.jpg"], "instances_val2017.json")
    assert paths(tmp_path / "coco") == ["val2017/a.jpg"]


def test_one_folder_may_have_the_names_of_both_splits(tmp_path):
    """As people link COCO's images for LVIS."""
    for name in ("1.jpg", "2.jpg"):
        write_image(tmp_path / "disk" / name)
    for split, name in {"train": "1.jpg", "val": "2.jpg"}.items():
        (tmp_path / "coco").mkdir(exist_ok=True)
        (tmp_path / "coco" / f"{split}2017").symlink_to(tmp_path / "disk")
        write_json(tmp_path / "coco", [annotation(SQUARE)], [name], f"instances_{split}2017.json")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "coco")
    assert paths(tmp_path / "coco") == ["train2017/1.jpg", "val2017/2.jpg"]


@pytest.mark.parametrize("folder", ["annotations_trainval2017/annotations", "coco/annotations", "annotations_v1"])
def test_annotations_in_the_folder_of_an_archive_are_found(tmp_path, folder):
    root = tmp_path / "coco" if folder.startswith("coco") else tmp_path
    write_image(root / "val2017/1.jpg")
    write_image(root / "train2017/1.jpg")
    write_json(root, [annotation(SQUARE)], ["1.jpg"], "instances_val2017.json")
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (root / "annotations").rename(tmp_path / folder)
    assert source_of(str(tmp_path)) is SOURCES["COCO folder"]
    assert find_images(str(tmp_path), None, 0) == [str(root / "val2017/1.jpg")]
    assert [sample.name for sample in find_samples(str(tmp_path), None)] == [str(root / "val2017/1.jpg")]


def test_a_coco_folder_beside_other_folders_of_images_is_one_of_them(tmp_path):
    for name in ("coco/val2017/1.jpg", "coco/val2017/unnamed.jpg", "photos/2.jpg"):
        write_image(tmp_path / name)
    write_json(tmp_path / "coco", [annotation(SQUARE)], ["1.jpg"], "instances_val2017.json")
    assert len(find_images(str(tmp_path), None, 0)) == 3


def test_annotations_beside_others_are_those_that_count(tmp_path):
    write_image(tmp_path / "1.jpg")
    for folder in ("annotations_old", "annotations"):
        write_json(tmp_path, [annotation(SQUARE)], ["1.jpg"])
        if folder != "annotations":
            (tmp_path / "annotations").rename(tmp_path / folder)
    assert paths(tmp_path) == ["1.jpg"]


def test_roboflows_folders_may_lie_in_one_folder(tmp_path):
    for split in ("train", "valid", "test"):
        write_image(tmp_path / "dataset" / split / "0001.jpg")
        write_json(tmp_path, [annotation(SQUARE)], ["0001.jpg"], "a.json")
        (tmp_path / "annotations/a.json").rename(tmp_path / "dataset" / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    names = [f"dataset/{split}/0001.jpg" for split in ("test", "train", "valid")]
    assert [Path(s.name).relative_to(tmp_path).as_posix() for s in find_samples(str(tmp_path), None)] == names


@pytest.mark.parametrize("name", ["val2014/COCO_val2014_000000000001.jpg", "train2017/000000000001.jpg"])
def test_lvis_05_has_the_name_in_coco_2014_and_the_url_of_2017(tmp_path, name):
    write_image(tmp_path / name)
    write_image(tmp_path / "val2017/000000000001.jpg")  # another image, as far as this test goes
    write_json(tmp_path, [annotation(SQUARE)], ["COCO_val2014_000000000001.jpg"], "lvis_v0.5_train.json")
    file = tmp_path / "annotations/lvis_v0.5_train.json"
    content = json.loads(file.read_text())
    content["images"][0]["coco_url"] = "http://images.example.org/train2017/000000000001.jpg"
    file.write_text(json.dumps(content))
    assert paths(tmp_path) == [name]
    assert find_images(str(tmp_path), None, 0) == [str(tmp_path / name)]


def test_a_coco_url_beside_a_file_name_is_not_used(tmp_path):
    """It is empty in many files, or the place of the image on the annotator's disk."""
    write_image(tmp_path / "1.jpg")
    write_json(tmp_path, [annotation(SQUARE)], ["1.jpg"])
    file = tmp_path / "annotations/instances_val.json"
    for url in ("", "C:\\images\\2.jpg", None):
        content = json.loads(file.read_text())
        content["images"][0]["coco_url"] = url
        file.write_text(json.dumps(content))
        assert paths(tmp_path) == ["1.jpg"]


@pytest.mark.parametrize("place", ["annotations/train.json", "labels.json"])
def test_a_json_of_another_name_counts_if_it_has_instances(tmp_path, place):
    write_image(tmp_path / "data/1.jpg")
    write_json(tmp_path, [annotation(SQUARE)], ["1.jpg"], "train.json")
    if place != "annotations/train.json":
        (tmp_path / "annotations/train.json").rename(tmp_path / place)
    assert [Path(s.name).name for s in find_samples(str(tmp_path), None)] == ["1.jpg"]


def test_a_folder_with_clips_and_a_json_gives_both(tmp_path):
    """As YouTube-VIS made from YouTube-VOS."""
    for name in ("0", "1", "2"):
        write_image(tmp_path / f"train/JPEGImages/v/{name}.jpg")
        write_labels(tmp_path / f"train/Annotations/v/{name}.png", np.ones(SIZE, np.uint8))
    write_json(tmp_path, [annotation(SQUARE)], ["v/0.jpg"], "a.json")
    (tmp_path / "annotations/a.json").rename(tmp_path / "train/instances.json")
    (tmp_path / "annotations").rmdir()
    assert [Path(s.name).name for s in find_samples(str(tmp_path), None)] == ["0.jpg"]
    assert [clip.name for clip in find_clips(str(tmp_path), "", None)] == ["v"]

"""Datasets as they are downloaded or exported: COCO in part, LVIS, Roboflow, SA-1B, SA-V's videos, DAVIS and others."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import find_images, read_image
from sam2jq.data.loader import find_items, read_item, split_of
from sam2jq.data.masks import davis_palette, write_labels
from sam2jq.data.sources import SOURCES, find_clips, find_samples, source_of
from sam2jq.data.video_frames import image_id
from sam2jq.errors import UserError

from .test_coco import SIZE, SQUARE, annotation, rle, write_image, write_json
from .test_video import random_frames, write_video

MASK = np.zeros(SIZE, bool)
MASK[4:8, 5:11] = True


def two_splits(root: Path, present: list[str], listed: dict[str, list[str]]) -> str:
    """A COCO folder; present: image files; listed: {split: names of its json's images, with one square each}."""
    for name in present:
        write_image(root / name)
    for split, names in listed.items():
        annotations = [annotation(SQUARE, image_id=i, id=i) for i in range(1, len(names) + 1)]
        write_json(root, annotations, names, f"instances_{split}2017.json")
    return str(root)


def names_of(samples: list) -> list[str]:
    return [Path(sample.name).name for sample in samples]


@pytest.mark.parametrize("equal_names", [False, True])
def test_coco_with_one_split_on_disk_takes_the_json_that_fits(tmp_path, equal_names):
    train = ["1.jpg", "2.jpg"] if equal_names else ["8.jpg", "9.jpg"]
    spec = two_splits(tmp_path, ["val2017/1.jpg", "val2017/2.jpg"], {"train": train, "val": ["1.jpg", "2.jpg"]})
    said = []
    assert names_of(find_samples(spec, None, say=said.append)) == ["1.jpg", "2.jpg"]
    (line,) = said
    assert line.endswith("instances_train2017.json: none of its 2 images is there, this file is left out")


def test_missing_images_are_left_out_up_to_allow_missing(tmp_path):
    spec = two_splits(tmp_path, ["val2017/1.jpg"], {"val": ["1.jpg", "2.jpg", "3.jpg"]})
    for allowed in (0, 1):
        with pytest.raises(FileNotFoundError, match="val2017.json: 2 images .* such as 2.jpg; .* allow_missing to 2"):
            find_samples(spec, None, allowed)
    said = []
    assert names_of(find_samples(spec, None, 2, said.append)) == ["1.jpg"]
    assert said == ["2 annotated images are missing and left out, such as 2.jpg"]


def test_an_image_of_another_size_is_found_before_any_is_read(tmp_path):
    spec = two_splits(tmp_path, ["val2017/1.jpg", "val2017/2.jpg"], {"val": ["1.jpg", "2.jpg"]})
    Image.new("RGB", (31, 20)).save(tmp_path / "val2017/2.jpg")
    with pytest.raises(UserError, match="2.jpg: 31 x 20 pixels, but its annotations in .*val2017.json are for 30 x 20"):
        find_samples(spec, None)
    (tmp_path / "val2017/2.jpg").write_text("no image")  # for the evaluation to name, which keeps the others
    assert names_of(find_samples(spec, None)) == ["1.jpg", "2.jpg"]


def test_a_photo_whose_annotations_are_for_its_upright_view_is_named(tmp_path):
    spec = two_splits(tmp_path, ["val2017/1.jpg"], {"val": ["1.jpg"]})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", SIZE).save(tmp_path / "val2017/1.jpg", exif=exif)
    with pytest.raises(UserError, match="1.jpg: 20 x 30 pixels are stored, .* for 30 x 20, as viewers .*; save"):
        find_samples(spec, None)


def test_roboflow_exports_have_their_json_beside_the_images(tmp_path):
    pytest.importorskip("pycocotools")
    for split in ("train", "valid"):
        write_image(tmp_path / split / "0001.jpg")
        write_json(tmp_path, [annotation(SQUARE)], ["0001.jpg"])
        (tmp_path / "annotations/instances_val.json").rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    assert [Path(s.name).parent.name for s in find_samples(str(tmp_path), None)] == ["train", "valid"]
    (sample,) = find_samples(str(tmp_path / "valid"), None)
    np.testing.assert_array_equal(sample.read()[1], MASK[None])
    (tmp_path / "train/0001.jpg").unlink()  # the one in valid/ is not taken for it
    assert [Path(s.name).parent.name for s in find_samples(str(tmp_path), None)] == ["valid"]


@pytest.mark.parametrize("folder", ["annotations", "."])
def test_lvis_names_its_images_by_coco_url(tmp_path, folder):
    pytest.importorskip("pycocotools")
    for name in ("train2017/1.jpg", "val2017/1.jpg"):  # the validation set of LVIS holds images of COCO's train2017
        write_image(tmp_path / name)
    urls = [f"http://images.example.org/{split}2017/1.jpg" for split in ("train", "val")]
    images = [{"id": i, "coco_url": url, "height": SIZE[0], "width": SIZE[1]} for i, url in enumerate(urls)]
    annotations = [annotation(SQUARE, image_id=i, id=i) for i in range(2)]
    for each in annotations:
        del each["iscrowd"]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "lvis_v1_val.json").write_text(json.dumps(content))
    samples = find_samples(str(tmp_path), None)
    assert [Path(s.name).relative_to(tmp_path).as_posix() for s in samples] == ["train2017/1.jpg", "val2017/1.jpg"]
    np.testing.assert_array_equal(samples[0].read()[1], MASK[None])


def test_sa1b_has_a_json_of_run_lengths_beside_each_image(tmp_path):
    for number in (1, 2):
        write_image(tmp_path / f"sa_000020/sa_{number}.jpg")
    for number in (1, 2, 3):
        image = {"image_id": number, "file_name": f"sa_{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
        masks = [{"id": 5, "segmentation": rle(MASK), "bbox": [5, 4, 6, 4]}, {"id": 6, "segmentation": rle(~MASK)}]
        path = tmp_path / f"sa_000020/sa_{number}.json"
        path.write_text(json.dumps({"image": image, "annotations": masks}))
    with pytest.raises(FileNotFoundError, match=r"sa_3.json: 1 images .* such as sa_3.jpg"):
        find_samples(str(tmp_path), None)
    write_image(tmp_path / "sa_000020/sa_4.jpg")
    with pytest.raises(FileNotFoundError, match="sa_4.jpg: 1 images .* and 1 json files of images .* to 2 to leave"):
        find_samples(str(tmp_path), None, allow_missing=1)
    said = []
    assert names_of(find_samples(str(tmp_path), None, 2, said.append)) == ["sa_1.jpg", "sa_2.jpg"]
    assert said == [
        "1 annotated images are missing and left out, such as sa_3.jpg",
        "1 images have no json and are left out, such as sa_4.json",
    ]
    (tmp_path / "sa_000020/sa_4.jpg").unlink()
    samples = find_samples(str(tmp_path), None, allow_missing=1)
    np.testing.assert_array_equal(samples[0].read()[1], np.stack([MASK, ~MASK]))
    assert len(find_images(str(tmp_path), None, 0)) == 2
    masks[0]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "sa_000020/sa_1.json").write_text(json.dumps({"image": image, "annotations": masks}))
    with pytest.raises(UserError, match=r"sa_1.json: annotation 5 is not readable: a polygon has 4 numbers"):
        find_samples(str(tmp_path), None, allow_missing=1)


def test_videos_of_sav_give_training_frames(tmp_path):
    frames = random_frames(8)
    (tmp_path / "sav_train/sav_000").mkdir(parents=True)
    path = write_video(tmp_path / "sav_train/sav_000/sav_000001.mp4", frames)
    (tmp_path / "sav_train/sav_000/sav_000001_manual.json").write_text("{}")
    assert split_of(str(tmp_path), "sav_train") == str(tmp_path / "sav_train")
    clips = find_items(str(tmp_path), None, 0, frames=2, stride=3)
    assert [clip.name for clip in clips] == ["sav_000001/0", "sav_000001/4"]
    np.testing.assert_array_equal(clips[1].read(), frames[[4, 7]])
    names = find_images(str(tmp_path), None, 0)
    assert names == [f"{path}#{index:05d}" for index in range(8)]
    for index in (3, 1, 7):
        np.testing.assert_array_equal(read_image(names[index]), frames[index])
    assert read_item(find_items(str(tmp_path), 1, 0)[0], 16).shape == (1, 16, 16, 3)
    assert len({image_id(name) for name in names}) == 8


def labels_of(frame: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Two objects that move to the right; the second is there from frame 1 on."""
    labels = np.zeros(size, np.uint8)
    labels[2:8, 2 + frame : 9 + frame] = 1
    if frame >= 1:
        labels[10:18, 4 + frame : 12 + frame] = 2
    return labels


def write_label_clip(frames: Path, masks: Path, count: int = 5, every: int = 1) -> None:
    for index in range(count):
        write_image(frames / f"{index:05d}.jpg")
        if index % every == 0:
            write_labels(masks / f"{index:05d}.png", labels_of(index))


LAYOUTS = {  # {layout: (folders of frames and masks, lists of videos, the split that is the default)}
    "DAVIS": ("JPEGImages/480p", "Annotations/480p", {"2016": "shoe\n", "2017": "dog\n"}, ""),
    "MOSE": ("valid/JPEGImages", "valid/Annotations", {}, "valid"),
    "YouTube-VOS": ("train/JPEGImages", "train/Annotations", {}, "train"),
    "one folder": ("JPEGImages", "Annotations", {}, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_images_are_masks_of_all_objects(tmp_path, layout):
    frames, masks, lists, split = LAYOUTS[layout]
    write_label_clip(tmp_path / frames / "dog", tmp_path / masks / "dog")
    for year, text in lists.items():
        (tmp_path / "ImageSets" / year).mkdir(parents=True)
        (tmp_path / "ImageSets" / year / "val.txt").write_text(text)
    assert source_of(str(tmp_path)) is SOURCES["DAVIS, MOSE or YouTube-VOS folder"]
    (clip,) = find_clips(str(tmp_path), "", None)
    assert [each.name for each in find_clips(str(tmp_path), split, None)] == [clip.name] == ["dog"]
    truth = clip.masks()
    assert {name: list(frames) for name, frames in truth.items()} == {"1": [0, 1, 2, 3, 4], "2": [1, 2, 3, 4]}
    for label, by_frame in truth.items():
        for frame, mask in by_frame.items():
            np.testing.assert_array_equal(mask, labels_of(frame) == int(label))
    assert len(find_images(str(tmp_path), None, 0)) == 5
    assert len(find_items(str(tmp_path), None, 0, frames=2, stride=1)) == 2
    with pytest.raises(FileNotFoundError, match="has no split test; give split, one of"):
        find_clips(str(tmp_path), "test", None)


@pytest.mark.parametrize("resolution", ["480p", "1080p"])
def test_the_lists_of_davis_2016_name_frames(tmp_path, resolution):
    for name in ("bear", "dog"):
        write_label_clip(tmp_path / "JPEGImages" / resolution / name, tmp_path / "Annotations" / resolution / name)
    frames = [f"/JPEGImages/{resolution}/dog/{i:05d}.jpg /Annotations/{resolution}/dog/{i:05d}.png" for i in range(5)]
    (tmp_path / "ImageSets" / resolution).mkdir(parents=True)
    (tmp_path / "ImageSets" / resolution / "val.txt").write_text("\n".join(frames))
    (clip,) = find_clips(str(tmp_path), "", None)
    assert clip.name == "dog"


@pytest.mark.parametrize("place", ["ImageSets/val.txt", "ImageSets/2019/val.txt", "DAVIS/ImageSets/2017/val.txt"])
def test_a_list_counts_wherever_it_lies(tmp_path, place):
    root = tmp_path / "DAVIS" if place.startswith("DAVIS") else tmp_path
    for name in ("bear", "dog"):
        write_label_clip(root / "JPEGImages" / name, root / "Annotations" / name)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text("dog")
    for split in ("", "val"):
        assert [clip.name for clip in find_clips(tmp_path, split, None)] == ["dog"]


def test_label_images_of_a_video_without_frames_are_named(tmp_path):
    write_label_clip(tmp_path / "JPEGImages/a", tmp_path / "Annotations/a")
    write_label_clip(tmp_path / "elsewhere", tmp_path / "Annotations/b")
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/b: no such folder \(1 are missing\); put it there"):
        find_clips(str(tmp_path), "", None)


def test_255_is_void_in_label_images_and_the_object_in_those_of_davis_2016(tmp_path):
    for index in range(3):
        write_image(tmp_path / f"JPEGImages/480p/dog/{index}.jpg")
        write_labels(tmp_path / f"Annotations/480p/dog/{index}.png", np.where(MASK, 255, labels_of(index)).astype("u1"))
    (clip,) = find_clips(str(tmp_path), "", None)
    assert list(clip.masks()) == ["1", "2"]
    for index in range(3):
        Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / f"Annotations/480p/dog/{index}.png")
    assert list(clip.masks()) == ["255"]


def test_clips_with_first_masks_only_are_refused_before_tracking(tmp_path):
    """As those of the validation sets of MOSE and YouTube-VOS, whose masks are not public."""
    write_label_clip(tmp_path / "valid/JPEGImages/a", tmp_path / "valid/Annotations/a", every=9)
    with pytest.raises(UserError, match=r"too few annotated frames for a score, of a \(1\): 3 are needed"):
        find_clips(str(tmp_path), "", None)


def test_the_palette_is_that_of_davis():
    colors = np.frombuffer(davis_palette(), np.uint8).reshape(-1, 3)
    assert colors[:6].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert colors[[8, 16, 32, 255]].tolist() == [[64, 0, 0], [0, 64, 0], [0, 0, 64], [224, 224, 192]]


def test_one_id_for_two_objects_of_sa1b_is_an_error(tmp_path):
    write_image(tmp_path / "sa_1.jpg")
    image = {"image_id": 1, "file_name": "sa_1.jpg", "height": SIZE[0], "width": SIZE[1]}
    content = {"image": image, "annotations": [{"id": 5, "segmentation": rle(MASK)}] * 2}
    (tmp_path / "sa_1.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="sa_1.json: annotation 5 is there twice"):
        find_samples(str(tmp_path), None)


def test_two_images_of_one_json_of_sa1b_are_an_error(tmp_path):
    write_image(tmp_path / "sa_1.jpg")
    write_image(tmp_path / "sa_1.png")
    (tmp_path / "sa_1.json").write_text("{}")
    with pytest.raises(UserError, match="sa_1.png: sa_1.jpg beside it belongs to the same json; remove one"):
        find_samples(str(tmp_path), None)

import json

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import sources
from sam2jq.data.coco import coco_images
from sam2jq.data.loader import find_items
from sam2jq.data.sources import SOURCES, LabeledImage, Source, find_clips, find_images, find_samples, source_of
from sam2jq.errors import UserError

from .test_images import names_in, write_images


@pytest.fixture
def coco(tmp_path):
    """A COCO folder with the image train/0001.jpg and one instance."""
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train/0001.jpg")
    write_names(tmp_path, "train/0001.jpg")
    return tmp_path


def write_names(root, name):
    (root / "annotations").mkdir(exist_ok=True)
    instance = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": {"size": [8, 8], "counts": [9, 55]}}
    content = {
        "images": [{"id": 1, "file_name": name, "height": 8, "width": 8}],
        "annotations": [instance | {"bbox": [0, 0, 8, 8]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "annotations/instances.json").write_text(json.dumps(content))


def test_a_coco_file_name_may_hold_forward_slashes(coco):
    expected = [str(coco / "train/0001.jpg")]
    assert [image.path for image in coco_images(str(coco))] == expected
    assert find_images(str(coco), None, 0) == expected


@pytest.mark.parametrize("name", ["../1.jpg", "train/../../1.jpg", "/elsewhere/1.jpg", "..", "", " ", "train\\1.jpg"])
def test_a_coco_file_name_must_stay_in_its_folder(coco, name):
    write_names(coco, name)
    for read in (lambda: coco_images(str(coco)), lambda: find_images(str(coco), None, 0)):
        with pytest.raises(UserError, match=r"instances\.json: .* (leads out of its folder|holds a backslash)"):
            read()


def test_each_type_of_source_is_recognized(coco, tmp_path):
    types = {"scenes:3": "scenes:<seed>", str(coco): "COCO folder", str(coco / "train"): "folder", "nowhere": "folder"}
    (tmp_path / "sav/JPEGImages_24fps/v").mkdir(parents=True)
    types |= {str(tmp_path / "sav"): "SA-V folder"}
    for spec, name in types.items():
        assert source_of(spec) is SOURCES[name], spec


def test_a_new_dataset_is_one_entry(monkeypatch):
    """Images, masks and training items come from a source that is only added to SOURCES."""
    scene = sources.draw_scene(0, 64)
    toy = Source(
        matches=lambda spec: spec.startswith("toy:"),
        images=lambda spec, count: ["scenes:0/0000", "scenes:0/0001"][:count],
        windows=lambda spec, count, frames, stride: [],
        labeled_images=lambda spec, count: [LabeledImage("one", lambda: tuple(scene))],
    )
    monkeypatch.setattr(sources, "SOURCES", {"toy": toy, **SOURCES})
    assert find_images("toy:", 1, 0) == ["scenes:0/0000"]
    assert len(find_items("toy:", 2, 0)) == 2
    image, masks = find_samples("toy:", None)[0].read()
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(masks, scene.masks)
    with pytest.raises(FileNotFoundError, match="give the SA-V folder"):
        find_clips("toy:", "sav_val", None)


def test_the_masks_of_voc_are_no_photographs(tmp_path):
    masks = ["SegmentationClass/1.png", "SegmentationObject/1.png", "SegmentationClassAug/1.png", "Annotations/1.png"]
    write_images(tmp_path, "JPEGImages/1.jpg", "JPEGImages/2.jpg", *masks)
    assert names_in(tmp_path) == ["JPEGImages/1.jpg", "JPEGImages/2.jpg"]
    assert len(find_images(str(tmp_path / "SegmentationClass"), None, 0)) == 1


@pytest.mark.parametrize("folder", ["masks", "train_masks", "Labels", "ground_truth", "gtFine/val", "masks_png"])
def test_a_folder_of_masks_beside_images_is_refused_by_name(tmp_path, folder):
    write_images(tmp_path, "images/1.png", "images/2.png", f"{folder}/1.png")
    place = tmp_path / folder.partition("/")[0]
    for find in (lambda: names_in(tmp_path), lambda: find_items(str(tmp_path), None, 0, frames=1)):
        with pytest.raises(UserError, match=f"{place}: holds masks or the like .* such as images/1.png; give the"):
            find()
    assert names_in(tmp_path / "images") == ["1.png", "2.png"]


def test_a_folder_of_masks_beside_clips_is_refused_by_name(tmp_path):
    write_images(tmp_path, *(f"{folder}/{i}.png" for folder in ("clip", "masks") for i in range(2)))
    with pytest.raises(UserError, match="masks: holds masks or the like by its name"):
        find_items(str(tmp_path), None, 0, frames=2)
    assert len(find_items(str(tmp_path / "clip"), None, 0)) == 2
    write_images(tmp_path / "clip", "masks/0.png", "masks/1.png")
    with pytest.raises(UserError, match="clip/masks: holds masks or the like by its name"):
        find_items(str(tmp_path / "clip"), None, 0, frames=2)


@pytest.mark.parametrize("name", ["cat (1)_mask.png", "cat (1)_mask_1.png", "cat (1)-gt.png"])
def test_a_mask_beside_its_image_is_refused_by_name(tmp_path, name):
    write_images(tmp_path, "cat (1).png", name)
    with pytest.raises(UserError, match=r"by its name a mask or the like of cat \(1\) in the same folder; move masks"):
        names_in(tmp_path)


def test_images_of_people_with_masks_are_images(tmp_path):
    names = ["mask_1.jpg", "man_with_mask.jpg", "unmasked/1.jpg", "unmasked/masked.jpg"]
    write_images(tmp_path, *names)
    assert names_in(tmp_path) == names[1::-1] + names[2:]
    write_images(tmp_path / "faces", "with_mask/1.jpg", "without_mask/1.jpg")
    assert len(names_in(tmp_path / "faces")) == 2

import json

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import sources
from sam2jq.data.coco import coco_images
from sam2jq.data.loader import find_items
from sam2jq.data.sources import SOURCES, LabeledImage, Source, find_clips, find_images, find_samples, source_of
from sam2jq.errors import UserError


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

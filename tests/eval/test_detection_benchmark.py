import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli import evaluate as command
from sam2jq.config.run import EvaluateConfig, ModelConfig
from sam2jq.data.detections import find_detections
from sam2jq.errors import UserError
from sam2jq.eval.detection_benchmark import NAMES, evaluate_detections
from sam2jq.report import text

SIDE = 64  # pixels, of images and of the model
NANO = ModelConfig(name="nano")


class Boxes:
    """A predictor whose masks are the boxes of its prompts. These are multiples of 4 pixels, and so are its masks."""

    image_size = SIDE

    def encode(self, images):
        return []

    def decode(self, features, prompts, mask_input, multimask):
        grid = np.arange(SIDE // 4) * 4 + 2
        (x0, y0), (x1, y1) = np.moveaxis(prompts[0], 0, -1)[..., None]
        inside = lambda low, high: (grid > low) & (grid < high)
        masks = inside(y0, y1)[:, :, None] & inside(x0, x1)[:, None]
        return SimpleNamespace(masks=np.where(masks, 1.0, -1.0)[:, None], ious=np.ones((len(masks), 1)))


def square(x: int, y: int, side: int = 12) -> list[int]:
    return [x, y, side, side]


def instance(id: int, image: int, box: list[int], category: int = 3, **fields) -> dict:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    found = {"id": id, "image_id": image, "category_id": category, "segmentation": [polygon], "bbox": box}
    return found | {"area": w * h, "iscrowd": 0} | fields


def box(image: int, at: list[int], score: float = 0.5, category: int = 3, **fields) -> dict:
    return {"image_id": image, "category_id": category, "bbox": at, "score": score} | fields


INSTANCES = [instance(0, 1, square(8, 8)), instance(1, 2, square(40, 20)), instance(2, 2, square(4, 40), 5)]
RIGHT = [box(1, square(8, 8)), box(2, square(40, 20)), box(2, square(4, 40), category=5)]


@pytest.fixture
def root(tmp_path) -> Path:
    pytest.importorskip("pycocotools")
    (tmp_path / "val").mkdir()
    for name in "abc":
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"val/{name}.png")
    write(tmp_path)
    return tmp_path


def write(root: Path, instances=INSTANCES, name: str = "instances_val.json", **image_fields) -> None:
    size = {"height": SIDE, "width": SIDE} | image_fields
    images = [{"id": i, "file_name": f"{letter}.png"} | size for i, letter in enumerate("abc", 1)]
    categories = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": instances, "categories": categories}
    (root / "annotations" / name).write_text(json.dumps(content))


def ap_of(root: Path, boxes: list, count: int | None = None, **settings) -> dict:
    file = root / "boxes.json"
    file.write_text(json.dumps(boxes))
    found = find_detections(str(root), str(file), **settings)
    return evaluate_detections(Boxes(), found.images[:count], found)


def test_right_boxes_have_an_ap_of_1(root):
    """Also that of an annotation with the id 0, which pycocotools alone would count as missed."""
    result = ap_of(root, RIGHT)
    assert result["ap"] == dict.fromkeys(NAMES, 1.0) | {"APm": None, "APl": None}
    assert (result["images"], result["boxes"], result["left_out"]) == (3, 3, {})


def test_more_boxes_than_one_batch_keep_their_order(root):
    wrong = [box(1, square(40, 40), 0.1) for _ in range(20)]
    assert ap_of(root, wrong + RIGHT)["ap"]["AP"] == pytest.approx(1)


def test_ap_is_that_of_the_definition(root):
    """Two instances; a wrong mask, then one right mask: recall to 0.5 has precision 0.5, 51 of 101 points."""
    write(root, INSTANCES[:2])
    result = ap_of(root, [box(1, square(44, 44), 0.95), box(1, square(8, 8), 0.9)])
    assert result["ap"]["AP"] == pytest.approx(51 * 0.5 / 101)


def test_boxes_of_images_without_an_instance_are_errors(root):
    write(root, INSTANCES[:1])
    assert ap_of(root, [box(1, square(8, 8), 0.5), box(3, square(8, 8), 0.9)])["ap"]["AP"] == pytest.approx(0.5)


def test_instances_of_other_images_are_not_missed(root):
    assert ap_of(root, RIGHT[:1], count=1)["ap"]["AP"] == pytest.approx(1)
    assert ap_of(root, RIGHT[:1])["ap"]["AP"] < 1


def test_an_unreadable_image_is_named_and_not_scored(root):
    (root / "val/b.png").write_bytes(b"")
    result = ap_of(root, RIGHT)
    assert result["ap"]["AP"] == pytest.approx(1)
    assert [Path(name).name for name in result["left_out"]] == ["b.png"]


def test_missing_images_are_refused_or_left_out(root):
    (root / "val/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png.*set allow_missing to 1"):
        ap_of(root, RIGHT)
    assert ap_of(root, RIGHT, allow_missing=1)["ap"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({}, "COCO's results format"),
        ([], "COCO's results format"),
        ([{"bbox": [0, 0, 1, 1]}], "box 0 must have bbox, category_id, image_id, score"),
        ([box(1, [0, 0, 1])], "bbox"),
        ([box(1, [0, 0, 0, 4])], "above 0"),
        ([box(1, [0, 0, float("nan"), 4])], "bbox"),
        ([box(1, square(0, 0), score="high")], "score 'high'"),
        ([box([1], square(0, 0))], "image_id"),
        ([box(9, square(0, 0))], "image 9 is in none"),
        ([box(1, square(0, 0), category=4)], "category 4"),
    ],
)
def test_bad_boxes_are_refused(root, boxes, message):
    with pytest.raises(UserError, match=message):
        ap_of(root, boxes)


def test_annotations_that_give_no_right_ap_are_refused(root):
    write(root, [{k: v for k, v in INSTANCES[0].items() if k != "area"}])
    with pytest.raises(UserError, match="annotation 0 has no area"):
        ap_of(root, RIGHT[:1])
    write(root, neg_category_ids=[5])
    with pytest.raises(UserError, match="LVIS"):
        ap_of(root, RIGHT)
    write(root)
    write(root, name="instances_all.json")
    with pytest.raises(UserError, match="leave one of them there"):
        ap_of(root, RIGHT)


def test_the_command_writes_and_prints_ap(root, monkeypatch):
    (root / "boxes.json").write_text(json.dumps(RIGHT))
    monkeypatch.setattr(command, "load_image_predictor", lambda config, place: (Boxes(), None))
    results = command.evaluate(EvaluateConfig(NANO, data=str(root), boxes=str(root / "boxes.json")), root)
    assert results["ap"]["AP"] == pytest.approx(1)
    assert text.scores(results).splitlines()[:4] == ["AP          1.0000", "AP50        1.0000", "AP75        1.0000",
                                                      "APs         1.0000"]  # fmt: skip


def test_boxes_are_for_images_only():
    with pytest.raises(UserError, match="boxes: task vos takes no boxes"):
        EvaluateConfig(NANO, task="vos", data="sa-v", boxes="boxes.json")

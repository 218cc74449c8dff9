import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.coco import coco_images, read_instances
from sam2jq.data.coco_masks import encode_mask, encode_runs, run_lengths, run_text
from sam2jq.errors import UserError

SIZE = (20, 30)
SQUARE = [[5, 4, 11, 4, 11, 8, 5, 8]]  # x 5..10, y 4..7


def random_mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(SIZE) < 0.5


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of false, true, false, ... down the columns."""
    pixels = mask.T.ravel()
    edges = np.flatnonzero(np.diff(pixels, prepend=False)) if pixels.any() else []
    return np.diff([0, *edges, pixels.size]).tolist()


def rle(mask: np.ndarray, compressed: bool = False) -> dict:
    if not compressed:
        return {"size": list(mask.shape), "counts": runs_of(mask)}
    codec = pytest.importorskip("pycocotools.mask")
    encoded = codec.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def annotation(segmentation, **fields) -> dict:
    default = {"id": 7, "image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": [5, 4, 6.5, 4]}
    return default | {"segmentation": segmentation} | fields


def write_json(root: Path, annotations: list[dict], names=("a.jpg", "b.jpg"), file: str = "instances_val.json") -> None:
    content = {
        "images": [
            {"id": id, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for id, name in enumerate(names, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / file).write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("val/b.jpg", "val/a.jpg", "val/deep/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)
    return tmp_path


def instances(root: Path, *annotations: dict) -> list:
    write_json(root, list(annotations))
    (image,) = coco_images(str(root))
    return read_instances(image)


@pytest.mark.parametrize("bbox", [[1, 0, 28.5, 20], None, [0, 0, 0, 0], "none", [1, 2, 3], [float("nan")] * 4])
def test_an_instance_has_the_mask_its_box_and_the_category_of_its_annotation(root, bbox):
    """The annotated box is not read: some datasets have corners there, or nothing of use."""
    (instance,) = instances(root, annotation(rle(random_mask()), category_id=5, bbox=bbox))
    assert instance.image == str(root / "val/a.jpg")
    assert (instance.category, instance.id) == ("dog", 7)
    assert (instance.mask.dtype, instance.box.dtype) == (bool, np.float32)
    np.testing.assert_array_equal(instance.mask, random_mask())
    y, x = np.nonzero(random_mask())
    np.testing.assert_array_equal(instance.box, [x.min(), y.min(), x.max() + 1, y.max() + 1])


@pytest.mark.parametrize("entry", [{"height": None}, {"width": "30"}, {"height": 20.5}, {"width": float("nan")}])
def test_an_image_without_a_size_is_named(root, entry):
    write_json(root, [annotation(SQUARE)])
    path = next((root / "annotations").glob("*.json"))
    content = json.loads(path.read_text())
    content["images"][0] |= entry
    path.write_text(json.dumps(content))
    key, value = next(iter(entry.items()))
    with pytest.raises(UserError, match=rf"image 1 \(a.jpg\) has .*{key} {value!r}.*: give whole numbers of pixels"):
        coco_images(str(root))


def test_a_size_may_be_written_with_a_point(root):
    write_json(root, [annotation(SQUARE)])
    path = next((root / "annotations").glob("*.json"))
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": float(SIZE[0]), "width": float(SIZE[1])}
    path.write_text(json.dumps(content))
    assert coco_images(str(root))[0].size == SIZE


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "mask", [random_mask(), np.ones(SIZE, bool), np.eye(*SIZE, dtype=bool), np.arange(600).reshape(SIZE) == 599]
)
def test_run_lengths_decode_to_the_encoded_mask(root, mask, compressed):
    (instance,) = instances(root, annotation(rle(mask, compressed), bbox=None))
    np.testing.assert_array_equal(instance.mask, mask)


def test_polygons_are_filled_as_one_mask(root):
    pytest.importorskip("pycocotools")
    square = np.zeros(SIZE, bool)
    square[4:8, 5:11] = True
    other = np.zeros(SIZE, bool)
    other[0:3, 20:25] = True
    one, both = instances(
        root,
        annotation(SQUARE),
        annotation([*SQUARE, [20, 0, 25, 0, 25, 3, 20, 3]], id=8),
    )
    np.testing.assert_array_equal(one.mask, square)
    np.testing.assert_array_equal(both.mask, square | other)


def test_crowds_and_empty_masks_are_left_out(root):
    pytest.importorskip("pycocotools")
    empty = [rle(np.zeros(SIZE, bool)), [], [[3, 3, 3, 3, 3, 3]]]
    kept = instances(
        root,
        annotation(rle(random_mask()), id=1, iscrowd=1),
        annotation(SQUARE, id=2),
        *(annotation(segmentation, id=3 + i) for i, segmentation in enumerate(empty)),
    )
    assert [instance.id for instance in kept] == [2]


def test_images_with_an_instance_are_found_anywhere_below_the_root(root):
    crowd = annotation(SQUARE, image_id=3, iscrowd=1)
    others = [
        annotation(SQUARE, image_id=2, id=1),
        annotation(SQUARE, image_id=1),
        annotation(SQUARE, image_id=2, id=2),
    ]
    write_json(root, [*others, crowd], ["./deep/c.jpg", "val/a.jpg", "gone.jpg"])
    write_json(root, [annotation(SQUARE, image_id=1)], ["b.jpg"], "instances_more.json")
    (root / "annotations/captions_val.json").write_text("{}")
    images = coco_images(str(root))
    assert [Path(image.path).relative_to(root).as_posix() for image in images] == [
        "val/a.jpg",
        "val/b.jpg",
        "val/deep/c.jpg",
    ]
    assert [[each["id"] for each in image.annotations] for image in images] == [[1, 2], [7], [7]]


def test_real_instances_have_the_area_and_box_that_coco_states(shared):
    """The median mask is within 1% of the area and 1 pixel of the box: both were measured on the polygon."""
    images = coco_images(str(shared / "data/coco"))
    assert (len(images), sum(len(image.annotations) for image in images)) == (128, 887)
    areas, boxes = [], []
    for image in images[:32]:
        for given, instance in zip(image.annotations, read_instances(image), strict=True):
            areas.append(abs(instance.mask.sum() / given["area"] - 1))
            x, y, width, height = given["bbox"]
            boxes.append(np.abs(instance.box - [x, y, x + width, y + height]).max())
    assert np.median(areas) < 0.01
    assert np.median(boxes) < 1


@pytest.mark.parametrize("mask", [random_mask(), np.zeros(SIZE, bool), np.ones(SIZE, bool), np.eye(*SIZE, dtype=bool)])
def test_masks_are_encoded_as_by_pycocotools(mask):
    assert encode_mask(mask) == rle(mask, compressed=True)
    assert encode_runs(mask) == runs_of(mask)


def test_long_runs_are_encoded_as_text_that_is_read_back():
    runs = [0, 3, 70_000, 1, 2, 33_000_000, 16, 15, 31, 32, 0]
    assert run_lengths(run_text(runs)) == runs


def test_real_run_lengths_decode_as_in_pycocotools(shared):
    codec = pytest.importorskip("pycocotools.mask")
    from sam2jq.data.coco import decode_mask

    content = json.loads((shared / "data/sa-v/annotations/sav_000001_manual.json").read_text())
    for given in content["masklet"][0]:
        np.testing.assert_array_equal(decode_mask(given, tuple(given["size"])), codec.decode(given))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 31], "counts": [620]}, "its mask has 31 x 20 pixels, but the image 30 x 20"),
        ({"size": [20, 30], "counts": [300, 200]}, "run lengths cover 500 pixels, but the mask has 600"),
        ({"size": [20, 30], "counts": [700, -100]}, "run lengths must be whole numbers that are not negative"),
        ({"size": [20, 30], "counts": ""}, "run lengths cover 0 pixels"),
        ({"size": [20, 30], "counts": "é~"}, "run lengths"),
        ({"size": [20, 30], "counts": ["6"]}, "run lengths must be whole numbers"),
        ({"size": [20, 30]}, "neither polygons nor run lengths"),
        (None, "neither polygons nor run lengths"),
        ([1, 2, 3], "one flat list .*; put it into a list of polygons"),
        ([1, [2, 3]], "must be lists of numbers"),
        ([[0.1, 0.2, 0.9, 0.2, 0.9, 1]], "its polygons lie within 0..1; give pixels"),
        ([[-0.0005, 0.2, 1.0003, 0.2, 0.9, 1]], "its polygons lie within 0..1; give pixels"),
        ({"size": [20, 30], "counts": [10**30]}, "run lengths cover 1000000000000000000000000000000 pixels"),
        ({"size": [20, 30], "counts": [10**30, 600 - 10**30]}, "run lengths must be whole numbers"),
        ({"size": [20, 30], "counts": [300.5, 299.5]}, "run lengths must be whole numbers"),
        ([[[5, 4], [11, 4], [11, 8], [5, 8]]], "lists of numbers, .*, not of pairs"),
        ([[2, 2, 8, 8]], "a polygon has 4 numbers; .* of 3 points"),
        ([*SQUARE, [2, 2, 8, 8]], "a polygon has 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon has 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "x and y, finite"),
        ([[1, 2, 3, 4, 5, "6"]], "x and y, finite"),
        ("polygons", "neither polygons nor run lengths"),
    ],
)
def test_a_broken_segmentation_is_an_error(root, segmentation, message):
    with pytest.raises(ValueError, match=f"a.jpg: annotation 7 is not readable: .*{message}") as raised:
        instances(root, annotation(segmentation))
    assert "annotations/instances_val.json" in str(raised.value)


def test_an_image_of_another_size_than_its_annotations_is_an_error(root):
    Image.new("RGB", (15, 10)).save(root / "val/a.jpg")
    with pytest.raises(ValueError, match="a.jpg: 15 x 10 pixels, but its annotations are for 30 x 20"):
        instances(root, annotation(SQUARE))


@pytest.mark.parametrize(
    ("annotations", "names", "message"),
    [
        ([annotation(SQUARE)], ["gone.jpg"], "instances_val.json: 1 of 1 images .* do not lie below .* gone.jpg; put"),
        (
            [annotation(SQUARE), annotation(SQUARE, image_id=2, id=8)],
            ["a.jpg", "val/a.jpg"],
            "val/a.jpg is listed twice",
        ),
        ([{"id": 4, "image_id": 1}], ["a.jpg"], "annotation 4 lacks category_id, segmentation"),
        ([annotation(SQUARE, category_id=4)], ["a.jpg"], "annotation 7 has no category: 4 is none; add the category"),
        ([annotation(SQUARE, category_id="3")], ["a.jpg"], "no category: '3' is none; .* is 3: write it alike"),
        ([annotation(SQUARE, image_id="1")], ["a.jpg"], "annotation 7 has no image: '1' is none; .* is 1: write"),
        ([annotation(SQUARE, image_id=9)], ["a.jpg"], "annotation 7 has no image: 9 is none; add the image or remove"),
        ([annotation(SQUARE, iscrowd="0")], ["a.jpg"], "annotation 7 has iscrowd '0'; it must be 0 or 1, a number"),
        ([annotation(SQUARE)] * 2, ["a.jpg"], "instances_val.json: annotation 7 is there twice .1 ids are.; give each"),
        ([annotation(SQUARE)], ["val\\a.jpg"], "instances_val.json: .* holds a backslash; write / .* 'val/a.jpg'"),
        ([annotation(SQUARE)], [5], "instances_val.json: image 1 has no file_name"),
        ([5], ["a.jpg"], "not in COCO's format for instances"),
        ([], ["a.jpg"], "no image with an instance"),
    ],
)
def test_a_json_that_does_not_fit_the_images_is_an_error(root, annotations, names, message):
    write_json(root, annotations, names)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        coco_images(str(root))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("a.txt", "", FileNotFoundError, "annotations: no such folder; give a COCO folder"),
        ("annotations/captions.json", "{}", FileNotFoundError, "annotations: holds no instances.*json"),
        ("annotations/instances.json", "{", ValueError, "instances.json: broken json"),
        (
            "annotations/instances.json",
            "{}",
            ValueError,
            "instances.json: not in COCO's format .*'categories', 'images'",
        ),
        ("annotations/instances.json", '{"a": 1, "a": 1}', ValueError, "instances.json: the key 'a' is there twice"),
        ("annotations/instances.json", "[]", ValueError, "instances.json: not in COCO's format"),
    ],
)
def test_a_folder_that_is_not_coco_is_an_error(tmp_path, file, content, error, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(error, match=message):
        coco_images(str(tmp_path))


def test_polygons_without_pycocotools_say_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"polygons need the extra eval: pip install 'sam2jq\[eval\]'"):
        instances(root, annotation(SQUARE))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


@pytest.mark.parametrize("part", ["images", "categories"])
def test_one_id_for_two_things_is_an_error(root, part):
    instances(root, annotation(SQUARE))
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content[part].append(content[part][0] | ({"name": "another"} if part == "categories" else {"file_name": "b.jpg"}))
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val.json: \w+ \d is there twice"):
        coco_images(str(root))

"""Boxes of a detector, in COCO's results format, for the images of one json of a COCO folder."""

import math
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco import check_missing, has_instances, instance_files, listed_images, names_and_size
from sam2jq.data.listed import coco_root, find_image, index_images, read_json
from sam2jq.errors import UserError, few

FIELDS = {"image_id", "category_id", "bbox", "score"}


class DetectedImage(NamedTuple):
    """boxes: float32 [N, 2, 2], x0 y0 and x1 y1 in pixels, of N detections; N may be 0."""

    id: int
    path: str
    size: tuple[int, int]
    boxes: np.ndarray
    scores: list[float]
    categories: list[int]


class Detections(NamedTuple):
    """images: also those without detections, sorted by path; content: of the json `file` with the instances."""

    images: list[DetectedImage]
    content: dict
    file: Path


def find_detections(root: str, boxes: str, allow_missing: int = 0) -> Detections:
    """The images of a COCO folder with the boxes in the file `boxes`: [{image_id, category_id, bbox, score}, ...].

    bbox is x, y, width and height in pixels. The json of the folder is the one that lists all images of the boxes.
    Raises UserError if none or several do, a box is invalid or pycocotools is missing, FileNotFoundError if more than
    `allow_missing` images are missing.
    """
    if find_spec("pycocotools") is None:
        raise UserError("a detector's boxes need the extra eval: pip install 'sam2jq[eval]'")
    found, folder = read_boxes(Path(boxes)), coco_root(Path(root), has_instances)
    file, content = json_of(boxes, found, instance_files(folder))
    check_categories(boxes, found, file, content)
    index, images, missing = index_images(folder), [], []
    for entry in content["images"]:
        names, size = names_and_size(file, entry)
        if path := find_image(index, names, file):
            images.append(detected_image(entry["id"], str(path), size, found.get(entry["id"], [])))
        else:
            missing.append(names[0])
    check_missing({file: missing}, allow_missing)
    return Detections(sorted(images, key=lambda image: image.path), content, file)


def json_of(boxes: str, found: dict[int, list[dict]], files: list[Path]) -> tuple[Path, dict]:
    """The json of `files` that lists all images of the boxes, and its content."""
    contents = {file: read_json(file) for file in files}
    for file, content in contents.items():
        listed_images(file, content)  # raises an error if an annotation is invalid
    ids = {file: {entry["id"] for entry in content["images"]} for file, content in contents.items()}
    fits = [file for file, known in ids.items() if found.keys() <= known]
    if not fits:
        unknown = sorted(map(str, found.keys() - set().union(*ids.values())))
        way_out = f"image {few(unknown, 3)} is in none" if unknown else "give the boxes of one json"
        raise UserError(f"{boxes}: no json lists all images of these boxes ({few(files)}): {way_out}")
    if len(fits) > 1:
        raise UserError(f"{boxes}: {few(fits)} all list the images of these boxes: leave one of them there")
    check_for_ap(fits[0], contents[fits[0]])
    return fits[0], contents[fits[0]]


def detected_image(id: int, path: str, size: tuple[int, int], boxes: list[dict]) -> DetectedImage:
    """An image with its boxes, as COCO's results format has them."""
    corners = [[[x, y], [x + width, y + height]] for x, y, width, height in (each["bbox"] for each in boxes)]
    scores, categories = [float(each["score"]) for each in boxes], [each["category_id"] for each in boxes]
    return DetectedImage(id, path, size, np.array(corners, np.float32).reshape(-1, 2, 2), scores, categories)


def read_boxes(path: Path) -> dict[int, list[dict]]:
    """{id of the image: its boxes}. Raises UserError if the file is not in COCO's results format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the json with a detector's boxes")
    content, by_image = read_json(path), defaultdict(list)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: not in COCO's results format, a list of {', '.join(sorted(FIELDS))}")
    for i, each in enumerate(content):
        if not isinstance(each, dict) or FIELDS - each.keys():
            raise UserError(f"{path}: box {i} must have {', '.join(sorted(FIELDS))}, as in COCO's results format")
        check_box(f"{path}: box {i}", each)
        by_image[each["image_id"]].append(each)
    return dict(by_image)


def check_box(where: str, each: dict) -> None:
    """Raises UserError that begins with `where` if an entry has no valid box, score or ids."""
    finite = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    box = each["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(finite, box)) and min(box[2:]) > 0):
        raise UserError(f"{where} has bbox {box!r}; it must be x, y, width and height in pixels, the latter above 0")
    if not finite(each["score"]):
        raise UserError(f"{where} has score {each['score']!r}; it must be a number")
    for key in ("image_id", "category_id"):
        if not isinstance(each[key], int | str):
            raise UserError(f"{where} has {key} {each[key]!r}; it must be an id of the json with the instances")


def check_categories(boxes: str, found: dict[int, list[dict]], file: Path, content: dict) -> None:
    """Raises UserError if a box has a category that the json with the instances does not list."""
    known = {category["id"] for category in content["categories"]}
    for each in (each for of_image in found.values() for each in of_image):
        if each["category_id"] not in known:
            raise UserError(
                f"{boxes}: a box in image {each['image_id']} has category {each['category_id']!r}, which {file} does "
                "not list"
            )


def check_for_ap(file: Path, content: dict) -> None:
    """Raises UserError if COCO's evaluator gives a wrong score or none for the annotations of a json."""
    if any("neg_category_ids" in entry for entry in content["images"]):
        raise UserError(f"{file}: LVIS annotates only some categories of an image, which COCO's evaluator would count "
                        "as errors; give COCO's annotations")  # fmt: skip
    for annotation in content["annotations"]:
        if lacking := [key for key in ("area", "iscrowd") if key not in annotation]:
            raise UserError(f"{file}: annotation {annotation['id']} has no {lacking[0]}, which COCO's evaluator needs")

"""Instance masks in the COCO layout: ROOT/annotations/instances*.json, images anywhere below ROOT."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.images import check_relative_path, image_size, images_by_ending, read_json
from sam2jq.errors import UserError

FIELDS = {"id", "image_id", "category_id", "segmentation", "bbox"}


class CocoImage(NamedTuple):
    """size: (H, W) in pixels; annotations: as in the json, without crowds; categories: {id: name}."""

    path: str
    size: tuple[int, int]
    annotations: list[dict]
    categories: dict[int, str]


class Instance(NamedTuple):
    """mask: bool [H, W], never empty; box: float32 [4], x0 y0 x1 y1 in pixels, as annotated."""

    image: str
    mask: np.ndarray
    box: np.ndarray
    category: str
    id: int


def coco_images(root: str) -> list[CocoImage]:
    """The images with at least one instance, sorted by path; `read_instances` decodes their masks.

    Raises FileNotFoundError or UserError if a json or an image is missing or invalid.
    """
    files = instance_files(Path(root))
    index = images_by_ending(Path(root))
    images = {}
    for file in files:
        listed = listed_images(file)
        missing = [image.path for image in listed if image.path not in index]
        if missing:
            raise FileNotFoundError(
                f"{file}: {len(missing)} of {len(listed)} images with instances do not lie below {root}, "
                f"such as {missing[0]}; put them there or move the json away"
            )
        for image in listed:
            path = str(index[image.path])
            if path in images:
                raise UserError(f"{file}: {image.path} is listed twice, here or in another json; leave only one")
            images[path] = image._replace(path=path)
    if not images:
        raise UserError(f"{', '.join(map(str, files))}: no image with an instance")
    return [images[path] for path in sorted(images)]


def instance_files(root: Path) -> list[Path]:
    """The annotations/instances*.json of a COCO folder. Raises FileNotFoundError if there is none."""
    folder = root / "annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a COCO folder: annotations/instances*.json and images")
    files = sorted(folder.glob("instances*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no instances*.json, the annotations with masks; put it there")
    return files


def listed_images(file: Path) -> list[CocoImage]:
    """The images of one json file with at least one instance; `path` is the "file_name" in the file."""
    content = read_json(file)
    try:
        categories = {category["id"]: category["name"] for category in content["categories"]}
        instances = [annotation for annotation in content["annotations"] if not annotation.get("iscrowd")]
        images = {entry["id"]: name_and_size(file, entry) for entry in content["images"]}
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not in COCO's format for instances ({error!r}); download it again") from error
    by_image = defaultdict(list)
    for annotation in instances:
        check_fields(file, annotation, categories)
        by_image[annotation["image_id"]].append(annotation)
    return [CocoImage(*images[id], by_image[id], categories) for id in images if id in by_image]


def name_and_size(file: Path, entry: dict) -> tuple[str, tuple[int, int]]:
    """The path and the (H, W) of an entry of "images". Raises UserError if the path leads out of the folder."""
    return check_relative_path(entry["file_name"], file), (int(entry["height"]), int(entry["width"]))


def check_fields(file: Path, annotation: dict, categories: dict[int, str]) -> None:
    """Raises UserError if an annotation lacks a field or its category is unknown."""
    if missing := FIELDS - annotation.keys():
        raise UserError(f"{file}: annotation {annotation.get('id')} lacks {', '.join(sorted(missing))}")
    if annotation["category_id"] not in categories:
        raise UserError(f"{file}: annotation {annotation['id']} has no category: {annotation['category_id']} is none")


def read_instances(image: CocoImage) -> list[Instance]:
    """The instances of an image with a non-empty mask. Raises UserError if the image has another size than listed."""
    size = image_size(image.path)
    if size != image.size:
        raise UserError(
            f"{image.path}: {size[1]} x {size[0]} pixels, but its annotations are for {image.size[1]} x {image.size[0]}"
        )
    instances = [read_instance(image, annotation) for annotation in image.annotations]
    return [instance for instance in instances if instance.mask.any()]


def read_instance(image: CocoImage, annotation: dict) -> Instance:
    """One annotation with its mask decoded."""
    try:
        mask = decode_mask(annotation["segmentation"], image.size)
        x, y, width, height = annotation["bbox"]
        box = np.array([x, y, x + width, y + height], np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{image.path}: annotation {annotation['id']} is not readable: {error}") from error
    return Instance(image.path, mask, box, image.categories[annotation["category_id"]], annotation["id"])


def decode_mask(segmentation, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] from polygons [[x, y, x, y, ...], ...], or from run lengths as a list or as COCO's string."""
    match segmentation:
        case [*polygons]:
            return fill_polygons(polygons, size)
        case {"size": [height, width]} if (height, width) != size:
            raise UserError(f"its mask has {width} x {height} pixels, but the image {size[1]} x {size[0]}")
        case {"size": _, "counts": [*runs]}:
            return decode_runs(runs, size)
        case {"size": _, "counts": str(text)}:
            return decode_runs(run_lengths(text), size)
    raise UserError("its segmentation is neither polygons nor run lengths with a size")


def fill_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], the union of the polygons. Polygons of two points are skipped: pycocotools reads them as boxes."""
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise UserError("polygons need the extra eval: pip install 'sam2jq[eval]'") from error
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        return np.zeros(size, bool)
    return mask.decode(mask.merge(mask.frPyObjects(polygons, *size))).astype(bool)


def decode_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] from run lengths of false, true, false, ... in column-major order.

    pycocotools is not used, because it leaves pixels uninitialized if the runs do not fill the mask. Raises UserError
    then.
    """
    if sum(runs) != size[0] * size[1] or min(runs) < 0:
        raise UserError(f"its run lengths cover {sum(runs)} pixels, but the mask has {size[0] * size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def run_lengths(text: str) -> list[int]:
    """The run lengths in COCO's string: 5 bits per character, lowest first, a continuation bit, and a sign.

    From the fourth on, a number is stored as the difference to the one two places before.
    """
    runs, value, shift = [], 0, 0
    for code in text.encode():
        value += (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            value -= (code - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs

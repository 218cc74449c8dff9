"""Instance masks in COCO's format, as COCO, LVIS and Roboflow lay them out.

ROOT/annotations/instances*.json, lvis*.json     with images anywhere below ROOT; other names only without these
ROOT/annotations_trainval2017/annotations/...    the same, as COCO's archive unpacks into a folder of its own
ROOT/lvis*.json, instances*.json                 the same
ROOT/<split>/_annotations.coco.json              of Roboflow, with the images beside; also in ROOT itself

ROOT may also be a folder that holds only one such folder.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco_masks import check_mask, decode_mask
from sam2jq.data.folders import subfolders
from sam2jq.data.images import check_size, image_size
from sam2jq.data.listed import (
    ImageIndex,
    annotation_files,
    check_ids,
    coco_root,
    find_image,
    image_names,
    index_images,
    read_json,
)
from sam2jq.errors import UserError, few

PARTS = ("categories", "images", "annotations")
FIELDS = {"id", "image_id", "category_id", "segmentation"}
PATTERNS = ("instances*.json", "lvis*.json")
ROBOFLOW = "_annotations.coco.json"


class CocoImage(NamedTuple):
    """size: (H, W) in pixels; annotations: as in `file`, without crowds; categories: {id: name}."""

    path: str
    size: tuple[int, int]
    annotations: list[dict]
    categories: dict[int, str]
    file: Path


class Instance(NamedTuple):
    """mask: bool [H, W], never empty; box: float32 [4], x0 y0 x1 y1 in pixels, of the mask.

    The annotated "bbox" is not read: datasets have boxes of other kinds there, such as corners, or none.
    """

    image: str
    mask: np.ndarray
    box: np.ndarray
    category: str
    id: int


class CocoFolder(NamedTuple):
    """images: those with an instance, sorted by path. missing: {json: names of its images that are not there}.

    notes: a line on every json that is left out, and on those that are taken together.
    """

    images: list[CocoImage]
    missing: dict[Path, list[str]]
    notes: list[str]


def coco_images(root: str) -> list[CocoImage]:
    """The images of `find_coco`. Raises FileNotFoundError if an image is missing."""
    folder = find_coco(root)
    check_missing(folder.missing, 0)
    return folder.images


def check_missing(missing: dict[Path, list[str]], allowed: int) -> None:
    """Raises FileNotFoundError if more than `allowed` files are missing; missing: {json: names of its images}.

    Also {image: [name of its json]}, in SA-1B's layout.
    """
    names = [name for each in missing.values() for name in each]
    if len(names) > allowed:
        jsons = sum(name.endswith(".json") for name in names)
        parts = {"images with instances": len(names) - jsons, "json files of images": jsons}
        raise FileNotFoundError(
            f"{few(missing)}: {' and '.join(f'{count} {part}' for part, count in parts.items() if count)} are missing, "
            f"or lie only in a folder of another split, such as {names[0]}; put them there, or set allow_missing to "
            f"{len(names)} to leave them out"
        )


def find_coco(root: str) -> CocoFolder:
    """The images of a folder with at least one instance; `read_instances` decodes their masks.

    A json is left out if none of its images is there and another json has some.
    Raises FileNotFoundError or UserError if there is no image, or a json is missing or invalid.
    """
    folder = coco_root(Path(root), has_instances)
    files, index = instance_files(folder), index_images(folder)
    found = {file: locate(file, index) for file in files}
    if not any(present or absent for present, absent in found.values()):
        raise UserError(f"{', '.join(map(str, files))}: no image with an instance")
    empty = [file for file, (present, absent) in found.items() if absent and not present]
    if not any(present for present, _ in found.values()):
        names = found[empty[0]][1]
        raise FileNotFoundError(
            f"{empty[0]}: {len(names)} of {len(names)} images with instances do not lie below {root}, or only in a "
            f"folder of another split, such as {names[0]}; put them there"
        )
    images: dict[str, CocoImage] = {}
    for file, (present, _) in found.items():
        for image in present:
            if image.path in images:
                raise UserError(f"{file}: {image.path} is listed twice, here or in another json; leave only one")
            images[image.path] = image
    missing = {file: absent for file, (_, absent) in found.items() if absent and file not in empty}
    notes = [f"{file}: none of its {len(found[file][1])} images is there, this file is left out" for file in empty]
    taken = [str(file) for file in files if found[file][0]]
    notes += [f"the images of {few(taken)} are taken together"] if len(taken) > 1 else []
    return CocoFolder([images[path] for path in sorted(images)], missing, notes)


def locate(file: Path, index: ImageIndex) -> tuple[list[CocoImage], list[str]]:
    """The images of one json file with at least one instance, and the names of those that are missing."""
    present, absent = [], []
    for names, image in listed_images(file):
        path = find_image(index, names, file)
        if path is None:
            absent.append(names[0])
        else:
            present.append(image._replace(path=str(path)))
    return present, absent


def is_coco(root: Path) -> bool:
    """Whether a folder, or the only one in it that may, holds json files in COCO's format, by their names."""
    return has_instances(coco_root(root, has_instances))


def has_instances(root: Path) -> bool:
    """Whether a folder holds a folder annotations with json files, or json files as `beside_images` finds them."""
    return root.is_dir() and bool(annotation_files(root) or beside_images(root))


def instance_files(root: Path) -> list[Path]:
    """The json files with instances of a COCO folder. Raises FileNotFoundError if there is none."""
    files = [path for pattern in PATTERNS for path in annotation_files(root, pattern)]
    if not files and root.is_dir():
        files = beside_images(root)
    if not files:
        others = [*annotation_files(root), *sorted(root.glob("[!.]*.json"))]
        files = [path for path in others if not missing_parts(read_json(path))]
    if not files and not (root / "annotations").is_dir():
        raise FileNotFoundError(
            f"{root / 'annotations'}: no such folder; give a COCO folder: annotations/instances*.json and images"
        )
    if not files:
        raise FileNotFoundError(
            f"{root / 'annotations'}: holds no instances*.json, the annotations with masks; put it there"
        )
    return files


def beside_images(root: Path) -> list[Path]:
    """The json files with instances that lie in the root or, as Roboflow's, in its folders."""
    files = [path for pattern in PATTERNS for path in sorted(root.glob(pattern))]
    return files + [path for folder in (root, *subfolders(root)) if (path := folder / ROBOFLOW).is_file()]


def missing_parts(content) -> list[str]:
    """Those of PARTS that the content of a json file lacks."""
    return [part for part in PARTS if not isinstance(content, dict) or part not in content]


def listed_images(file: Path, content=None) -> list[tuple[list[str], CocoImage]]:
    """The images of one json file with at least one instance, each after its `image_names`; `path` is the first.

    content: of the file, if it is read already.
    Raises UserError that names the file and the annotation if one is invalid.
    """
    content, by_image = read_json(file) if content is None else content, defaultdict(list)
    if lacking := missing_parts(content):
        raise UserError(
            f"{file}: not in COCO's format for instances, it has no {few(map(repr, lacking))}; download it again"
        )
    try:
        categories = by_id(file, "category", [(entry["id"], entry["name"]) for entry in content["categories"]])
        images = by_id(file, "image", [(entry["id"], names_and_size(file, entry)) for entry in content["images"]])
        for annotation in content["annotations"]:
            if not is_crowd(file, annotation):
                check_annotation(file, annotation, categories, images)
                by_image[annotation["image_id"]].append(annotation)
        check_ids(file, [annotation["id"] for found in by_image.values() for annotation in found])
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not in COCO's format for instances ({error!r}); download it again") from error
    return [
        (names, CocoImage(names[0], size, by_image[id], categories, file))
        for id, (names, size) in images.items()
        if id in by_image
    ]


def by_id(file: Path, what: str, entries: list[tuple[int, object]]) -> dict:
    """{id: content} of `entries`. Raises UserError if two of them have one id and different content."""
    found = {}
    for id, content in entries:
        if found.setdefault(id, content) != content:
            raise UserError(f"{file}: {what} {id} is there twice: {found[id]!r} and {content!r}; give each its own id")
    return found


def names_and_size(file: Path, entry: dict) -> tuple[list[str], tuple[int, int]]:
    """The `image_names` and the (H, W) of an entry of "images". Raises UserError if it has none of them."""
    names = image_names(entry, file)
    if not names:
        raise UserError(f"{file}: image {entry['id']} has no file_name, a text; add it")
    size = [entry.get(key) for key in ("height", "width")]
    if not all(isinstance(side, int) or (isinstance(side, float) and side.is_integer()) for side in size):
        raise UserError(f"{file}: image {entry['id']} ({names[0]}) has height {size[0]!r} and width {size[1]!r}: give "
                        "whole numbers of pixels")  # fmt: skip
    return names, (int(size[0]), int(size[1]))


def is_crowd(file: Path, annotation: dict) -> bool:
    """Whether an annotation is of a crowd, not of one instance. Raises UserError for another value than 0 and 1."""
    crowd = annotation.get("iscrowd")
    if crowd not in (None, 0, 1):
        raise UserError(f"{file}: annotation {annotation.get('id')} has iscrowd {crowd!r}; it must be 0 or 1, a number")
    return bool(crowd)


def check_annotation(file: Path, annotation: dict, categories: dict[int, str], images: dict) -> None:
    """Raises UserError if an annotation lacks a field, its image or category is unknown, or its mask is malformed."""
    if missing := FIELDS - annotation.keys():
        raise UserError(f"{file}: annotation {annotation.get('id')} lacks {', '.join(sorted(missing))}")
    id, image = annotation["id"], annotation["image_id"]
    check_known(file, id, "category", annotation["category_id"], categories)
    check_known(file, id, "image", image, images)
    names, size = images[image]
    check_mask(f"{file}: {names[0]}", id, annotation["segmentation"], size)


def check_known(file: Path, annotation: int, what: str, id, known: dict) -> None:
    """Raises UserError unless `id`, the category or image that an annotation names, is `known`."""
    if id not in known:
        alike = [each for each in known if str(each) == str(id)]
        way_out = f"the id of that {what} is {alike[0]!r}: write it alike" if alike else f"add the {what} or remove it"
        raise UserError(f"{file}: annotation {annotation} has no {what}: {id!r} is none; {way_out}")


def read_instances(image: CocoImage) -> list[Instance]:
    """The instances of an image with a non-empty mask. Raises UserError if the image has another size than listed."""
    check_size(image.path, image_size(image.path), image.size, "its annotations are for")
    instances = [read_instance(image, annotation) for annotation in image.annotations]
    return [instance for instance in instances if instance.mask.any()]


def readable_instances(image: CocoImage) -> tuple[list[Instance], dict[int, str]]:
    """As `read_instances`, and {annotation's id: why it is left out}: its mask is not readable, or empty."""
    check_size(image.path, image_size(image.path), image.size, "its annotations are for")
    instances, left_out = [], {}
    for annotation in image.annotations:
        try:
            instance = read_instance(image, annotation)
        except UserError as error:
            left_out[annotation["id"]] = str(error)
        else:
            if instance.mask.any():
                instances.append(instance)
            else:
                left_out[annotation["id"]] = "its mask is empty"
    return instances, left_out


def read_instance(image: CocoImage, annotation: dict) -> Instance:
    """One annotation with its mask decoded."""
    try:
        mask = decode_mask(annotation["segmentation"], image.size)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(
            f"{image.path}: annotation {annotation['id']} is not readable: {error}; it is in {image.file}"
        ) from error
    return Instance(image.path, mask, box_of(mask), image.categories[annotation["category_id"]], annotation["id"])


def box_of(mask: np.ndarray) -> np.ndarray:
    """float32 [4]: the box x0, y0, x1, y1 of a mask [H, W], with its last pixels included; zeros if it is empty."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1] if len(x) else [0] * 4, np.float32)

"""Instance masks in SA-1B's layout: sa_1.jpg beside sa_1.json, which holds one image's run lengths, in any folder."""

from pathlib import Path

from sam2jq.data.coco import CocoImage
from sam2jq.data.coco_masks import check_mask
from sam2jq.data.folders import images_below, walk
from sam2jq.data.listed import check_ids, read_json
from sam2jq.errors import UserError

CATEGORY = 0  # of every object: SA-1B names none


def is_sa1b(root: Path) -> bool:
    """Whether a folder holds a file sa_*.json, in it or in a folder below it."""
    return root.is_dir() and any(is_annotation(path) for content in walk(root) for path in content)


def is_annotation(path: Path) -> bool:
    return path.name.startswith("sa_") and path.suffix == ".json"


def sa1b_files(root: str) -> tuple[list[Path], dict[Path, list[str]]]:
    """The images with a json beside them, sorted, and {json: [name of the image]} of those whose image is missing.

    Also {image: [name of the json]} of those whose json is missing.
    """
    images: dict[Path, Path] = {}
    for path in images_below(Path(root)):
        if (other := images.setdefault(path.with_suffix(""), path)) != path:
            raise UserError(f"{path}: {other.name} beside it belongs to the same json; remove one of them")
    files = sorted(path for content in walk(Path(root)) for path in content if is_annotation(path))
    found = [images.pop(file.with_suffix("")) for file in files if file.with_suffix("") in images]
    left = {path.with_suffix("") for path in found}
    missing = {file: [f"{file.stem}.jpg"] for file in files if file.with_suffix("") not in left}
    return found, missing | {path: [f"{path.stem}.json"] for path in images.values()}


def sa1b_image(path: Path) -> CocoImage:
    """An image with the annotations in the json beside it. Raises UserError that names it if it is invalid."""
    file = path.with_suffix(".json")
    try:
        content = read_json(file)
        size = int(content["image"]["height"]), int(content["image"]["width"])
        annotations = [{"id": i} | each | {"category_id": CATEGORY} for i, each in enumerate(content["annotations"])]
        for annotation in annotations:
            check_mask(str(file), annotation["id"], annotation["segmentation"], size)
        check_ids(file, [annotation["id"] for annotation in annotations])
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not in SA-1B's format ({error!r}); download it again") from error
    return CocoImage(str(path), size, annotations, {CATEGORY: "object"}, file)

"""Masks written as files: a PNG per object, one palette PNG, COCO's run lengths, or numpy arrays.

Letters: M objects in a frame [H, W]. The names of objects are whole numbers.
"""

import argparse
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2jq.data.coco_masks import encode_mask
from sam2jq.data.masks import write_labels
from sam2jq.data.sav import write_mask
from sam2jq.errors import UserError
from sam2jq.files import ScratchFile, atomic_folder, atomic_write, check_folder_target, check_target
from sam2jq.predictors.crops import width_height

MOST_LABELS = 255  # objects in a palette PNG; 0 is no object


class FrameMasks(NamedTuple):
    """The masks of one frame. labels: the object of each pixel, 0 for none, where masks overlap the one in front."""

    name: str
    masks: np.ndarray  # bool [M, H, W]
    labels: np.ndarray  # int [H, W]


Sink = Callable[[FrameMasks], None]


def add_mask_files(parser: argparse.ArgumentParser, palette: str) -> None:
    parser.add_argument("--masks", metavar="DIR", help="a new folder for a PNG per object, 1 where it is")
    parser.add_argument("--palette", metavar=palette, help="label images: the object of each pixel, as in DAVIS")
    parser.add_argument("--json", metavar="FILE", help="all masks as COCO's run lengths")
    parser.add_argument("--npz", metavar="FILE", help="all masks as numpy arrays")


def check_mask_files(args: argparse.Namespace, palette_is_folder: bool, *inputs: str | None) -> None:
    """Raises UserError if a mask file cannot be written, has the wrong ending, or would replace one of `inputs`.

    Also if two outputs, --out among them, are one file.
    """
    given = {name: getattr(args, name) for name in ("out", "masks", "palette", "json", "npz")}
    flags: dict[Path, str] = {}
    for name, path in given.items():
        if path is not None and (other := flags.setdefault(Path(path).resolve(), name)) != name:
            raise UserError(f"--{name} {path}: --{other} is the same file; give two names")
    for name, ending in (("palette", ".png"), ("json", ".json"), ("npz", ".npz")):
        path = getattr(args, name)
        if path is None or (name == "palette" and palette_is_folder):
            continue
        if check_target(path, *inputs).suffix.lower() != ending:
            raise UserError(f"--{name} {path}: give a name that ends in {ending}")
    for path in (args.masks, args.palette if palette_is_folder else None):
        if path is not None:
            check_folder_target(path)


def labels_of(objects: list[int], scores: np.ndarray) -> np.ndarray:
    """int [H, W]: the object with the highest score above 0 in `scores` [M, H, W] of each pixel, else 0."""
    if not objects:
        return np.zeros(scores.shape[1:], int)
    return np.where(scores.max(0) > 0, np.array(objects)[scores.argmax(0)], 0)


def check_palette(path: str, objects: Iterable[int]) -> None:
    """Raises UserError if a palette image cannot hold one of the objects."""
    if max(objects, default=0) > MOST_LABELS:
        raise UserError(f"--palette {path}: object {max(objects)}, but a palette has {MOST_LABELS} at most; use --json")


def mask_facts(mask: np.ndarray) -> dict:
    """{"area", "bbox"} of a mask bool [H, W], as in COCO's annotations and as sam2 computes them."""
    ys, xs = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [xs[0], ys[0], xs[-1], ys[-1]] if mask.any() else [0, 0, 0, 0]
    return {"area": int(mask.sum()), "bbox": width_height(box)}


def write_image_masks(args: argparse.Namespace, image: str, records: list[dict], labels: np.ndarray) -> None:
    """Writes the masks of one image to the files that `args` names.

    records: of `AutomaticMaskGenerator`, or with fewer keys, each with its object as "id". The json is SA-1B's.
    """
    masks, ids = [record["segmentation"] for record in records], [record["id"] for record in records]
    height, width = labels.shape
    if args.palette is not None:
        check_palette(args.palette, ids)
    with ExitStack() as stack:  # files appear together at its end
        temporary = lambda path, open=atomic_write: stack.enter_context(open(path))
        if args.masks is not None:
            folder = temporary(args.masks, atomic_folder)
            for number, mask in zip(ids, masks):
                write_mask(folder / f"{number:03d}.png", mask)
        if args.palette is not None:
            write_labels(temporary(args.palette), labels.astype(np.uint8))
        if args.json is not None:
            annotations = [json_record(record) for record in records]
            about = {"image_id": 0, "width": width, "height": height, "file_name": Path(image).name}
            temporary(args.json).write_text(json.dumps({"image": about, "annotations": annotations}))
        if args.npz is not None:
            with temporary(args.npz).open("wb") as file:
                stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
                np.savez_compressed(file, masks=stacked, objects=np.array(ids, int))


def json_record(record: dict) -> dict:
    """A record with its mask as COCO's run lengths, and None for the stability of an empty mask, which is NaN."""
    facts = {key: None if value != value else value for key, value in record.items() if key != "segmentation"}
    return {"id": facts.pop("id"), "segmentation": encode_mask(record["segmentation"])} | facts


@contextmanager
def clip_masks(args: argparse.Namespace, clip: str, names: list[str], objects: list[int]) -> Iterator[Sink]:
    """Yields a function that takes each frame's masks and writes them to the files that `args` names.

    names: of all frames of the clip. Nothing is left of any file if the block raises.
    """
    with ExitStack() as stack:
        sinks = [
            stack.enter_context(sink(path, clip, names, objects))
            for sink, path in ((mask_pngs, args.masks), (palette_pngs, args.palette), (coco_json, args.json),
                               (numpy_file, args.npz))
            if path is not None
        ]  # fmt: skip
        yield lambda frame: [sink(frame) for sink in sinks]


@contextmanager
def mask_pngs(path: str, clip: str, names: list[str], objects: list[int]) -> Iterator[Sink]:
    """Writes <path>/<object>/<frame>.png, as in SA-V."""
    with atomic_folder(path) as folder:
        yield lambda frame: [
            write_mask(folder / f"{number:03d}" / f"{frame.name}.png", mask)
            for number, mask in zip(objects, frame.masks)
        ]


@contextmanager
def palette_pngs(path: str, clip: str, names: list[str], objects: list[int]) -> Iterator[Sink]:
    """Writes <path>/<frame>.png, as in DAVIS."""
    check_palette(path, objects)
    with atomic_folder(path) as folder:
        yield lambda frame: write_labels(folder / f"{frame.name}.png", frame.labels.astype(np.uint8))


@contextmanager
def coco_json(path: str, clip: str, names: list[str], objects: list[int]) -> Iterator[Sink]:
    """Writes a json as of YouTube-VIS: per object a list of run lengths, with null for frames that were not tracked.

    It has the frames of each object together, so all masks wait in a temporary file.
    """
    video = {"id": 1, "file_names": names, "length": len(names), "name": Path(clip).name}
    scratch, places, end = ScratchFile("masks"), {}, 0

    def add(frame: FrameMasks) -> None:
        nonlocal end
        video.update(height=frame.labels.shape[0], width=frame.labels.shape[1])
        for number, mask in zip(objects, frame.masks):
            facts = mask_facts(mask)
            values = {"segmentations": encode_mask(mask), "bboxes": facts["bbox"], "areas": facts["area"]}
            content = json.dumps(values).encode()
            scratch.write(end, content)
            places[number, frame.name] = end, len(content)
            end += len(content)

    def values(number: int, key: str) -> Iterator[str]:
        for name in names:
            place = places.get((number, name))
            yield json.dumps(json.loads(scratch.read(*place))[key]) if place else "null"

    with atomic_write(path) as temporary:
        yield add
        with temporary.open("w") as file:
            categories = [{"id": 1, "name": "object"}]
            file.write(json.dumps({"videos": [video], "categories": categories})[:-1] + ', "annotations": [')
            for i, number in enumerate(objects):
                about = {"id": number, "video_id": 1, "category_id": 1, "iscrowd": 0}
                file.write(", " * (i > 0) + json.dumps(about)[:-1])
                for key in ("segmentations", "bboxes", "areas"):
                    file.write(f', "{key}": [')
                    file.writelines(", " * (j > 0) + value for j, value in enumerate(values(number, key)))
                    file.write("]")
                file.write("}")
            file.write("]}")


@contextmanager
def numpy_file(path: str, clip: str, names: list[str], objects: list[int]) -> Iterator[Sink]:
    """Writes an npz with "objects" [M] and "masks/<frame>" bool [M, H, W], frame by frame."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, array: np.ndarray) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array)

        add("objects", np.array(objects, int))
        yield lambda frame: add(f"masks/{frame.name}", frame.masks)

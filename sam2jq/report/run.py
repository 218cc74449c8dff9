"""Writes and reads what the page of a run is made from: metrics.json and the pictures of the gallery."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sam2jq.data import read_image
from sam2jq.errors import UserError
from sam2jq.eval.gallery import EverythingItem, Gallery, GalleryItem
from sam2jq.report.check import METRICS, check_metrics
from sam2jq.report.figures import SIDE, draw_prompts, overlay
from sam2jq.report.page import file_inside, run_page
from sam2jq.report.schema import REPORT_VERSION, RunMetrics

NEEDED = (*(key for key in METRICS if not key.endswith("?")), "gallery")  # keys without which no page can be made
SHOWN = 3  # faults of a file that an error names


def layer_rows(rows: list[dict], figures: Mapping[str, dict], alphas: Mapping[str, tuple | None]) -> list[dict]:
    """The layer rows of a package in the order of `figures`, with the errors in it, SQNR in dB, alpha and beta.

    figures: {layer: errors}; alphas: {layer: (alpha, beta) of smoothing, None where they differ by group}. In the rows,
    alpha and beta are numbers, "by group", or None where the layer was not smoothed.
    """
    by_name = {row["name"]: row for row in rows}

    def row(name: str) -> dict:
        error = figures[name]["relative_error"]
        alpha, beta = (alphas[name] or ("by group", "by group")) if name in alphas else (None, None)
        sqnr = -20 * math.log10(error) if error else None
        return by_name[name] | figures[name] | {"sqnr": sqnr, "alpha": alpha, "beta": beta}

    return [row(name) for name in figures]


def merged(record: list[dict]) -> list[dict]:
    """One row for each stage of `record`, in order; the seconds of a stage that ran in several parts are added up."""
    rows = {}
    for row in record:
        total = rows.setdefault(row["name"], row | {"what": row["what"].split(", 1 of ")[0], "seconds": 0.0})
        total["seconds"] += row["seconds"]
    return list(rows.values())


def save_gallery(folder: Path, gallery: Gallery) -> list[dict]:
    """Writes three pictures for each mask of `gallery` into folder/gallery; returns their entries of metrics.json."""
    (folder / "gallery").mkdir(exist_ok=True)
    entries = [("worst", shown) for shown in gallery.worst] + [("random", shown) for shown in gallery.sample]
    return [save_shown(folder, f"gallery/{i:02d}", why, shown) for i, (why, shown) in enumerate(entries)]


def save_shown(folder: Path, stem: str, why: str, shown: GalleryItem) -> dict:
    """Writes the photograph and both masks of `shown` to folder/<stem>_*; returns {"image", "click", "files", ...}."""
    photo = Image.fromarray(read_image(shown.image))
    photo.thumbnail((SIDE, SIDE))
    files = {name: f"{stem}_{name}.png" for name in ("before", "after")} | {"photo": f"{stem}_photo.jpg"}
    for name in ("before", "after"):
        mask = Image.fromarray(getattr(shown, name)).resize(photo.size, Image.Resampling.NEAREST)
        mask.convert("1").save(folder / files[name])
    draw_prompts(photo, np.array([shown.click]) * photo.size, [1])
    photo.save(folder / files["photo"], quality=85)
    truth = dict(zip(("before", "after"), shown.ground_truth)) if shown.ground_truth else None
    return {
        "image": base_name(shown.image),
        "click": shown.click,
        "iou": shown.iou,
        "truth": truth,
        "why": why,
        "files": files,
    }


def save_everything(folder: Path, shown: EverythingItem) -> dict:
    """Writes the image with all masks before and after to folder/gallery; returns {"image", "files"}."""
    photo = read_image(shown.image)
    files = {name: f"gallery/everything_{name}.jpg" for name in ("before", "after")}
    for name, file in files.items():
        picture = overlay(photo, getattr(shown, name))
        picture.thumbnail((2 * SIDE, 2 * SIDE))
        picture.save(folder / file, quality=85)
    return {"image": base_name(shown.image), "files": files}


def base_name(image: str) -> str:
    """The name of an image file without its folder, or of a drawn scene."""
    return image if image.startswith("scenes:") else Path(image).name


def save_run(folder: Path, metrics: RunMetrics, gallery: Gallery) -> RunMetrics:
    """Writes metrics.json, gallery/ and report.html; returns `metrics` with its gallery."""
    metrics = replace(metrics, gallery=save_gallery(folder, gallery))
    if gallery.everything:
        everything = metrics.results["everything"] | {"shown": save_everything(folder, gallery.everything)}
        metrics = replace(metrics, results=metrics.results | {"everything": everything})
    content = metrics.to_dict()
    (folder / "metrics.json").write_text(json.dumps(content, indent=1))
    page = run_page(folder, content)
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")  # file names may not be valid text
    return metrics


def read_runs(paths: Iterable[str | Path]) -> dict[Path, dict]:
    """{folder: its metrics} of finished runs of `sam2jq quantize` or `distill`.

    Raises UserError or FileNotFoundError, which name the run and what it lacks.
    """
    return {folder: read_metrics(folder) for folder in (Path(path).resolve() for path in paths)}


def read_metrics(folder: Path) -> dict:
    """The content of metrics.json of one finished run, checked. Raises as `read_runs` does."""
    path = folder / "metrics.json"
    if folder.name.endswith(".partial") or folder.with_name(f".{folder.name}.partial").exists():
        raise UserError(f"{folder} is not finished: wait for it, or give its command again")
    if folder.name.endswith(".failed") and not path.exists():
        raise UserError(f"{folder} is a failed run: its run.log ends with the error")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metrics.json: give the folder that a finished `sam2jq quantize` left")
    try:
        metrics = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): quantize again") from error
    if not isinstance(metrics, dict) or "layers" not in metrics:
        raise UserError(f"{path} holds no quantized layers: give runs of `sam2jq quantize` or `distill`")
    if metrics.get("report_version") != REPORT_VERSION:
        raise UserError(
            f"{path} has report version {metrics.get('report_version', 0)}, this sam2jq reads {REPORT_VERSION}: "
            "quantize again, or use the version that wrote it"
        )
    missing = missing_parts(folder, metrics)
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: quantize again")
    wrong = check_metrics(metrics)
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(f"{path}: {'; '.join(wrong[:SHOWN])}{more}: quantize again")
    return metrics


def missing_parts(folder: Path, metrics: dict) -> list[str]:
    """Keys of `metrics` and picture files in `folder` that a page needs and that are not there.

    Raises UserError if a picture's name leads out of the folder, or if an entry of the gallery is not one.
    """
    missing = [key for key in NEEDED if key not in metrics]
    gallery = metrics.get("gallery", [])
    if not isinstance(gallery, list):
        raise UserError(f"{folder / 'metrics.json'}: gallery is not a list of masks: quantize again")
    for index, shown in enumerate(gallery):
        if not is_shown(shown):
            raise UserError(f"{folder / 'metrics.json'}: entry {index} of the gallery does not describe a mask: "
                            "quantize again")  # fmt: skip
    names = [name for shown in gallery for name in shown["files"].values()]
    names += everything_files(metrics).values()
    return missing + [name for name in names if not file_inside(folder, name).is_file()]


def everything_files(metrics: dict) -> dict[str, str]:
    """{"before", "after": picture} of all masks of an image; {} where a run did not compare these."""
    match metrics.get("results"):
        case {"everything": {"shown": {"files": {"before": str(before), "after": str(after)}}}}:
            return {"before": before, "after": after}
    return {}


def is_shown(shown: object) -> bool:
    """Whether `shown` is an entry of the gallery as `save_shown` returns it."""
    match shown:
        case {"image": str(), "click": [int() | float(), int() | float()], "iou": int() | float(), "why": str(),
              "truth": None | {"before": int() | float(), "after": int() | float()},
              "files": {"photo": str(), "before": str(), "after": str()}}:  # fmt: skip
            return True
    return False

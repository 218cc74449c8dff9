"""The folder of a finished run: its metrics, the pictures of its gallery, its page, and how they are read again."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from sam2jq.data import read_image
from sam2jq.errors import UserError
from sam2jq.eval.gallery import Gallery, Shown
from sam2jq.report.figures import SIDE, draw_prompts
from sam2jq.report.page import run_page

REPORT_VERSION = 1  # of metrics.json, as far as pages are made of it
NEEDED = (
    *("model", "checkpoint", "images_id", "truth_id", "asked", "config", "command", "versions", "random_weights"),
    *("results", "layers", "unquantized", "stages", "stage_images", "gallery"),
)


def layer_rows(rows: list[dict], figures: Mapping[str, dict], alphas: Mapping[str, tuple | None]) -> list[dict]:
    """A package's rows in the order of `figures`, with these; alpha, beta: of smoothing, "by group" or None."""
    by_name = {row["name"]: row for row in rows}

    def row(name: str) -> dict:
        error = figures[name]["relative_error"]
        alpha, beta = (alphas[name] or ("by group", "by group")) if name in alphas else (None, None)
        sqnr = -20 * math.log10(error) if error else None
        return by_name[name] | figures[name] | {"sqnr": sqnr, "alpha": alpha, "beta": beta}

    return [row(name) for name in figures]


def merged(record: list[dict]) -> list[dict]:
    """One row for each stage of `record`, in order: one that ran part by part has the seconds of all its parts."""
    rows = {}
    for row in record:
        whole = rows.setdefault(row["name"], row | {"what": row["what"].split(", 1 of ")[0], "seconds": 0.0})
        whole["seconds"] += row["seconds"]
    return list(rows.values())


def save_gallery(folder: Path, gallery: Gallery) -> list[dict]:
    """Writes three pictures of each mask shown into folder/gallery; what is known of each, and their files."""
    (folder / "gallery").mkdir(exist_ok=True)
    both = [("worst", shown) for shown in gallery.worst] + [("random", shown) for shown in gallery.sample]
    return [save_shown(folder, f"gallery/{i:02d}", why, shown) for i, (why, shown) in enumerate(both)]


def save_shown(folder: Path, stem: str, why: str, shown: Shown) -> dict:
    photo = Image.fromarray(read_image(shown.image))
    photo.thumbnail((SIDE, SIDE))
    files = {name: f"{stem}_{name}.png" for name in ("before", "after")} | {"photo": f"{stem}_photo.jpg"}
    for name in ("before", "after"):
        mask = Image.fromarray(getattr(shown, name)).resize(photo.size, Image.Resampling.NEAREST)
        mask.convert("1").save(folder / files[name])
    draw_prompts(photo, np.array([shown.click]) * photo.size, [1])
    photo.save(folder / files["photo"], quality=85)
    truth = dict(zip(("before", "after"), shown.ground_truth)) if shown.ground_truth else None
    image = shown.image if shown.image.startswith("scenes:") else Path(shown.image).name
    return {"image": image, "click": shown.click, "iou": shown.iou, "truth": truth, "why": why, "files": files}


def save_run(folder: Path, metrics: dict, gallery: Gallery) -> None:
    """Writes metrics.json, gallery/ and report.html of a run whose other files are there."""
    metrics = {"report_version": REPORT_VERSION} | metrics | {"gallery": save_gallery(folder, gallery)}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    # a file's name may hold bytes that are no text
    (folder / "report.html").write_text(run_page(folder, metrics), encoding="utf-8", errors="replace")


def read_runs(paths: Iterable[str | Path]) -> dict[Path, dict]:
    """{folder: its metrics} of finished runs of `sam2jq quantize` or `distill`.

    ValueError, FileNotFoundError: names the run and what it lacks.
    """
    return {folder: read_metrics(folder) for folder in (Path(path).resolve() for path in paths)}


def read_metrics(folder: Path) -> dict:
    """The metrics of one run."""
    path = folder / "metrics.json"
    if folder.name.endswith(".partial") or folder.with_name(f".{folder.name}.partial").exists():
        raise UserError(f"{folder} is not finished: wait for it, or give its command again")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metrics.json: give the folder that a finished `sam2jq quantize` left")
    try:
        metrics = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): quantize again") from error
    if not isinstance(metrics, dict) or "layers" not in metrics:
        raise UserError(f"{path} holds no quantized layers: give runs of `sam2jq quantize` or `distill`")
    if metrics.get("report_version") != REPORT_VERSION:
        raise UserError(
            f"{path} has report version {metrics.get('report_version', 0)}, this sam2jq reads {REPORT_VERSION}: "
            "quantize again, or use the version that wrote it"
        )
    missing = [key for key in NEEDED if key not in metrics]
    if not {"miou", "mask_iou"} & set(metrics.get("results", ())):
        missing.append("results.miou and results.mask_iou")
    missing += [file for shown in metrics.get("gallery", ()) for file in shown["files"].values()
                if not (folder / file).is_file()]  # fmt: skip
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: quantize again")
    return metrics

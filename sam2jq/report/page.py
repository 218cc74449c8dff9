"""HTML pages that are one file each: pictures, styles and script are embedded."""

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sam2jq.errors import UserError
from sam2jq.report import charts, verdict
from sam2jq.report.figures import tint

BEFORE, AFTER, BOTH = (
    (0, 114, 178),
    (230, 159, 0),
    (255, 255, 255),
)  # colour-blind readers can tell them apart
TEMPLATES = Path(__file__).parent / "templates"


def run_page(folder: Path, metrics: dict) -> str:
    """The HTML page of one run, from its metrics.json and the pictures in its folder."""
    return render(
        "run.html",
        title=title(metrics),
        metrics=metrics,
        sizes=verdict.megabytes(metrics),
        scores=verdict.scores(metrics),
        warnings=verdict.warnings(metrics),
        gallery=[shown | pictures(folder, shown) for shown in metrics["gallery"]],
        everything=everything_pictures(folder, metrics["results"]),
        config=yaml.safe_dump(metrics["config"], sort_keys=False),
        charts=run_charts(metrics),
    )


def run_charts(metrics: dict) -> dict[str, str]:
    """{name: SVG text}; the text is empty where a run has no data for the chart."""
    measured = [row for row in metrics["stages"] if "feature_error" in row]
    history = metrics.get("history", {})
    return {
        "depth": charts.layer_chart(metrics["layers"]) if metrics["layers"] else "",
        "stages": charts.stage_chart(measured) if len(measured) > 1 else "",
        "loss": charts.loss_chart(history["loss"], history.get("val_loss", [])) if history.get("loss") else "",
        "bits": charts.bits_chart(**history["bits"]) if history.get("bits") else "",
    }


def title(metrics: dict) -> str:
    """The model and its quantization scheme, as "tiny 2.1, W4A8 g128, GPTQ"."""
    return f"{metrics['model']['name']} {metrics['model']['version']}, {verdict.scheme(metrics)}"


def pictures(folder: Path, shown: dict) -> dict:
    """The pictures of one gallery entry as data URIs, and their size.

    Returns {"photo", "before", "after", "difference": data URI; "width", "height": pixels of the photograph; "middle":
    the mean column of both masks, in percent of the width}. The masks are transparent layers over the photograph.
    """
    paths = {name: file_inside(folder, file) for name, file in shown["files"].items()}
    with Image.open(paths["photo"]) as photo:
        width, height = photo.size
    before, after = (read_picture(paths[name], (height, width)) for name in ("before", "after"))
    layers = {
        "before": tint([(before, BEFORE)]),
        "after": tint([(after, AFTER)]),
        "difference": tint([(before & after, BOTH), (before & ~after, BEFORE), (after & ~before, AFTER)]),
    }
    uris = {name: data_uri(png(picture), "png") for name, picture in layers.items()}
    photo = data_uri(paths["photo"].read_bytes(), "jpeg")
    columns = np.nonzero((before | after).any(0))[0]
    middle = round(100 * columns.mean() / width) if len(columns) else 50
    return uris | {"photo": photo, "width": width, "height": height, "middle": middle}


def everything_pictures(folder: Path, results: dict) -> dict | None:
    """{"image", "before", "after": data URI} of all masks of an image; None where a run did not compare these."""
    shown = results.get("everything", {}).get("shown")
    if shown is None:
        return None
    uris = {name: data_uri(file_inside(folder, file).read_bytes(), "jpeg") for name, file in shown["files"].items()}
    return uris | {"image": shown["image"]}


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The mask, bool [H, W], in a picture of a gallery. Raises UserError unless it is one of `size` (H, W)."""
    with Image.open(path) as picture:
        mask = np.asarray(picture)
    if mask.dtype != bool or mask.shape != size:
        raise UserError(f"{path} is not a mask of {size[1]} x {size[0]} pixels, the size of its photograph")
    return mask


def file_inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`.

    Raises UserError if `name` is absolute, has a `..`, or leads out of the folder by a link: a page embeds the file, so
    metrics.json of a run from elsewhere must not choose one of the reader's.
    """
    parts = str(name).replace("\\", "/").split("/")
    path = folder / str(name)
    if (
        "\0" in str(name)
        or Path(str(name)).is_absolute()
        or ".." in parts
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise UserError(f"{folder / 'metrics.json'} names the file {str(name)!r}, which is not in the run's folder")
    return path


def png(picture: Image.Image) -> bytes:
    """A PNG file with at most 8 colours."""
    data = io.BytesIO()
    picture.quantize(8).save(data, "PNG", optimize=True)
    return data.getvalue()


def data_uri(content: bytes, subtype: str) -> str:
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"


def render(template: str, **content) -> str:
    """The page of a template. All of `content` is escaped, except what the template itself marks as safe: charts."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    # the page allows only the script with this hash, and no network requests
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_hash=digest, **content)

"""Pages of one file each: a run's own, and one that compares runs."""

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sam2jq.report import charts, verdict
from sam2jq.report.figures import tint

BEFORE, AFTER, BOTH = (0, 114, 178), (230, 159, 0), (255, 255, 255)  # told apart by everyone
TEMPLATES = Path(__file__).parent / "templates"


def run_page(folder: Path, metrics: dict) -> str:
    """The HTML of one run from its metrics and the pictures in its folder."""
    return render(
        "run.html",
        title=title(metrics),
        metrics=metrics,
        sizes=verdict.megabytes(metrics),
        scores=verdict.scores(metrics),
        warnings=verdict.warnings(metrics),
        gallery=[shown | pictures(folder, shown) for shown in metrics["gallery"]],
        config=yaml.safe_dump(metrics["config"], sort_keys=False),
        charts=run_charts(metrics),
    )


def run_charts(metrics: dict) -> dict[str, str]:
    """{name: SVG}, empty where there is nothing to draw."""
    measured = [row for row in metrics["stages"] if "feature_error" in row]
    history = metrics.get("history", {})
    return {
        "depth": charts.layer_chart(metrics["layers"]) if metrics["layers"] else "",
        "stages": charts.stage_chart(measured) if len(measured) > 1 else "",
        "loss": charts.loss_chart(history["loss"], history.get("val_loss", [])) if history.get("loss") else "",
        "bits": charts.bits_chart(**history["bits"]) if history.get("bits") else "",
    }


def title(metrics: dict) -> str:
    return f"{metrics['model']['name']} {metrics['model']['version']}, {verdict.scheme(metrics)}"


def pictures(folder: Path, shown: dict) -> dict[str, str]:
    """{"photo", "before", "after", "difference": data URI}, the last three to lay over the first; middle: where the
    masks are, in percent of its width."""
    with Image.open(folder / shown["files"]["photo"]) as photo:
        width, height = photo.size
    before, after = (np.asarray(Image.open(folder / shown["files"][name])) for name in ("before", "after"))
    layers = {
        "before": tint([(before, BEFORE)]),
        "after": tint([(after, AFTER)]),
        "difference": tint([(before & after, BOTH), (before & ~after, BEFORE), (after & ~before, AFTER)]),
    }
    uris = {name: data_uri(png(picture), "png") for name, picture in layers.items()}
    photo = data_uri((folder / shown["files"]["photo"]).read_bytes(), "jpeg")
    columns = np.nonzero((before | after).any(0))[0]
    middle = round(100 * columns.mean() / width) if len(columns) else 50
    return uris | {"photo": photo, "width": width, "height": height, "middle": middle}


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.quantize(8).save(data, "PNG", optimize=True)
    return data.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(template: str, **content) -> str:
    """A page; everything in `content` is escaped but for what the template itself calls safe: charts."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script = (TEMPLATES / "page.js").read_text()
    # only this script may run, and nothing may be fetched
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_hash=digest, **content)

"""Several runs of one model on one set of images: what differs, what it cost, and which are worth their size."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

from sam2jq.errors import UserError
from sam2jq.report import charts, verdict
from sam2jq.report.page import pictures, render
from sam2jq.tree import flatten

MODEL = ("name", "version", "image_size")


def runs_page(runs: Mapping[Path, dict]) -> str:
    """The HTML that compares `runs`, {folder: metrics}. ValueError: they are not comparable."""
    check_comparable(runs)
    rows, keys = table(runs)
    names = shared_scores(runs)
    chosen = [name for name in names if not name.startswith(verdict.AGREEMENT)] or names
    points = [row | {"front": {name for name in chosen if on_front(row, rows, name)}} for row in rows]
    first = next(iter(runs.values()))
    return render(
        "runs.html",
        title=f"{len(rows)} runs of {first['model']['name']} {first['model']['version']}",
        rows=points,
        keys=keys,
        names=names,
        behind={score["name"]: score["behind"] for score in verdict.scores(first)},
        warnings=list(dict.fromkeys(text for metrics in runs.values() for text in verdict.warnings(metrics))),
        gallery=shared_gallery(runs),
        chart=charts.pareto_chart(points, chosen),
    )


def check_comparable(runs: Mapping[Path, dict]) -> None:
    """ValueError unless all runs are of one checkpoint, and measured on the same images or clips with known masks, or
    else, without masks, on the same images."""
    (one, first), *others = runs.items()
    facts = lambda metrics: ([metrics["model"][key] for key in MODEL], metrics["checkpoint"])
    for other, metrics in others:
        if facts(metrics) != facts(first):
            names = [" ".join(map(str, facts(m)[0])) + f" from {m['model']['checkpoint']}" for m in (first, metrics)]
            raise UserError(f"{one} and {other} are runs of different models, {names[0]} and {names[1]}: give "
                             "runs of one")  # fmt: skip
        if metrics["truth_id"] != first["truth_id"] or not shared_scores({one: first, other: metrics}):
            raise UserError(f"{one} and {other} were measured on different images or clips: give runs with the same "
                             "quant.calib and measure")  # fmt: skip


def table(runs: Mapping[Path, dict]) -> tuple[list[dict], list[str]]:
    """A row for each run, with a letter of its own, and the config keys in which they differ."""
    asked = [settings_of(metrics["asked"]) for metrics in runs.values()]
    every = list(dict.fromkeys(key for of in asked for key in of))
    keys = [key for key in every if len({of.get(key) for of in asked}) > 1]
    keys = [key for key in keys if not any(key.startswith(f"{section}.") for section in keys)]
    unique = len({folder.name for folder in runs}) == len(runs)
    rows = []
    for i, ((folder, metrics), of) in enumerate(zip(runs.items(), asked)):
        scores = verdict.scores(metrics)
        rows.append(
            {
                "letter": letter(i),
                "run": folder.name if unique else str(folder),
                "scheme": verdict.scheme(metrics),
                "settings": {key: of.get(key, "on") for key in keys},  # a section that is null elsewhere
                "mb": verdict.megabytes(metrics)[1],
                "bits": metrics["effective_bits"],
                "scores": {score["name"]: score["after"] for score in scores},
                "full": {score["name"]: score["before"] for score in scores},
                "seconds": sum(stage["seconds"] for stage in metrics["stages"]),
            }
        )
    return rows, keys


def shared_scores(runs: Mapping[Path, dict]) -> list[str]:
    """The names of the scores that all runs have; agreement with full precision only where it is on the same images."""
    found = [[score["name"] for score in verdict.scores(metrics)] for metrics in runs.values()]
    alike = len({metrics["images_id"] for metrics in runs.values()}) == 1
    common = [name for name in found[0] if all(name in names for names in found)]
    return [name for name in common if alike or not name.startswith(verdict.AGREEMENT)]


def settings_of(config: dict) -> dict[str, str]:
    """{dotted key: value as text} of all that may change a result."""
    plain = {section: of for section, of in config.items() if section not in ("cache", "output", "save_model")}
    return {path.replace("/", "."): value if isinstance(value, str) else json.dumps(value)
            for path, value in flatten(plain).items()}  # fmt: skip


def letter(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(65 + index % 26)


def on_front(row: dict, rows: list[dict], name: str) -> bool:
    """Whether no other run is at least as small, to 0.01 MB, and as good by score `name`, and better in one of both."""
    at = lambda of: (-round(of["mb"], 2), of["scores"][name])
    return not any(all(x >= y for x, y in zip(at(other), at(row))) and at(other) != at(row) for other in rows)


def shared_gallery(runs: Mapping[Path, dict]) -> list[dict]:
    """The random masks that all runs show: the photograph, and full precision and each run over it."""
    key = lambda shown: (shown["image"], *shown["click"])
    shown_by = [
        {key(shown): (folder, shown) for shown in metrics["gallery"] if shown["why"] == "random"}
        for folder, metrics in runs.items()
    ]
    common = [at for at in shown_by[0] if all(at in of for of in shown_by)]
    return [compared([of[at] for of in shown_by]) for at in common]


def compared(entries: list[tuple[Path, dict]]) -> dict:
    """One mask of the gallery as every run makes it."""
    drawn = [pictures(*entry) for entry in entries]
    shared = {key: drawn[0][key] for key in ("photo", "before", "width", "height")}
    views = [{"letter": letter(i), "after": of["after"], "iou": shown["iou"], "truth": shown["truth"]}
             for i, (of, (_, shown)) in enumerate(zip(drawn, entries))]  # fmt: skip
    return shared | {"image": entries[0][1]["image"], "truth": entries[0][1]["truth"], "views": views}


def runs_csv(runs: Mapping[Path, dict]) -> str:
    """The table of `runs` as CSV, one row a run."""
    rows, keys = table(runs)
    names = shared_scores(runs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "scheme", *keys, "MB", "bits a weight", *names, *(f"{n}, change" for n in names), "seconds"]
    )
    for row in rows:
        change = [row["scores"][name] - row["full"][name] for name in names]
        figures = [row["mb"], row["bits"], *(row["scores"][name] for name in names), *change, row["seconds"]]
        writer.writerow([row["run"], row["scheme"], *row["settings"].values(), *figures])
    return text.getvalue()

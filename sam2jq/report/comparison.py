"""Compares runs of one model on one set of images: settings that differ, sizes, scores, and the Pareto front."""

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
    """The HTML page that compares `runs`, {folder: metrics}. Raises UserError if they cannot be compared."""
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
    """Raises UserError unless all runs are of one checkpoint and share a score.

    They share one if they were measured on the same images or clips with known masks or, without masks, on the same
    images."""
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
    """A row for each run, which a letter names, and the dotted config keys in which the runs differ."""
    settings = [settings_of(metrics["asked"]) for metrics in runs.values()]
    every = list(dict.fromkeys(key for own in settings for key in own))
    keys = [key for key in every if len({own.get(key) for own in settings}) > 1]
    keys = [key for key in keys if not any(key.startswith(f"{section}.") for section in keys)]
    unique = len({folder.name for folder in runs}) == len(runs)
    rows = []
    for i, ((folder, metrics), own) in enumerate(zip(runs.items(), settings)):
        scores = verdict.scores(metrics)
        rows.append(
            {
                "letter": letter(i),
                "run": folder.name if unique else str(folder),
                "scheme": verdict.scheme(metrics),
                "settings": {key: own.get(key, "on") for key in keys},  # "on": a section that is null in other runs
                "mb": verdict.megabytes(metrics)[1],
                "bits": metrics["effective_bits"],
                "scores": {score["name"]: score["after"] for score in scores},
                "full": {score["name"]: score["before"] for score in scores},
                "seconds": sum(stage["seconds"] for stage in metrics["stages"]),
            }
        )
    return rows, keys


def shared_scores(runs: Mapping[Path, dict]) -> list[str]:
    """The names of the scores that all runs have.

    Mask IoU with full precision is one only if all runs were measured on the same images.
    """
    names_by_run = [[score["name"] for score in verdict.scores(metrics)] for metrics in runs.values()]
    same_images = len({metrics["images_id"] for metrics in runs.values()}) == 1
    common = [name for name in names_by_run[0] if all(name in names for names in names_by_run)]
    return [name for name in common if same_images or not name.startswith(verdict.AGREEMENT)]


def settings_of(config: dict) -> dict[str, str]:
    """{dotted key: value as text} of all settings that may change a result."""
    others = "cache", "distributed", "output", "save_model"
    plain = {section: value for section, value in config.items() if section not in others}
    return {path.replace("/", "."): value if isinstance(value, str) else json.dumps(value)
            for path, value in flatten(plain).items()}  # fmt: skip


def letter(index: int) -> str:
    """The name of run number `index`: A, B, ... Z, AA, AB, ..."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(65 + index % 26)


def on_front(row: dict, rows: list[dict], name: str) -> bool:
    """Whether `row` is on the Pareto front of size, rounded to 0.01 MB, and score `name`."""
    at = lambda run: (-round(run["mb"], 2), run["scores"][name])
    return not any(all(x >= y for x, y in zip(at(other), at(row))) and at(other) != at(row) for other in rows)


def shared_gallery(runs: Mapping[Path, dict]) -> list[dict]:
    """The random masks that are in the gallery of all runs, each with its photograph and the mask of every run."""
    key = lambda shown: (shown["image"], *shown["click"])
    shown_by = [
        {key(shown): (folder, shown) for shown in metrics["gallery"] if shown["why"] == "random"}
        for folder, metrics in runs.items()
    ]
    common = [at for at in shown_by[0] if all(at in entries for entries in shown_by)]
    return [compared([entries[at] for entries in shown_by]) for at in common]


def compared(entries: list[tuple[Path, dict]]) -> dict:
    """One gallery entry with the masks that all runs predict for it. entries: (folder of a run, its entry)."""
    drawn = [pictures(*entry) for entry in entries]
    shared = {key: drawn[0][key] for key in ("photo", "before", "width", "height")}
    views = [{"letter": letter(i), "after": uris["after"], "iou": shown["iou"], "truth": shown["truth"]}
             for i, (uris, (_, shown)) in enumerate(zip(drawn, entries))]  # fmt: skip
    return shared | {"image": entries[0][1]["image"], "truth": entries[0][1]["truth"], "views": views}


def runs_csv(runs: Mapping[Path, dict]) -> str:
    """The table of `runs` as CSV text, one row per run."""
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

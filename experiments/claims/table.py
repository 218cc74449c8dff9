"""Prints the table of docs/claims.md from the runs of its commands: a row per model and scheme, "-" for missing runs.

python experiments/claims/table.py
"""

import json
from pathlib import Path

SIZES = ("tiny", "small", "base_plus", "large")
SCHEMES = ("float32", "w8a8", "w4a16", "w4a8", "w4a4")
COLUMNS = ("MB", "bits a weight", "COCO box", "COCO 1 click", "COCO 3 clicks", "SA-V val J&F", "SA-V test J&F")


def read(folder: str) -> dict:
    """The metrics of a run; empty where there is none."""
    path = Path("outputs") / folder / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def row(size: str, scheme: str) -> list[float | None]:
    """The values of COLUMNS; None where a run is missing."""
    run = read(f"sam2/hiera_{size}_{scheme}")
    coco, val, test = (read(f"claims/{size}_{scheme}_{data}") for data in ("coco", "sav_val", "sav_test"))
    mb = (run["bytes_quantized"] + run["bytes_unquantized"]) / 1e6 if run else None
    ious = [100 * iou for iou in coco["miou"].values()] if coco else [None] * 3
    return [mb, run.get("effective_bits"), *ious, val.get("j&f"), test.get("j&f")]


if __name__ == "__main__":
    print(f"| model | scheme | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for size in SIZES:
        for scheme in SCHEMES:
            cells = ("-" if value is None else f"{value:.2f}" for value in row(size, scheme))
            print(f"| {size} | {scheme} | {' | '.join(cells)} |")

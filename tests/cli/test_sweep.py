"""`sam2jq sweep`."""

import csv
import json
import re

import pytest

from sam2jq.cli.main import main

from .conftest import failure


def test_a_sweep_runs_every_combination_once_and_compares_them(flags, tmp_path, capsys):
    command = ["sweep", *flags, "--output.root", str(tmp_path), "--output.job", "s", "--save_model", "false"]
    command += ["--over", "quant.wgts.dtype=sint8,sint4"]
    assert main(command) == 0
    runs = [tmp_path / "s" / f"quant.wgts.dtype=sint{bits}" for bits in (8, 4)]
    assert set((tmp_path / "s").iterdir()) == {*runs, tmp_path / "s" / "runs.csv", tmp_path / "s" / "report.html"}
    assert not (runs[0] / "vanilla.pt").exists()
    eight, four = (json.loads((folder / "metrics.json").read_text())["results"] for folder in runs)
    assert eight["mask_iou"] > four["mask_iou"]
    assert all(eight["feature_error"][level] < four["feature_error"][level] / 4 for level in four["feature_error"])
    rows = list(csv.DictReader((tmp_path / "s" / "runs.csv").open()))
    assert [row["quant.wgts.dtype"] for row in rows] == ["sint8", "sint4"]
    assert float(rows[0]["MB"]) > float(rows[1]["MB"])

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/metrics.json")}
    assert main(command) == 0  # again: all of it is there
    assert capsys.readouterr().out.count("is finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "was made with another seed: remove it, or give" in failure(capsys, *command, "--seed", "1")
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert out.read_text() == (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("quant.wgts.dtype", "write key=value,value"),
        ("quant.wgts.dtype=sint8,sint1", "sint1.*2..8"),
        ("quant.wgts.dtpe=sint8", "unknown key quant.wgts.dtpe; did you mean 'dtype'"),
        ("quant.wgts.skips=[a", "the list of values is not YAML"),
        ("output.job=a,b", "output.job: a sweep names its runs after their settings"),
        ("output={job: a},{job: b}", "output: a sweep names its runs"),
        ("quant.wgts.rounding=nearest,nearst", "quant.wgts.rounding 'nearst': .* did you mean 'nearest'"),
        ("seed=1,1", "two runs would be called seed=1"),
        ("model.checkpoint='random:0','random/0'", "two runs would be called model.checkpoint=random_0"),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(flags, tmp_path, capsys, over, message):
    assert re.search(message, failure(capsys, "sweep", *flags, "--output.root", str(tmp_path), "--over", over))
    assert not list(tmp_path.iterdir())

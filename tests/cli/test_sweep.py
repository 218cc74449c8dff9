"""`sam2jq sweep`."""

import argparse
import csv
import json
import re

import pytest

from sam2jq.cli import sweep
from sam2jq.cli.main import main
from tests.flags import override

from .conftest import failure


def without_dtype(flags: list[str]) -> list[str]:
    at = flags.index("--quant.wgts.dtype")
    return flags[:at] + flags[at + 2 :]


def test_a_sweep_runs_every_combination_once_and_compares_them(flags, tmp_path, capsys):
    own = ["--output.root", str(tmp_path), "--output.job", "s", "--save_model", "false"]
    command = ["sweep", *override(without_dtype(flags), *own), "--over", "quant.wgts.dtype=sint8,sint4"]
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
        ("measure.split='a:0','a/0'", "two runs would be called measure.split=a_0"),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(flags, tmp_path, capsys, over, message):
    given = override(without_dtype(flags), "--output.root", str(tmp_path))
    assert re.search(message, failure(capsys, "sweep", *given, "--over", over))
    assert not list(tmp_path.iterdir())


def test_a_setting_to_sweep_over_that_is_also_a_flag_is_given_twice(flags, tmp_path, capsys):
    given = override(flags, "--output.root", str(tmp_path), "--seed=1", "--over", "seed=1,2")
    assert "--seed is given twice: give --seed once" in failure(capsys, "sweep", *given)
    given = override(flags, "--output", f"{{root: {tmp_path}}}", "--output.job", "../x", "--over", "seed=1,2")
    assert "output.job '../x': it is the name of a folder" in failure(capsys, "sweep", *given)
    assert not list(tmp_path.iterdir())


def test_the_jobs_of_a_sweep_have_its_values_and_their_own_output(flags, tmp_path):
    """The text 1.10 stays as it is, and the sweep's own output replaces that of the flags."""
    given = override(flags, "--output", f"{{root: {tmp_path}, job: s}}")
    args = argparse.Namespace(config=None, over=["measure.split=1.10,007,'a, b'"])
    jobs = sweep.find_jobs(args, given, sweep.sweep_folder(args, given))
    assert [config.measure.split for _, config in jobs.values()] == ["1.10", "007", "a, b"]
    assert {config.output.root for _, config in jobs.values()} == {str(tmp_path / "s")}
    assert [config.output.job for _, config in jobs.values()] == [folder.name for folder in jobs]

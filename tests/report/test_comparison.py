import csv
import json

import pytest

from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.report import verdict
from sam2jq.report.comparison import check_comparable, letter, on_front, runs_csv, runs_page, table
from sam2jq.report.run import read_metrics, read_runs


@pytest.fixture
def runs(make_run) -> dict:
    return read_runs([make_run("w8", 8, 0.79), make_run("w4", 4, 0.6), make_run("w6", 6, 0.59)])


def test_a_comparison_shows_every_run_and_what_differs(runs):
    page = runs_page(runs)
    rows, keys = table(runs)
    assert keys == ["quant.wgts.dtype"]
    assert [row["settings"]["quant.wgts.dtype"] for row in rows] == ["sint8", "sint4", "sint6"]
    assert page.count("by run C") == 1  # the random mask, which all of them show
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page


def test_a_run_is_on_the_front_unless_another_is_as_small_and_as_good():
    at = lambda mb, iou: {"mb": mb, "scores": {"x": iou}}
    rows = [at(1, 50), at(2, 60), at(3, 55), at(2, 58), at(1, 50)]
    assert [on_front(row, rows, "x") for row in rows] == [True, True, False, False, True]


def test_the_csv_has_a_row_a_run_with_the_figures_of_the_page(runs):
    rows = list(csv.DictReader(runs_csv(runs).splitlines()))
    assert [row["run"] for row in rows] == ["w8", "w4", "w6"]
    assert float(rows[1]["mIoU, box"]) == pytest.approx(60)
    assert float(rows[1]["mIoU, box, change"]) == pytest.approx(-20)
    assert float(rows[1]["MB"]) == pytest.approx(1.6)


def test_letters_do_not_end():
    assert [letter(i) for i in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "bead"}, "runs of different models, nano 2.1 256 from demo and"),
        ({"truth_id": "2"}, "measured on different images"),
    ],
)
def test_runs_of_different_things_are_refused(make_run, changes, message):
    with pytest.raises(ValueError, match=f"a and .*b (are|were) {message}.*: give runs"):
        check_comparable(read_runs([make_run("a"), make_run("b", **changes)]))


def test_a_distilled_run_is_compared_on_the_masks_that_are_known(make_run):
    """What it was distilled on is not what the other was calibrated on, so how far both agree with full precision is
    left out; where no masks are known nothing is left."""
    given = loader.to_dict(loader.load(None, ["--teacher.name", "nano", "--student.name", "nano", "--data.train", "a",
                                              "--data.val", "b"], DistillConfig))  # fmt: skip
    other = {"asked": given | {"model": given["student"]}, "images_id": "2"}
    runs = read_runs([make_run("ptq"), make_run("distilled", 3, 0.59, **other)])
    rows = list(csv.DictReader(runs_csv(runs).splitlines()))
    assert [row["distill.impact_threshold"] for row in rows] == ["on", "0.3"]
    assert not any(verdict.AGREEMENT in column for column in rows[0])
    assert "mIoU, box" in runs_page(runs)
    unknown = {
        "results": {"mask_iou": 0.9, "images": 2, "prompts_per_image": 16, "kinds": ["full precision", "weights"]}
    }
    with pytest.raises(ValueError, match="measured on different images"):
        check_comparable(read_runs([make_run("a", **unknown), make_run("b", **unknown, images_id="2")]))


def test_a_folder_that_is_no_finished_run_is_named(make_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing has no metrics.json: give the folder"):
        read_metrics(tmp_path / "nothing")
    folder = make_run("a")
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    for content, message in [
        (
            metrics | {"report_version": 99},
            "version 99, this sam2jq reads 1: quantize again, or use the version",
        ),
        ({k: v for k, v in metrics.items() if k != "report_version"}, "has report version 0"),
        ({k: v for k, v in metrics.items() if k != "stages"}, "a lacks stages: quantize again"),
        ({"j&f": 1.0}, "holds no quantized layers"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_metrics(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON.*: quantize again"):
        read_metrics(folder)
    path.write_text(json.dumps(metrics))
    (folder / metrics["gallery"][0]["files"]["photo"]).unlink()
    with pytest.raises(ValueError, match="a lacks gallery/00_photo.jpg"):
        read_metrics(folder)
    (tmp_path / ".a.partial").mkdir()
    with pytest.raises(ValueError, match="a is not finished"):
        read_metrics(folder)

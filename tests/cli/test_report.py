"""`sam2jq report`."""

from sam2jq.cli.main import main

from .conftest import failure


def test_report_of_one_run_is_its_own_page(job, tmp_path, capsys):
    assert main(["report", str(job), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (job / "report.html").read_text()
    assert "no metrics.json: give the folder" in failure(
        capsys, "report", str(tmp_path), "--out", str(tmp_path / "x.html")
    )
    assert not (tmp_path / "x.html").exists()

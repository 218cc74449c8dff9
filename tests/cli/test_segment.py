"""`sam2jq segment`."""

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data.images import is_turned
from sam2jq.report.figures import FORMATS, draw_prompts

from .conftest import failure


def test_segment_writes_an_overlay(flags, tmp_path, capsys):
    model, out = flags[:4], tmp_path / "mask.png"
    prompt = ["--points", "100,100", "20,30", "--labels", "1", "0", "--box", "10,10,150,150", "--multimask"]
    assert main(["segment", "scenes:0/0000", *model, *prompt, "--out", str(out)]) == 0
    assert np.asarray(Image.open(out)).shape == (256, 256, 3)
    assert capsys.readouterr().out.count("estimated IoU") == 3
    assert list(tmp_path.iterdir()) == [out]


def test_segment_takes_a_package_and_says_what_it_lacks(job, tmp_path, capsys):
    model = ["--model.name", "nano", "--model.checkpoint", str(job / "package.pt"), "--out", str(tmp_path / "m.png")]
    assert main(["segment", "scenes:0/0000", *model, "--box", "10,10,150,150", "--model.dtype", "bfloat16"]) == 0
    assert "no prompt" in failure(capsys, "segment", "scenes:0/0000", *model)
    assert "1 points but 2 labels" in failure(
        capsys, "segment", "scenes:0/0000", *model, "--points", "1,2", "--labels", "1", "0"
    )
    assert "nothing.jpg" in failure(capsys, "segment", "nothing.jpg", *model, "--points", "1,2")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["--points", "5,10", "--points", "20,20"], "given twice"),
        (["--box", "1,1,9,9", "--box", "2,2,8,8"], "given twice"),
        (["--box", "40,30,10,5"], "upper left and the lower right"),
        (["--points", "5,10", "--out", "a.png", "--out", "b.png"], "given twice"),
        (
            ["--points", "5,10", "--engine", "openvino"],
            "engine openvino: it runs folders of ONNX files, and demo is no",
        ),
        (["--everything", "--engine", "onnxruntime"], "engine onnxruntime: it runs folders of ONNX files"),
        (["--points", "5,300"], "--points 5,300 lies outside of the picture, 256 x 256 pixels"),
        (["--points", "-5,30"], "--points -5,30 lies outside"),
        (["--box", "300,30,310,35"], "--box 300,30,310,35 lies outside"),
    ],
)
def test_a_prompt_that_would_be_lost_or_turned_is_an_error(prompt, message, capsys):
    assert message in failure(capsys, "segment", "scenes:0/0000", "--model.checkpoint", "demo", *prompt)


def test_every_allowed_label_can_be_drawn():
    draw_prompts(Image.new("RGB", (64, 48)), np.full((5, 2), 9), np.array([-1, 0, 1, 2, 3]), np.array([1, 1, 30, 30]))


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [("segment", "o.mp4", "ends in one of .png"), ("segment", "o", "ends in one of .png"),
     ("track", "o.avi", "ends in .mp4, .gif or"), ("track", "o", "ends in .mp4, .gif or"),
     *[(command, "file/o.png", "is not a folder") for command in ("segment", "track")],
     *[(command, ".", "not the name of a file") for command in ("segment", "track")]],
)  # fmt: skip
def test_a_result_that_cannot_be_written_is_an_error_before_anything_is_read(tmp_path, capsys, command, name, message):
    (tmp_path / "file").write_text("")
    assert message in failure(capsys, command, "nothing", "--points", "5,10", "--out", str(tmp_path / name))


def test_the_ending_says_the_format(tmp_path):
    prompt = ["--points", "30,30", "--model.image_size", "64"]
    out = tmp_path / "m.TIFF"
    assert main(["segment", "scenes:0/0000", "--model.checkpoint", "demo", *prompt, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == FORMATS[".tiff"]


def test_what_is_read_is_never_replaced(tmp_path, capsys):
    folder = tmp_path / "clip"
    folder.mkdir()
    photo = folder / "0.png"
    Image.new("RGB", (64, 64)).save(photo)
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for command in (
        ["segment", str(photo), "--out", str(photo)],
        ["segment", str(tmp_path / "link.png"), "--out", str(photo)],
        ["track", str(folder), "--out", str(folder / "strip.png")],
    ):
        assert "is read; give another name" in failure(capsys, *command, "--points", "5,5")
    assert "ends in .html" in failure(capsys, "report", str(tmp_path), "--out", str(tmp_path / "package.pt"))
    assert (photo.read_bytes(), sorted(path.name for path in folder.iterdir())) == (before, ["0.png"])


def test_an_orientation_that_is_not_applied_is_said(tmp_path, capsys):
    """As in sam2. A viewer shows the picture turned, so that clicks read off there would be elsewhere."""
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[274] = orientation
        Image.new("RGB", (64, 64)).save(tmp_path / f"{orientation}.jpg", exif=exif)
        assert is_turned(str(tmp_path / f"{orientation}.jpg")) == (orientation == 6)
    prompt = ["--points", "90,30", "--out", str(tmp_path / "o.png")]
    assert main(["segment", str(tmp_path / "6.jpg"), *prompt]) == 2  # outside of the picture: no model is loaded
    assert "EXIF orientation is not applied" in capsys.readouterr().out

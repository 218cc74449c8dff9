"""`sam2jq segment`."""

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.report.figures import draw_prompts

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
    ],
)
def test_a_prompt_that_would_be_lost_or_turned_is_an_error(prompt, message, capsys):
    assert message in failure(capsys, "segment", "scenes:0/0000", "--model.checkpoint", "demo", *prompt)


def test_every_allowed_label_can_be_drawn():
    draw_prompts(Image.new("RGB", (64, 48)), np.full((5, 2), 9), np.array([-1, 0, 1, 2, 3]), np.array([1, 1, 30, 30]))

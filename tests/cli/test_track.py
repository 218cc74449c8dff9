"""`sam2jq track`."""

import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data import draw_clip

from .conftest import failure


@pytest.mark.parametrize("name", ["tracked.gif", "strip.png"])
def test_track_writes_every_frame_or_a_strip(flags, tmp_path, name):
    clip = tmp_path / "clip"
    clip.mkdir()
    for i, frame in enumerate(draw_clip(0, 3, 64).frames):
        Image.fromarray(frame).save(clip / f"{i}.png")
    assert main(["track", str(clip), *flags[:4], "--points", "30,30", "--out", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / name) as picture:
        if name.endswith(".gif"):
            assert (picture.n_frames, picture.size) == (3, (64, 64))
        else:
            assert picture.width == 3 * picture.height - 3 * 16  # three squares, and a line of titles above them


def test_track_says_what_it_lacks(flags, tmp_path, capsys):
    model, prompt = flags[:4], ["--points", "30,30"]
    assert "no prompt" in failure(capsys, "track", "scenes:0/0000", *model)
    assert "ends in .gif or" in failure(capsys, "track", "scenes:0/0000", *model, *prompt, "--out", "a.mp4")
    assert "holds no frame" in failure(capsys, "track", str(tmp_path), *model, *prompt)
    assert "the clip has frames 0 to 23" in failure(capsys, "track", "scenes:0/0000", *model, *prompt, "--frame", "99")

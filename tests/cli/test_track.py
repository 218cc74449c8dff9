"""`sam2jq track`."""

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data import draw_clip

from .conftest import failure


@pytest.mark.parametrize("name", ["tracked.gif", "strip.JPG"])
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


def test_track_takes_a_mask_of_any_value(flags, tmp_path, capsys):
    """0 and 1, 0 and 255 or a label give one picture, which is not that of another mask."""
    disc = (np.hypot(*(np.mgrid[:64, :64] - 30)) < 12).astype(np.uint8)
    (tmp_path / "clip").mkdir()
    Image.fromarray(draw_clip(0, 1, 64).frames[0]).save(tmp_path / "clip" / "0.png")
    strips = {}
    for name, mask in {
        "ones": disc,
        "white": disc * 255,
        "label": disc * 7,
        "other": disc.T * (np.mgrid[:64, :64][0] > 30),
    }.items():
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")
        command = ["track", str(tmp_path / "clip"), *flags[:4], "--mask", str(tmp_path / "mask.png")]
        assert main([*command, "--out", str(tmp_path / "strip.png")]) == 0
        strips[name] = np.asarray(Image.open(tmp_path / "strip.png"))
    for name in ("white", "label"):
        np.testing.assert_array_equal(strips[name], strips["ones"])
    assert (strips["other"] != strips["ones"]).any()
    for more in (["--points", "3,3"], ["--labels", "1"], ["--box", "1,1,9,9"]):
        assert "a mask is the whole prompt" in failure(capsys, *command, *more)
    assert "given twice" in failure(capsys, *command, "--mask", "other.png")
    Image.fromarray(disc[:60]).save(tmp_path / "mask.png")
    assert "64 x 60 pixels, but its frame has 64 x 64" in failure(capsys, *command)


def test_track_says_what_it_lacks(flags, tmp_path, capsys):
    model, prompt = flags[:4], ["--points", "30,30"]
    assert "no prompt" in failure(capsys, "track", "scenes:0/0000", *model)
    assert "--points 300,3 lies outside of the picture, 256 x 256" in failure(
        capsys, "track", "scenes:0/0000", *model, "--points", "300,3"
    )
    assert "holds no frame" in failure(capsys, "track", str(tmp_path), *model, *prompt)
    assert "the clip has frames 0 to 23" in failure(capsys, "track", "scenes:0/0000", *model, *prompt, "--frame", "99")

"""Prompts of several objects in a json file."""

import json

import pytest

from sam2jq.cli.prompts import read_prompts

from .conftest import failure


@pytest.fixture
def write(tmp_path):
    def write(content) -> str:
        (tmp_path / "prompts.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / "prompts.json")

    return write


def test_prompts_of_a_file_are_those_written(write, tmp_path):
    one, two, three = read_prompts(
        write(
            [
                {"object": 7, "points": [[1, 2], [3.5, 4]], "labels": [1, 0], "box": [0, 0, 9, 9]},
                {"object": 2, "frame": 5, "points": [[1, 2]]},
                {"object": 2, "frame": 6, "mask": "masks/2.png"},
            ]
        )
    )
    assert one[:5] == (7, 0, [[1, 2], [3.5, 4]], [1, 0], [0, 0, 9, 9])
    assert (two.object, two.frame, two.labels, two.box) == (2, 5, [1], None)
    assert three.mask == str(tmp_path / "masks/2.png")


def test_a_tilde_in_a_file_is_the_users_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_prompts(write([{"object": 2, "mask": "~/masks/2.png"}]))[0].mask == str(tmp_path / "masks/2.png")


POINT = {"object": 1, "points": [[5, 5]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "broken json"),
        ([], "holds no list of prompts"),
        ({"object": 1}, "holds no list of prompts"),
        ([5], "prompt 0: 5 is no object with keys"),
        ([POINT, {"points": [[5, 5]]}], "prompt 1: object is None; give a whole number from 1 on"),
        ([POINT | {"object": "cat"}], "object is 'cat'; give a whole number"),
        ([POINT | {"object": 0}], "object is 0; give a whole number from 1 on"),
        ([POINT | {"object": 10**30}], "object is 1000000000"),
        ([{"object": 1, "points": [[10**400, 5]]}], "finite numbers in pixels"),
        ([POINT | {"object": True}], "object is True; give a whole number from 1 on"),
        ([POINT | {"frame": -1}], "frame is -1; give a whole number from 0 on"),
        ([POINT | {"frames": 1}], "unknown key 'frames'; allowed: object, frame, points, labels, box, mask; did you"),
        ([{"object": 1}], "no prompt: give points, a box or a mask"),
        ([POINT | {"points": []}], "no prompt: give points"),
        ([POINT | {"points": [5, 5]}], "points must be [[x, y], ...]"),
        ([POINT | {"points": [[5, "5"]]}], "points must be [[x, y], ...]"),
        ('[{"object": 1, "points": [[5, NaN]]}]', "points must be [[x, y], ...], finite"),
        ([POINT | {"labels": [1, 1]}], "prompt 0: 1 points but 2 labels"),
        ([POINT | {"labels": [9]}], "labels 9: allowed are"),
        ([POINT | {"labels": 1}], "labels must be a list"),
        ([{"object": 1, "box": [9, 9, 5, 5]}], "box [9, 9, 5, 5] has no area"),
        ([{"object": 1, "box": [9, 9, 5]}], "box must be [x0, y0, x1, y1]"),
        ([POINT | {"mask": "m.png"}], "mask must be the name of a file, and the whole prompt"),
        ([POINT, POINT], "prompt 1: object 1 is prompted in frame 0 already"),
        ([POINT, POINT | {"object": 3, "frame": 2, "labels": [0]}],
         "prompt 1: object 3 has background points only, so that it is unknown; known objects: 1"),
    ],
)  # fmt: skip
def test_a_malformed_prompt_is_named_before_anything_is_loaded(write, capsys, content, message):
    for command in ("segment", "track"):
        assert message in failure(capsys, command, "nothing", "--prompts", write(content))


@pytest.mark.parametrize(
    ("command", "prompt", "message"),
    [
        ("track", POINT | {"frame": 24}, "prompt 0: frame 24: the clip has frames 0 to 23"),
        ("segment", POINT | {"frame": 1}, "prompt 0: frame 1: there is only frame 0"),
        ("segment", {"object": 1, "mask": "m.png"}, "prompt 0: a mask prompts an object of a clip"),
        ("track", POINT | {"points": [[300, 5]]}, "prompt 0: points 300,5 lies outside of the picture"),
        ("segment", {"object": 1, "box": [300, 5, 310, 9]}, "prompt 0: box 300,5,310,9 lies outside of the picture"),
    ],
)
def test_a_prompt_outside_of_the_clip_or_image_is_named(write, capsys, command, prompt, message):
    assert message in failure(capsys, command, "scenes:0/0000", "--prompts", write([prompt]))


def test_a_file_of_prompts_is_all_prompts(write, capsys):
    file = write([POINT, POINT | {"object": 2}])
    for command, more in (
        ("segment", ["--points", "1,1"]),
        ("track", ["--box", "1,1,5,5"]),
        ("track", ["--mask", "m.png"]),
        ("track", ["--frame", "3"]),
    ):
        assert "--prompts: the file holds all prompts" in failure(
            capsys, command, "scenes:0/0000", "--prompts", file, *more
        )
    assert "three masks are of one object, but there are 2" in failure(
        capsys, "segment", "scenes:0/0000", "--prompts", file, "--multimask"
    )
    for more in (["--prompts", file], ["--points", "1,1"], ["--multimask"]):
        assert "--everything: it takes no prompt" in failure(capsys, "segment", "scenes:0/0000", "--everything", *more)
    assert "is read; give another name" in failure(
        capsys, "segment", "scenes:0/0000", "--prompts", file, "--json", file
    )

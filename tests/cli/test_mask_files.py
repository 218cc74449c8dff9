"""Masks and pictures that `segment` and `track` write."""

import json
from argparse import Namespace
from dataclasses import asdict
from fractions import Fraction
from inspect import signature
from weakref import ref

import numpy as np
import pytest
from PIL import Image

from sam2jq import AutomaticMaskGenerator
from sam2jq.cli.clip_files import clip_file, frame_rate
from sam2jq.cli.main import main
from sam2jq.cli.mask_files import FrameMasks, check_palette, clip_masks, json_record, labels_of
from sam2jq.cli.track import from_the_last
from sam2jq.config.run import EverythingConfig
from sam2jq.data import draw_clip
from sam2jq.data.coco_masks import decode_mask, encode_mask
from sam2jq.data.masks import read_labels
from sam2jq.data.sa1b import sa1b_image
from sam2jq.data.sav import annotated_mask
from sam2jq.data.video import open_video
from sam2jq.errors import UserError
from sam2jq.files import WriteError, atomic_write
from sam2jq.report.figures import object_color
from tests.conftest import file_limit

from .conftest import failure

MODEL = ["--model.checkpoint", "demo", "--model.image_size", "64"]


def outputs(folder, palette: str) -> list[str]:
    names = {"masks": "masks", "palette": palette, "json": "sa_1.json", "npz": "masks.npz"}
    return [part for flag, name in names.items() for part in (f"--{flag}", str(folder / name))]


@pytest.fixture
def photo(tmp_path) -> str:
    Image.fromarray(draw_clip(0, 1, 64).frames[0][:60]).save(tmp_path / "sa_1.png")
    return str(tmp_path / "sa_1.png")


def test_every_file_of_an_image_holds_the_same_masks(photo, tmp_path):
    prompts = [{"object": 3, "points": [[30, 30]]}, {"object": 7, "box": [5, 5, 40, 40]}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = ["segment", photo, *MODEL, "--prompts", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "o.png")]
    assert main([*command, *outputs(tmp_path, "labels.png")]) == 0
    check_image_files(tmp_path, [3, 7])
    assert not list(tmp_path.glob(".*"))


def check_image_files(folder, objects: list[int]) -> np.ndarray:
    """The masks in the npz, after a comparison with the other files."""
    arrays = np.load(folder / "masks.npz")
    masks = arrays["masks"]
    assert (arrays["objects"].tolist(), masks.shape, masks.dtype) == (objects, (len(objects), 60, 64), bool)
    annotations = sa1b_image(folder / "sa_1.png").annotations
    assert [annotation["id"] for annotation in annotations] == objects
    for number, mask, annotation in zip(objects, masks, annotations):
        np.testing.assert_array_equal(decode_mask(annotation["segmentation"], (60, 64)), mask)
        np.testing.assert_array_equal(annotated_mask(str(folder / f"masks/{number:03d}.png")), mask)
        assert annotation["area"] == mask.sum()
    labels = read_labels(str(folder / "labels.png"))
    np.testing.assert_array_equal(labels > 0, masks.any(0))
    assert all(masks[objects.index(label)][labels == label].all() for label in np.unique(labels) if label)
    return masks


def test_everything_writes_the_records_of_the_generator(photo, tmp_path, capsys):
    command = ["segment", photo, *MODEL, "--out", str(tmp_path / "everything.png"), *outputs(tmp_path, "labels.png")]
    command += ["--everything", "--everything.points_per_side", "3"]
    thresholds = ["--everything.pred_iou_thresh", "0.2", "--everything.stability_score_thresh", "0.3"]
    assert main([*command, *thresholds]) == 0
    record = json.loads((tmp_path / "sa_1.json").read_text())["annotations"][0]
    assert list(record)[2:] == ["area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box"]
    count = len(list((tmp_path / "masks").iterdir()))
    assert f"masks       {count}\n" in capsys.readouterr().out
    check_image_files(tmp_path, list(range(1, count + 1)))
    assert "the folder holds files; give another name" in failure(capsys, *command)
    for file in (tmp_path / "masks").iterdir():
        file.unlink()
    assert main([*command, "--everything.pred_iou_thresh", "0.999"]) == 0
    assert "masks       none: lower --everything.pred_iou_thresh" in capsys.readouterr().out
    check_image_files(tmp_path, [])


def test_the_settings_of_everything_are_those_of_the_generator():
    parameters = signature(AutomaticMaskGenerator.__init__).parameters
    assert {name: parameters[name].default for name in asdict(EverythingConfig())} == asdict(EverythingConfig())
    left_out = {"self", "model", "params", "mask_threshold", "point_grids", "output_mode", "dtype"}
    assert set(parameters) - set(asdict(EverythingConfig())) == left_out


@pytest.fixture
def clip(tmp_path):
    """A folder of four frames whose sides are odd, and a file with prompts of two objects."""
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(draw_clip(0, 4, 64).frames):
        Image.fromarray(frame[:63, :61]).save(tmp_path / "clip" / f"{i:02d}.png")
    prompts = [{"object": 2, "frame": 1, "points": [[30, 30]]}, {"object": 1, "frame": 2, "box": [5, 5, 40, 40]},
               {"object": 2, "frame": 3, "points": [[20, 20]], "labels": [0]}]  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return str(tmp_path / "clip")


def test_every_file_of_a_clip_holds_the_same_masks(clip, tmp_path):
    command = ["track", clip, *MODEL, "--prompts", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "o.mp4")]
    assert main([*command, *outputs(tmp_path, "labels")]) == 0
    arrays = np.load(tmp_path / "masks.npz")
    assert arrays.files == ["objects", "masks/01", "masks/02", "masks/03"]
    objects, content = arrays["objects"].tolist(), json.loads((tmp_path / "sa_1.json").read_text())
    assert objects == [2, 1] == [annotation["id"] for annotation in content["annotations"]]
    assert content["videos"] == [{"id": 1, "file_names": ["00", "01", "02", "03"], "length": 4, "name": "clip",
                                  "height": 63, "width": 61}]  # fmt: skip
    for annotation in content["annotations"]:
        assert [each is None for each in annotation["segmentations"]] == [True, False, False, False]
    for frame in range(1, 4):
        masks = arrays[f"masks/{frame:02d}"]
        assert masks.shape == (2, 63, 61)
        for number, mask, annotation in zip(objects, masks, content["annotations"]):
            np.testing.assert_array_equal(decode_mask(annotation["segmentations"][frame], (63, 61)), mask)
            np.testing.assert_array_equal(annotated_mask(str(tmp_path / f"masks/{number:03d}/{frame:02d}.png")), mask)
        labels = read_labels(str(tmp_path / f"labels/{frame:02d}.png"))
        np.testing.assert_array_equal(labels > 0, masks.any(0))
    video = open_video(str(tmp_path / "o.mp4"))
    assert (len(video), video.size) == (3, (64, 62))


def test_reverse_tracks_from_the_last_prompt_to_frame_0(clip, tmp_path, capsys):
    command = ["track", clip, *MODEL, "--points", "30,30", "--reverse", "--out", str(tmp_path / "o.gif")]
    assert main([*command, "--frame", "2", "--npz", str(tmp_path / "m.npz")]) == 0
    assert np.load(tmp_path / "m.npz").files == ["objects", "masks/00", "masks/01", "masks/02"]
    with Image.open(tmp_path / "o.gif") as picture:
        assert picture.n_frames == 3
    assert "the last prompt is on frame 0" in failure(capsys, *command)


@pytest.mark.parametrize("command", ["segment", "track"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json", "m.txt"], "--json m.txt: give a name that ends in .json"),
        (["--npz", "m.json"], "--npz m.json: give a name that ends in .npz"),
        (["--masks", "file"], "'file': it is a file; give the name of a new folder"),
        (["--masks", "file/m"], "file is not a folder"),
        (["--masks", "folder"], "'folder': the folder holds files; give another name"),
    ],
)
def test_masks_that_cannot_be_written_are_an_error_before_anything_is_read(
    tmp_path, capsys, monkeypatch, command, more, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/file"):
        (tmp_path / name).write_text("")
    assert message in failure(capsys, command, "nothing", "--points", "5,5", *more)


def test_label_images_are_a_file_of_an_image_and_a_folder_of_a_clip(capsys):
    prompt = ["nothing", "--points", "5,5", "--palette"]
    assert "--palette p.gif: give a name that ends in .png" in failure(capsys, "segment", *prompt, "p.gif")
    assert "--palette m.png: --out is the same file" in failure(capsys, "segment", *prompt, "m.png", "--out", "m.png")
    assert "nothing: no such file" in failure(capsys, "track", *prompt, "p.gif")


def test_a_palette_holds_255_objects():
    check_palette("p.png", range(1, 256))
    with pytest.raises(UserError, match="--palette p.png: object 256, but a palette has 255 at most; use --json"):
        check_palette("p.png", range(1, 257))


def test_a_stability_that_is_not_defined_is_null():
    record = {"id": 1, "segmentation": np.zeros((2, 2), bool), "bbox": [0.0] * 4, "stability_score": float("nan")}
    text = json.dumps(json_record(record), allow_nan=False)
    assert list(json.loads(text).items())[2:] == [("bbox", [0.0] * 4), ("stability_score", None)]


def test_the_highest_score_is_in_front():
    scores = np.array([[[1.0, 2, 0, -1]], [[2.0, 1, -1, -2]]])
    assert labels_of([5, 300], scores).tolist() == [[300, 5, 0, 0]]
    assert labels_of([], scores[:0]).tolist() == [[0, 0, 0, 0]]


NOISE = np.random.default_rng(0).random((4, 2, 96, 128)) < 0.5  # masks of two objects in four frames
FRAMES = [FrameMasks(str(i), masks, masks[0] * 1) for i, masks in enumerate(NOISE)]


@pytest.mark.parametrize("name", ["o.mp4", "o.gif", "o.jpg"])
def test_a_full_disk_is_one_line_and_leaves_no_clip(tmp_path, name):
    def write():
        with clip_file(tmp_path / name, Fraction(24), len(FRAMES)) as add:
            for frame in FRAMES:
                add(Image.fromarray(frame.labels.astype(np.uint8) * 255).convert("RGB"))

    with pytest.raises(WriteError, match=r"^cannot write [^:]*: [^:]*$"), file_limit(1000):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["masks", "palette", "json", "npz"])
def test_a_full_disk_is_one_line_and_leaves_no_masks(tmp_path, flag):
    """Nor another file that is written in the same block."""
    args = Namespace(**dict.fromkeys(("masks", "palette", "json", "npz")) | {flag: str(tmp_path / flag)})

    def write():
        with atomic_write(tmp_path / "other"), clip_masks(args, "clip", list("0123"), [1, 2]) as add:
            for frame in FRAMES:
                add(frame)

    where = "masks to [^:]*" if flag == "json" else f"[^:]*{flag}"  # a json's masks wait in a temporary file
    with pytest.raises(WriteError, match=rf"^cannot write {where}: [^:]*$"), file_limit(1000):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_frame_rate_of_a_video_is_kept(tmp_path):
    with clip_file(tmp_path / "o.mp4", Fraction(30000, 1001), 5) as add:
        for shade in range(0, 250, 50):
            add(Image.new("RGB", (64, 48), (shade, 0, 0)))
    assert frame_rate(str(tmp_path / "o.mp4")) == Fraction(30000, 1001)
    assert frame_rate("scenes:0/0000") == 24
    assert [frame[20, 20, 0] // 45 for frame in open_video(str(tmp_path / "o.mp4"))] == [0, 1, 2, 3, 4]


SHADES = [Image.new("RGB", (64, 48), (shade, 0, 0)) for shade in (0, 50, 50, 200)]


def test_a_gif_shows_each_picture_as_long(tmp_path):
    """Also one that is equal to the last one, and one that differs in a corner only."""
    corner = SHADES[3].copy()
    corner.paste((0, 255, 0), (60, 40, 64, 48))
    with clip_file(tmp_path / "o.gif", Fraction(25), 5) as add:
        for picture in (*SHADES, corner):
            add(picture)
    with Image.open(tmp_path / "o.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (5, (64, 48), 0)
        for number, picture in enumerate((*SHADES, corner)):
            gif.seek(number)
            assert gif.info["duration"] == 40
            np.testing.assert_array_equal(gif.convert("RGB"), picture)


@pytest.mark.parametrize("name", ["o.gif", "o.png"])
def test_pictures_of_a_clip_are_not_kept(tmp_path, name):
    """A strip keeps those that it shows."""
    made, most = [], 0
    with clip_file(tmp_path / name, Fraction(24), 40) as add:
        for shade in range(40):
            picture = Image.new("RGB", (8, 8), (shade, 0, 0))
            made.append(ref(picture))
            add(picture)
            most = max(most, sum(each() is not None for each in made))
    assert most <= (2 if name == "o.gif" else 9)


def test_masks_in_reverse_wait_in_a_file():
    masks = np.random.default_rng(0).random((5, 2, 4, 6)) < 0.5
    found = [(9 - i, FrameMasks(str(9 - i), each, each[0] * np.int16(300))) for i, each in enumerate(masks)]
    back = list(from_the_last(iter(found)))
    assert [frame for frame, _ in back] == [5, 6, 7, 8, 9]
    for (_, got), (_, expected) in zip(back, reversed(found)):
        assert got.name == expected.name
        np.testing.assert_array_equal(got.masks, expected.masks)
        np.testing.assert_array_equal(got.labels, expected.labels)
    assert back[0][1].labels.dtype == np.int16


def test_the_json_of_a_clip_is_that_of_all_masks_at_once(tmp_path):
    args = Namespace(**dict.fromkeys(("masks", "palette", "npz")), json=str(tmp_path / "m.json"))
    with clip_masks(args, "a/clip.mp4", list("01234"), [3, 7]) as add:
        for frame in FRAMES:
            add(frame)
    content = json.loads((tmp_path / "m.json").read_text())
    assert list(content) == ["videos", "categories", "annotations"]
    assert content["videos"][0] | {"name": "clip.mp4", "width": 128, "height": 96, "length": 5} == content["videos"][0]
    for i, annotation in enumerate(content["annotations"]):
        fixed = {"id": (3, 7)[i], "video_id": 1, "category_id": 1, "iscrowd": 0}
        assert {key: annotation[key] for key in fixed} == fixed
        masks = [*NOISE[:, i], None]
        assert annotation["segmentations"] == [None if mask is None else encode_mask(mask) for mask in masks]
        assert annotation["areas"] == [None if mask is None else mask.sum() for mask in masks]
        assert annotation["bboxes"][4] is None
        assert len(annotation["bboxes"][0]) == 4


def test_colors_of_objects_stay_apart():
    colors = np.array([object_color(i) for i in range(24)])
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1)
    assert distances[np.triu_indices(24, 1)].min() > 25

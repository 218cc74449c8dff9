import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.masks import check_sharp, read_labels
from sam2jq.data.sav import annotated_mask, object_masks, read_mask, vos_videos, write_mask
from sam2jq.data.video import find_frames
from sam2jq.errors import UserError

SIZE = (6, 9)


def random_mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(SIZE) < 0.5


def write_clip(split: Path, video: str, frames: int, objects: dict[str, list[int]]) -> None:
    """Writes a clip; objects: {name: frames with a mask}."""
    folder = split / "JPEGImages_24fps" / video
    folder.mkdir(parents=True)
    for frame in range(frames):
        Image.new("RGB", SIZE[::-1]).save(folder / f"{frame:05d}.jpg")
    for name, annotated in objects.items():
        for frame in annotated:
            write_mask(str(split / "Annotations_6fps" / video / name / f"{frame:05d}.png"), random_mask(frame))


@pytest.fixture
def root(tmp_path) -> Path:
    """SA-V with one split of two clips, and one without masks."""
    write_clip(tmp_path / "sav_val", "v", 9, {"001": [4, 8], "000": [0, 4, 8]})
    write_clip(tmp_path / "sav_val", "u", 3, {"000": [0]})
    write_clip(tmp_path / "sav_train", "w", 2, {})
    return tmp_path


def names(root: Path) -> list[str]:
    return [video.name for video in vos_videos(str(root), "sav_val")]


def test_a_mask_belongs_to_the_frame_of_its_name(root):
    first, second = vos_videos(str(root), "sav_val")
    assert (first.name, second.name) == ("u", "v")
    assert {name: list(masks) for name, masks in second.objects.items()} == {"000": [0, 4, 8], "001": [4, 8]}
    assert list(second.objects) == ["000", "001"]
    frames = find_frames(second.frames)
    for masks in second.objects.values():
        for index, path in masks.items():
            assert Path(path).stem == Path(frames[index]).stem
            np.testing.assert_array_equal(read_mask(path, SIZE), random_mask(index))


def test_frame_indices_start_at_zero_for_any_first_number(root):
    for frame in range(4):
        (root / f"sav_val/JPEGImages_24fps/v/{frame:05d}.jpg").unlink()
    (root / "sav_val/Annotations_6fps/v/000/00000.png").unlink()
    assert list(vos_videos(str(root), "sav_val")[1].objects["000"]) == [0, 4]


def test_the_list_of_a_split_selects_and_orders_its_videos(root):
    (root / "sav_val.txt").write_text("\ufeffv\nu\n", encoding="utf-8")  # as Windows' editors begin a file
    assert names(root) == ["v", "u"]
    (root / "sav_val/sav_val.txt").write_text("\n v \n")
    assert names(root) == ["v"]


@pytest.mark.parametrize(
    ("mode", "values"),
    [("L", [0, 255]), ("L", [0, 1]), ("L", [0, 7]), ("P", [0, 3]), ("1", [0, 255]), ("I;16", [0, 60000])],
)
def test_a_mask_is_true_where_the_file_is_not_zero(tmp_path, mode, values):
    mask, path = random_mask(), str(tmp_path / "mask.png")
    pixels = np.where(mask, values[1], values[0]).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([0, 0, 0] * 4)  # black on black: the index counts, not the colour
    (image.convert("1") if mode == "1" else image).save(path)
    assert Image.open(path).mode == mode
    got = read_mask(path)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, mask)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("logits.tif", np.linspace(-10, 10, 54, dtype=np.float32), "holds floats or negative numbers, as logits do"),
        ("soft.tif", np.linspace(0, 1, 54, dtype=np.float32), "holds floats or negative numbers"),
        ("signed.tif", np.arange(-27, 27, dtype=np.int32), "holds floats or negative numbers"),
        ("all.png", np.arange(54, dtype=np.uint8) % 3, "holds 2 objects, 1, 2; a mask file in SA-V's layout holds one"),
    ],
)
def test_a_file_that_is_no_mask_of_one_object_is_refused_by_name(tmp_path, name, pixels, message):
    image = Image.fromarray(pixels.reshape(SIZE))
    if name == "all.png":
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_mask(str(tmp_path / name))


@pytest.mark.parametrize("mask", [random_mask(), np.zeros(SIZE, bool), np.ones(SIZE, bool)])
def test_a_written_mask_is_read_unchanged_here_and_by_pil(tmp_path, mask):
    path = str(tmp_path / "video/000/00000.png")
    write_mask(path, mask)
    np.testing.assert_array_equal(annotated_mask(path, SIZE), mask)
    image = Image.open(path)
    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.array(image), mask.astype(np.uint8))


def test_real_masks_lie_on_every_fourth_frame(shared):
    videos = vos_videos(str(shared / "data/sa-v"), "sav_val")
    assert [video.name for video in videos] == ["dog", "car-shadow", "motocross-jump", "libby"]
    for video in videos:
        count = len(find_frames(video.frames))
        assert list(video.objects) == ["000"]
        assert list(video.objects["000"]) == list(range(0, count, 4))
        assert 0.001 < read_mask(video.objects["000"][0], (480, 854)).mean() < 0.5


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ("sav_train", FileNotFoundError, "sav_train: has no folder Annotations_6fps; splits that have both: sav_val$"),
        ("test", FileNotFoundError, "test: has no folder JPEG.* and no Anno.*; splits that have both: sav_val$"),
    ],
)
def test_a_split_without_frames_and_masks_is_an_error(root, split, error, message):
    with pytest.raises(error, match=message):
        vos_videos(str(root), split)


def test_a_missing_root_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such folder; give the SA-V folder that holds sav_val"):
        vos_videos(str(tmp_path / "gone"), "sav_val")


@pytest.mark.parametrize(
    ("emptied", "kept", "error", "message"),
    [
        ("JPEGImages_24fps/u", True, FileNotFoundError, "u: holds no frame"),
        ("JPEGImages_24fps/u", False, FileNotFoundError, "sav_val: has no folder JPEGImages_24fps/u; put"),
        ("Annotations_6fps/u", False, FileNotFoundError, "sav_val: has no folder Annotations_6fps/u; put"),
        ("Annotations_6fps/u", True, FileNotFoundError, "u: holds no object; each needs .* 000/00000.png"),
        ("Annotations_6fps/v/001", True, FileNotFoundError, "001: holds no mask; put"),
    ],
)
def test_a_listed_video_without_frames_or_masks_is_an_error(root, emptied, kept, error, message):
    (root / "sav_val.txt").write_text("u\nv\n")
    shutil.rmtree(root / "sav_val" / emptied)
    if kept:
        (root / "sav_val" / emptied).mkdir()
    with pytest.raises(error, match=message) as raised:
        vos_videos(str(root), "sav_val")
    assert "\n" not in str(raised.value)


def test_a_mask_without_its_frame_is_an_error(root):
    (root / "sav_val/JPEGImages_24fps/v/00004.jpg").unlink()
    with pytest.raises(ValueError, match="v.000: no frame belongs to 00004.png; add"):
        vos_videos(str(root), "sav_val")


def test_masks_that_are_not_png_or_twice_are_named(root):
    folder = root / "sav_val/Annotations_6fps/v/000"
    shutil.copy(folder / "00000.png", folder / "00000.PNG")
    with pytest.raises(UserError, match="000: 00000.PNG and another file are masks of one frame; remove one"):
        vos_videos(str(root), "sav_val")
    (folder / "00000.PNG").unlink()
    Image.fromarray(random_mask()).save(folder / "00001.bmp")
    with pytest.raises(UserError, match="000: holds 00001.bmp; masks must be png files: convert them, or move them"):
        vos_videos(str(root), "sav_val")


def test_foreign_and_empty_folders_are_no_clips_and_no_objects(root):
    for folder in ("JPEGImages_24fps/.ipynb_checkpoints", "JPEGImages_24fps/__MACOSX", "JPEGImages_24fps/empty"):
        (root / "sav_val" / folder).mkdir()
    (root / "sav_val/Annotations_6fps/v/.ipynb_checkpoints").mkdir()
    (root / "sav_val/JPEGImages_24fps/Thumbs.db").touch()
    assert names(root) == ["u", "v"]
    assert list(vos_videos(str(root), "sav_val")[1].objects) == ["000", "001"]


def test_a_video_twice_in_a_list_is_an_error(root):
    """Its objects would count twice in the score."""
    (root / "sav_val.txt").write_text("u\n\nv\nu \n")
    with pytest.raises(UserError, match=r"sav_val.txt: lines 1 and 4 are both 'u'; remove one of them"):
        vos_videos(str(root), "sav_val")


def test_masks_of_a_video_without_frames_are_named(root):
    """Its objects would be missing in the score."""
    write_mask(root / "sav_val/Annotations_6fps/w/000/00000.png", random_mask())
    with pytest.raises(FileNotFoundError, match="sav_val: has no folder JPEGImages_24fps/w; put it there"):
        vos_videos(str(root), "sav_val")


def test_a_list_that_is_not_in_utf_8_is_named(root):
    (root / "sav_val.txt").write_text("u\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"sav_val.txt: not a text in UTF-8 \(invalid start byte 0\); save it in UTF-8"):
        vos_videos(str(root), "sav_val")


def test_an_empty_list_is_an_error(root):
    (root / "sav_val.txt").write_text("\n")
    with pytest.raises(ValueError, match="sav_val.txt: names no video"):
        vos_videos(str(root), "sav_val")


def test_only_a_mask_of_its_frames_size_is_read(tmp_path):
    write_mask(str(tmp_path / "0.png"), random_mask())
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("no image")
    with pytest.raises(ValueError, match="0.png: 9 x 6 pixels, but its frame has 6 x 9"):
        read_mask(str(tmp_path / "0.png"), SIZE[::-1])
    with pytest.raises(ValueError, match="1.png: not a mask but an image with 3 channels"):
        read_mask(str(tmp_path / "1.png"))
    with pytest.raises(ValueError, match="2.png: not a readable image"):
        read_mask(str(tmp_path / "2.png"))


@pytest.mark.parametrize("mask", [np.zeros(SIZE, np.uint8), np.zeros((1, *SIZE), bool)])
def test_only_bool_masks_are_written(tmp_path, mask):
    with pytest.raises(ValueError, match=r"a.png: a mask must be bool \[H, W\], got"):
        write_mask(str(tmp_path / "a.png"), mask)


@pytest.mark.parametrize("line", ["../../../x", "..", "/etc", "u/../v", "a/b", "a\\b", "."])
def test_a_listed_video_must_be_a_folders_name(root, line):
    """The name is part of the path that `evaluate` writes masks to."""
    (root / "sav_val.txt").write_text(f"u\n{line}\n")
    with pytest.raises(UserError, match=r"sav_val\.txt: .*(leads out of its folder|without a path)"):
        vos_videos(str(root), "sav_val")


def test_a_mask_whose_palette_is_inverted_is_an_error(tmp_path):
    """Programs that choose a palette put the most frequent or the brightest color first."""
    mask = np.tile([[True], [False]], (2, 4))
    Image.fromarray(mask).convert("L").quantize(2).save(tmp_path / "chosen.png")
    with pytest.raises(UserError, match=r"chosen.png: index 0 of its palette, .*, is its brightest color; save"):
        read_mask(str(tmp_path / "chosen.png"))
    write_mask(tmp_path / "ours.png", mask)
    np.testing.assert_array_equal(read_mask(str(tmp_path / "ours.png")), mask)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"format": "JPEG"}, "JPEG"),
        ({"format": "JPEG2000", "irreversible": True, "quality_layers": [20]}, "JPEG2000"),
        ({"format": "TIFF", "compression": "jpeg"}, "JPEG in a TIFF"),
    ],
)
def test_a_mask_in_a_lossy_format_is_refused_whatever_its_name(tmp_path, options, name):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png", **options)
    with pytest.raises(UserError, match=f"mask.png: {name} changes the values"):
        read_labels(str(tmp_path / "mask.png"))


def test_a_mask_in_a_lossless_tiff_is_read(tmp_path):
    Image.fromarray(np.eye(*SIZE, dtype=np.uint8)).save(tmp_path / "mask.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_labels(str(tmp_path / "mask.tif")), np.eye(*SIZE))


def disc_mask(scale: float = 1, resample=Image.Resampling.BILINEAR) -> np.ndarray:
    """uint8, 255 in a disc, resized."""
    y, x = np.mgrid[:64, :64]
    disc = Image.fromarray(np.where((x - 30) ** 2 + (y - 33) ** 2 < 400, 255, 0).astype(np.uint8))
    return np.array(disc.resize((round(64 * scale),) * 2, resample))


@pytest.mark.parametrize("scale", [0.5, 0.7, 3])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_a_soft_label_image_is_refused_and_a_soft_mask_is_the_object_where_it_is_not_0(tmp_path, scale, resample):
    soft, path = disc_mask(scale, resample), str(tmp_path / "soft.png")
    Image.fromarray(soft).save(path)
    with pytest.raises(UserError, match=r"soft.png: most of its .* are no objects but soft edges.*; resize the"):
        check_sharp(path, read_labels(path))
    np.testing.assert_array_equal(read_mask(path), soft > 0)
    check_sharp(path, disc_mask(scale, Image.Resampling.NEAREST))


def test_a_label_image_with_thin_objects_is_sharp():
    labels = np.zeros((20, 30), np.int64)
    for label in range(1, 6):
        labels[3 * label, 2:9] = labels[3 * label, 12:14] = labels[3 * label + 1, 12:14] = label
    check_sharp("thin.png", labels)
    labels[17] = 6
    labels[:, 29] = 7
    check_sharp("thin.png", labels)


@pytest.mark.parametrize(
    ("rows", "objects"), [([1, 1, 1, 0, 2, 2], "1, 2"), ([1, 1, 1, 255, 0, 0], "1, 255"), ([2, 2, 2, 0, 1, 0], "1, 2")]
)
def test_grey_labels_of_several_objects_are_no_mask_of_one(tmp_path, rows, objects):
    path = str(tmp_path / "0.png")
    Image.fromarray(np.repeat(np.array(rows, np.uint8)[:, None], SIZE[1], 1)).save(path)
    with pytest.raises(UserError, match=f"0.png: holds 2 objects, {objects}; .* one: save the one that is meant"):
        read_mask(path)


@pytest.mark.parametrize("quality", [50, 80, 95])
def test_a_png_made_from_a_jpeg_is_no_mask(tmp_path, quality):
    """JPEG leaves small values around the object, which would be a part of it."""
    Image.fromarray(disc_mask()).save(tmp_path / "0.jpg", quality=quality)
    Image.open(tmp_path / "0.jpg").save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0.png: holds \d+ objects"):
        read_mask(str(tmp_path / "0.png"))
    with pytest.raises(UserError, match="0.png: most of its .* are no objects but soft edges, .* JPEG"):
        check_sharp("0.png", read_labels(str(tmp_path / "0.png")))


def test_a_mask_to_track_holds_an_object_and_one_of_the_data_may_be_empty(tmp_path):
    path = str(tmp_path / "0.png")
    write_mask(path, np.zeros(SIZE, bool))
    with pytest.raises(UserError, match="0.png: holds no object, all its pixels are 0; give a mask"):
        read_mask(path)
    assert not object_masks({"000": {0: path}}, SIZE)["000"][0].any()


@pytest.mark.parametrize(("values", "valid"), [((128, 255), False), ((0, 128, 255), True), ((255,), True)])
def test_a_mask_of_several_values_has_a_0(tmp_path, values, valid):
    """A mask of the values 128 and 255 would be an object that fills the image."""
    path = str(tmp_path / "0.png")
    labels = np.resize(np.array(values, np.uint8), SIZE)
    Image.fromarray(labels).save(path)
    if valid:
        np.testing.assert_array_equal(read_mask(path), labels > 0)
    else:
        with pytest.raises(UserError, match="0.png: holds the values 128, 255, and no 0; a mask must be 0 where"):
            read_mask(path)

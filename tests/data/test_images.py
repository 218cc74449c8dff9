import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq import ImagePredictor, VideoPredictor, build
from sam2jq.data import draw_scene, find_images, preprocess, read_image
from sam2jq.data.images import rgb_pixels
from sam2jq.data.loader import find_items
from sam2jq.data.synthetic.names import scene_seed
from sam2jq.data.video import open_video
from sam2jq.errors import UserError
from sam2jq.models.sam2 import abstract_params


def write_images(root: Path, *names: str) -> Path:
    """`root`, after writing a small random image under each name, all different."""
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(8, 12, seed=index)).save(root / name)
    return root


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def names_in(root: Path) -> list[str]:
    return [Path(name).relative_to(root).as_posix() for name in find_images(str(root), None, 0)]


def test_a_folder_gives_all_images_below_it_except_hidden_ones_and_masks(tmp_path):
    images = ["a.jpg", "b/c.PNG", "b/d/e.webp", "f.JPEG", "g.bmp"]
    write_images(tmp_path, *images, ".h.jpg", ".i/j.jpg", "b/annotations/k.png", "sav_val/Annotations_6fps/v/000/0.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert names_in(tmp_path) == images


def test_an_sa1b_folder_holds_its_jpgs(tmp_path):
    write_images(tmp_path, "sa_1.jpg", "sa_2.jpg")
    write_json(tmp_path / "sa_1.json", {"image": {"file_name": "sa_1.jpg"}, "annotations": []})
    assert names_in(tmp_path) == ["sa_1.jpg", "sa_2.jpg"]


def test_a_coco_folder_gives_the_images_that_its_annotations_list_anywhere_below_it(tmp_path):
    write_images(tmp_path, "train/1.jpg", "val/deep/2.jpg", "val/3.jpg", "train/3.jpg", "train/unnamed.jpg")
    for number, names in enumerate([["1.jpg", "gone.jpg"], ["./deep/2.jpg", "val/3.jpg"]]):
        write_json(tmp_path / f"annotations/{number}.json", {"images": [{"file_name": name} for name in names]})
    write_json(tmp_path / "annotations/other.json", {"images": [{"file_name": "elsewhere.jpg"}]})
    assert names_in(tmp_path) == ["train/1.jpg", "val/3.jpg", "val/deep/2.jpg"]


@pytest.mark.parametrize("content", [{"video_id": "v", "masklet": []}, {"images": 3}, {"images": [4]}, [5]])
def test_a_folder_whose_annotations_name_no_images_is_a_plain_one(tmp_path, content):
    write_images(tmp_path, "a.jpg")
    write_json(tmp_path / "annotations/video.json", content)
    assert names_in(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("below", ["", "sav_val", "sav_val/JPEGImages_24fps", "sav_val/JPEGImages_24fps/v"])
def test_sav_folders_give_their_frames_only(tmp_path, below):
    val = [f"sav_val/JPEGImages_24fps/v/{frame:05d}.jpg" for frame in range(3)]
    train = ["sav_train/JPEGImages_24fps/w/00000.jpg"]
    write_images(tmp_path, *val, *train, "cover.png", "sav_val/cover.png", "sav_val/Annotations_6fps/v/000/00000.png")
    write_json(tmp_path / "annotations/v_manual.json", {"video_id": "v", "masklet": []})
    root = tmp_path / below
    frames = val if below else sorted(val + train)
    assert names_in(root) == [(tmp_path / frame).relative_to(root).as_posix() for frame in frames]


@pytest.mark.parametrize(
    ("folder", "suffix", "count"),
    [("coco", ".jpg", 128), ("images", ".jpg", 3), ("sa-v", ".jpg", 385), ("sa-v/sav_val", ".jpg", None)],
)
def test_real_folders_hold_readable_images(shared, folder, suffix, count):
    names = find_images(str(shared / "data" / folder), None, 0)
    assert count in (None, len(names))
    assert {Path(name).suffix for name in names} == {suffix}
    assert folder != "sa-v/sav_val" or all("/JPEGImages_24fps/" in name for name in names)
    assert read_image(names[0]).ndim == 3


def test_an_image_file_gives_itself(tmp_path):
    name = str(write_images(tmp_path, "a.jpg") / "a.jpg")
    assert find_images(name, 5, 0) == [name]


def test_a_sample_is_determined_by_the_seed_and_has_no_repeats(tmp_path):
    root = str(write_images(tmp_path, *(f"{index}.bmp" for index in range(30))))
    every = find_images(root, None, 0)
    sample = find_images(root, 10, 1)
    assert sample == sorted(set(sample)) == find_images(root, 10, 1)
    assert len(sample) == 10
    assert set(sample) < set(every)
    assert sample != find_images(root, 10, 2)
    assert find_images(root, 31, 1) == every


def test_scenes_are_named_after_their_seed_and_no_two_are_the_same():
    assert find_images("scenes:7", 2, 0) == ["scenes:7/0000", "scenes:7/0001"]
    np.testing.assert_array_equal(read_image("scenes:0/0005"), draw_scene(5).image)
    names = [name for seed in range(3) for name in find_images(f"scenes:{seed}", 10_002, 0)]
    assert len({scene_seed(name) for name in names}) == len(names)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_pixels_are_those_of_pil_and_exif_does_not_rotate_them(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.fromarray(random_image(20, 30)).convert(mode).save(path, exif=exif)
    image = read_image(str(path))
    assert (image.shape, image.dtype) == ((20, 30, 3), np.uint8)
    np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))


RAMP = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_scaled_by_the_range_of_their_type(tmp_path, suffix):
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(RAMP).save(path)
    image = read_image(str(path))
    np.testing.assert_array_equal(image, np.repeat((RAMP >> 8)[..., None], 3, -1))
    assert abs(image.mean() - 127.5) < 0.5


@pytest.mark.parametrize("maxval", [65535, 4095])
def test_a_16_bit_pgm_is_scaled_by_its_own_range(tmp_path, maxval):
    header = f"P5 {RAMP.shape[1]} {RAMP.shape[0]} {maxval}\n".encode()
    values = np.rint(RAMP / 65535 * maxval)
    (tmp_path / "a.pgm").write_bytes(header + values.astype(">u2").tobytes())
    expected = np.rint(values / maxval * 65535).astype(int) >> 8
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.pgm")), np.repeat(expected[..., None], 3, -1))


def png16(path: Path, pixels: np.ndarray) -> None:
    """Writes a png of 16 bits a channel, [H, W, 2 (grey, alpha), 3 or 4], which PIL cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_a_channel_are_scaled_and_alpha_is_ignored(tmp_path, channels):
    pixels = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP // 2][:channels], -1)
    png16(tmp_path / "a.png", pixels)
    expected = pixels[..., [0, 0, 0]] if channels == 2 else pixels[..., :3]
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), expected >> 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("float.tif", "its pixels are floats, whose range is unknown; scale them to 8 bits"),
        ("int32.tif", "its pixels are integers of 32 bits, whose range is unknown"),
        ("inverted.tif", "its pixels are of mode I;16, whose range is unknown"),
        ("pages.tif", "holds 2 images, not one; save the one that is meant"),
        ("moving.webp", "holds 2 images, not one"),
        ("moving.png", "holds 2 images, not one"),
    ],
)
def test_pixels_of_unknown_range_and_several_images_are_refused_by_name(tmp_path, name, message):
    pages = [Image.fromarray(random_image(8, 9, seed)) for seed in range(2)]
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.int32) * 30000).save(tmp_path / "int32.tif")
    Image.fromarray(RAMP).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    for several in ("pages.tif", "moving.webp", "moving.png"):
        pages[0].save(tmp_path / several, save_all=True, append_images=pages[1:], lossless=True)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_image(str(tmp_path / name))


def test_pil_images_are_converted_as_files_are():
    predictor = ImagePredictor(build("nano"), abstract_params(build("nano")))
    with pytest.raises(UserError, match="the image: its pixels are floats"):
        predictor.set_image(Image.fromarray(np.zeros((4, 4), np.float32)))
    np.testing.assert_array_equal(rgb_pixels(Image.fromarray(RAMP)), np.repeat((RAMP >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_predictors_refuse_arrays_of_other_types_by_name(dtype):
    with pytest.raises(UserError, match=rf"uint8 \[H, W, 3\], got {np.dtype(dtype)} \[4, 4, 3\]"):
        ImagePredictor(build("nano"), abstract_params(build("nano"))).set_image(np.zeros((4, 4, 3), dtype))
    with pytest.raises(UserError, match=rf"uint8 \[T, H, W, 3\] .* got {np.dtype(dtype)}"):
        VideoPredictor(build("nano"), abstract_params(build("nano"))).init_state(np.zeros((2, 4, 4, 3), dtype))


def test_files_of_other_programs_are_passed_over_and_linked_folders_are_followed(tmp_path):
    root = write_images(tmp_path / "root", "a.jpg", "b/c.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/._a.jpg")
    write_images(root, "__MACOSX/b.jpg")
    for name in (".DS_Store", "Thumbs.db", "b/desktop.ini"):
        (root / name).write_bytes(b"no image")
    write_images(tmp_path / "disk", "d.jpg", "e/f.jpg")
    (root / "photos").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(root)  # an endless loop
    (root / "also_b").symlink_to(root / "b")  # the same images twice
    assert names_in(root) == ["a.jpg", "b/c.jpg", "photos/d.jpg", "photos/e/f.jpg"]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "photos").symlink_to("/nowhere/photos")
    with pytest.raises(FileNotFoundError, match="photos: a link to /nowhere/photos, which is not there"):
        names_in(tmp_path)


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(write_images(tmp_path / "photos", "a.jpg") / "a.jpg")]
    assert find_images("~/photos", None, 0) == names
    assert [item.name for item in find_items("~/photos", None, 0)] == names
    assert read_image("~/photos/a.jpg").shape == (8, 12, 3)
    assert open_video("~/photos").size == (8, 12)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_an_error(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_image(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"a.{suffix}: not a readable image .*; remove it or convert it"):
        read_image(str(path))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg: no such file; give the path of an image"):
        read_image(str(tmp_path / "gone.jpg"))


@pytest.mark.parametrize(
    ("spec", "num_samples", "error", "message"),
    [
        ("gone", None, FileNotFoundError, "gone: no such file or folder; give a folder"),
        ("empty", None, FileNotFoundError, "empty: holds no image; looked for .jpg .jpeg .png .webp .bmp"),
        ("full/notes.txt", None, ValueError, "notes.txt: not an image or video file; allowed: .* .jpg"),
        ("full", 0, ValueError, "full: num_samples must be at least 1, got 0"),
        ("sav_val", None, FileNotFoundError, "JPEGImages_24fps: holds no image"),
        ("coco", None, FileNotFoundError, "coco: none of the 1 images .* name lies below .*such as b.jpg"),
        ("broken", None, ValueError, "x.json: broken json .*; download it again"),
    ],
)
def test_an_error_names_the_path_and_the_way_out(tmp_path, spec, num_samples, error, message):
    for folder in ("empty", "sav_val/JPEGImages_24fps", "broken/annotations"):
        (tmp_path / folder).mkdir(parents=True)
    write_images(tmp_path, "full/a.jpg", "coco/a.jpg", "broken/a.jpg", "sav_val/Annotations_6fps/v/000/0.png")
    (tmp_path / "full/notes.txt").write_text("no image")
    (tmp_path / "broken/annotations/x.json").write_text('{"images": [')
    write_json(tmp_path / "coco/annotations/x.json", {"images": [{"file_name": "b.jpg"}]})
    with pytest.raises(error, match=message) as raised:
        find_images(str(tmp_path / spec), num_samples, 0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "num_samples", "message"),
    [
        ("scenes:", 1, "not scenes:<seed>; the seed is a whole number .*like scenes:7"),
        ("scenes:-1", 1, "whole number"),
        ("scenes:1.5", 1, "whole number"),
        ("scenes:1", None, "give num_samples"),
        ("scenes:1", 0, "at least 1, got 0"),
    ],
)
def test_scenes_need_a_seed_and_a_number(spec, num_samples, message):
    with pytest.raises(ValueError, match=f"{spec}: .*{message}"):
        find_images(spec, num_samples, 0)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("shape", [(300, 500), (17, 23), (40, 700), (700, 40), (64, 64)])
def test_preprocess_equals_the_transforms_of_sam2(shape, size):
    """Within 1e-5: both resize in float32 but round their filter weights differently; measured 1.1e-6."""
    pytest.importorskip("torch")
    pytest.importorskip("converters.exports.vanilla").define_torchvision_operators()
    transforms = pytest.importorskip("sam2.utils.transforms")
    image = random_image(*shape)
    expected = transforms.SAM2Transforms(size, mask_threshold=0.0)(image).permute(1, 2, 0).numpy()
    got = preprocess(image, size)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), [1, 2]]
)
def test_preprocess_takes_uint8_rgb_only(image):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], got"):
        preprocess(image, 8)

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import draw_scene, find_images, preprocess, read_image
from sam2jq.data.synthetic.names import scene_seed


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_an_error(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_image(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"a.{suffix}: not a readable image .*; remove it or convert it"):
        read_image(str(path))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gone.jpg: not a readable image .*; remove it"):
        read_image(str(tmp_path / "gone.jpg"))


@pytest.mark.parametrize(
    ("spec", "num_samples", "error", "message"),
    [
        ("gone", None, FileNotFoundError, "gone: no such file or folder; give a folder"),
        ("empty", None, FileNotFoundError, "empty: holds no image; looked for .jpg .jpeg .png .webp .bmp"),
        ("full/notes.txt", None, ValueError, "notes.txt: not an image file; allowed: .* .jpg"),
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
        ("scenes:", 1, "whole number .*like scenes:7"),
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

"""Mutated files: every reader ends in a result, or in one line that names the file."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import find_images, read_image
from sam2jq.data.sav import read_mask
from sam2jq.data.sources import find_samples
from sam2jq.data.video import open_video
from sam2jq.errors import UserError

from .test_video import random_frames, write_video

JUNK = (None, -1, 0, 1e308, float("nan"), 10**30, "", "é", True, [], {}, [[]], [{}], {"a": [1]}, 1e5, -1e5, "../x")


def read_video(path: str) -> None:
    """Decodes all frames."""
    list(open_video(path))


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with some bits flipped, cut, or with a part doubled, or with one byte of its head replaced."""
    changed = bytearray(content)
    first, last = sorted(rng.integers(0, len(content), 2))
    match rng.integers(4):
        case 0:
            for _ in range(rng.integers(1, 20)):
                changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        case 1:
            del changed[first:]
        case 2:
            changed[last:last] = changed[first:last]
        case 3:
            changed[rng.integers(min(300, len(content)))] = rng.integers(256)
    return bytes(changed)


def message(read, path: Path) -> str:
    """What `read` says about `path`; "" if it returns. All other errors than those of users are raised."""
    try:
        read(str(path))
    except (UserError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PIL, about what it reads in broken files
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "mp4", "gif"])
def test_a_mutated_file_is_read_or_named(tmp_path, suffix):
    frames, rng = np.kron(random_frames(4, (4, 6)), np.ones((1, 8, 8, 1), np.uint8)), np.random.default_rng(0)
    path, images = tmp_path / f"a.{suffix}", [Image.fromarray(frame) for frame in frames]
    if suffix == "mp4":
        write_video(path, frames)
    else:
        images[0].save(path, **({"save_all": True, "append_images": images[1:]} if suffix == "gif" else {}))
    content = path.read_bytes()
    readers = [read_video] if suffix in ("mp4", "gif") else [read_image, read_mask]
    for _ in range(150):
        path.write_bytes(mutated(content, rng))
        for read in readers:
            said = message(read, path)
            assert not said or (path.name in said and "\n" not in said)


def nodes(tree, path: tuple = ()):
    """Yields the path of every value below `tree`."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from nodes(child, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["annotations/instances_val.json", "sa_1.json"])
def test_annotations_with_junk_are_read_or_named(tmp_path, file):
    pytest.importorskip("pycocotools")
    Image.new("RGB", (30, 20)).save(tmp_path / "sa_1.jpg")
    image = {"id": 1, "file_name": "sa_1.jpg", "height": 20, "width": 30}
    masks = [
        [[5, 4, 11, 4, 11, 8, 5, 8]],
        {"size": [20, 30], "counts": [9, 591]},
        {"size": [20, 30], "counts": "T3`i0"},
    ]
    fields = {"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [5, 4, 6, 4]}
    annotations = [{"id": i, "segmentation": mask} | fields for i, mask in enumerate(masks)]
    content = {"image": image, "annotations": annotations, "images": [image], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "annotations").mkdir()
    rng, path = np.random.default_rng(0), tmp_path / file
    for _ in range(300):
        tree = copy.deepcopy(content)
        *parents, last = list(nodes(tree))[rng.integers(len(list(nodes(tree))))]
        node = tree
        for key in parents:
            node = node[key]
        node[last] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
        path.write_text(json.dumps(tree))
        assert "\n" not in message(lambda spec: [s.read() for s in find_samples(spec, None, 9)], tmp_path)
        assert "\n" not in message(lambda spec: find_images(spec, 1, 0), tmp_path)


def test_a_video_with_broken_metadata_is_read(tmp_path):
    """ "'utf-8' codec can't decode byte", said PyAV, and named no file."""
    av = pytest.importorskip("av")
    frames = random_frames(2)
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        container.metadata["title"] = "a good title"
        stream = container.add_stream("libx264rgb", rate=24, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert b"a good title" in content
    path.write_bytes(content.replace(b"a good title", b"a \xff\xfe\xf0\x80 title"))
    np.testing.assert_array_equal(list(open_video(str(path))), frames)

"""Clips on disk, a folder of frames or a video file, with lazy access to their frames."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sam2jq.data.images import SUFFIXES, image_size, is_image, read_image
from sam2jq.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")


@dataclass(frozen=True)
class Video:
    """A clip of len(video) frames, video[i]: uint8 [H, W, 3] RGB, read on access.

    names: names of the frames, such as "00012". size: (H, W) in pixels. read(index) -> a frame.
    """

    names: list[str]
    size: tuple[int, int]
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(range(len(self))[index])


def open_video(path: str) -> Video:
    """The clip in a folder of frames or in a video file; seeking backwards in a file is slow, see `forward_reader`.

    Raises FileNotFoundError or UserError if there is no readable clip.
    """
    if path and Path(path).is_dir():
        return open_folder(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path or 'empty path'}: no such file or folder; give a video or a folder of frames")
    if not path.lower().endswith(VIDEO_SUFFIXES):
        raise UserError(f"{path}: not a video; allowed: a folder of frames or a file in {' '.join(VIDEO_SUFFIXES)}")
    return open_file(path)


def video_of(frames: np.ndarray) -> Video:
    """The clip of uint8 frames [T, H, W, 3] in memory."""
    shape, dtype = getattr(frames, "shape", ()), getattr(frames, "dtype", type(frames).__name__)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(f"a clip must be uint8 [T, H, W, 3] with a frame at least, got {dtype} {list(shape)}")
    return Video([f"{index:05d}" for index in range(len(frames))], shape[1:3], lambda index: frames[index])


def find_frames(path: str) -> list[str]:
    """The image files of a folder in natural order: 2.jpg before 10.jpg, frame2.jpg before frame10.jpg.

    It is the order of SAM 2, which accepts only numbers as names. Raises FileNotFoundError if there is no image,
    UserError if two files have the same name with different endings.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a folder of frames")
    files = sorted((file for file in Path(path).iterdir() if is_image(file.name)), key=natural_order)
    if not files:
        raise FileNotFoundError(f"{path}: holds no frame; looked for {' '.join(SUFFIXES)} in it, not in folders below")
    for one, other in itertools.pairwise(files):
        if one.stem == other.stem:
            raise UserError(f"{path}: {one.name} and {other.name} are both frame {one.stem}; remove one of them")
    return list(map(str, files))


def natural_order(file: Path) -> tuple:
    """A sort key under which whole numbers in a name compare as numbers."""
    texts_and_numbers = re.split(r"(\d+)", file.stem)
    return [int(part) if part.isdecimal() else part for part in texts_and_numbers], file.name


def open_folder(path: str) -> Video:
    """The clip in a folder of frames. Raises UserError if frames differ in size."""
    files = find_frames(path)
    size = common_size(files, [image_size(file) for file in files])
    return Video([Path(file).stem for file in files], size, lambda index: read_image(files[index]))


def open_file(path: str) -> Video:
    """The clip in a video file. Decodes the whole file once: its header may hold a wrong number of frames, or none."""
    sizes = [upright_size(frame) for frame in decode(path)]
    if not sizes:
        raise UserError(f"{path}: holds no frame; convert it again or give a folder of frames")
    names = [f"{index:05d}" for index in range(len(sizes))]
    size = common_size([f"{path} frame {name}" for name in names], sizes)
    frame_at = forward_reader(lambda: decode(path))
    return Video(names, size, lambda index: upright_image(frame_at(index)))


def decode(path: str) -> Iterator:
    """Yields the `av.VideoFrame`s of a file's first video stream in display order.

    Raises UserError if PyAV is not installed or the file is not readable.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is a video and that needs the extra eval: pip install 'sam2jq[eval]', or give a folder of frames"
        ) from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video stream; give a video or a folder of frames")
            yield from container.decode(video=0)
    except av.error.FFmpegError as error:
        raise UserError(
            f"{path}: not a readable video ({error.strerror}); convert it again or give a folder of frames"
        ) from error


def quarter_turns(frame) -> int:
    """The number of counterclockwise rotations by 90 degrees that make a frame upright; phones store it as metadata."""
    return round(frame.rotation / 90)


def upright_size(frame) -> tuple[int, int]:
    """(H, W) of a decoded frame after its rotation."""
    size = frame.height, frame.width
    return size[::-1] if quarter_turns(frame) % 2 else size


def upright_image(frame) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a decoded frame after its rotation."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns(frame)))


def common_size(names: list[str], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The (H, W) of all frames. Raises UserError if one has another size."""
    for name, size in zip(names, sizes):
        if size != sizes[0]:
            raise UserError(
                f"{name}: {size[1]} x {size[0]} pixels, but {names[0]} has {sizes[0][1]} x {sizes[0][0]}; "
                "bring all frames of a clip to one size"
            )
    return sizes[0]


def forward_reader(start: Callable[[], Iterator]) -> Callable[[int], object]:
    """read(index) -> that item of the iterator `start()`, which is restarted only for an index below the last one."""
    index, item, items = -1, None, start()

    def read(target: int):
        nonlocal index, item, items
        if target < index:
            index, items = -1, start()
        while index < target:
            index, item = index + 1, next(items)
        return item

    return read

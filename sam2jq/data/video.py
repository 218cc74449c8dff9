"""Clips on disk, a folder of frames or a video file, with lazy access to their frames."""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from sam2jq.data.containers import check_frame, check_whole, errors_named, main_stream, open_container
from sam2jq.data.folders import SUFFIXES, UNREAD, is_image, listed
from sam2jq.data.images import image_size, read_image
from sam2jq.data.read_ahead import read_ahead
from sam2jq.errors import UserError, few
from sam2jq.files import home

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif")
SEEKABLE = (".mp4", ".mov", ".m4v", ".mkv", ".webm")  # formats with an index of key frames
DISPLAY_MATRIX = "DISPLAYMATRIX"


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

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.read, range(len(self)))


def open_video(path: str | os.PathLike) -> Video:
    """The clip in a folder of frames or in a video file, read by a thread that is a few frames ahead.

    Seeking backwards in a file is slow, see `forward_reader`.

    Raises FileNotFoundError or UserError if there is no readable clip.
    """
    path = home(os.fspath(path))
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
    """The image files of a folder in the order of SAM 2: by int(name) if all names are whole numbers, also with a sign.

    SAM 2 accepts no other names. They are sorted in natural order: frame2.jpg before frame10.jpg.
    Raises FileNotFoundError if there is no image, UserError if only some names are numbers (others may be masks), or
    two files have the same name with different endings, or the same number, or a frame is of a type that is not read.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a folder of frames")
    content = listed(Path(path))
    files = [file for file in content if is_image(file.name)]
    if not files:
        raise FileNotFoundError(f"{path}: holds no frame; looked for {' '.join(SUFFIXES)} in it, not in folders below")
    stems = {file.stem for file in files}
    unread = [file.name for file in content if file.suffix.lower() in UNREAD and file.stem not in stems]
    if unread:
        raise UserError(f"{path}: {few(unread, 3)} cannot be read; convert all frames to jpg or png, or move it away")
    others = [file.name for file in files if frame_number(file) is None]
    numbered = not others
    if 0 < len(others) < len(files):
        number = next(file.name for file in files if file.name not in others)
        raise UserError(
            f"{path}: {number} has the number of a frame, but not {few(others, 3)}; move what is no frame, such as "
            "masks, to another folder, or number all frames"
        )
    check_names(path, others)
    files = sorted(files, key=frame_number if numbered else natural_order)
    for one, other in itertools.pairwise(files):
        if one.stem == other.stem or (numbered and frame_number(one) == frame_number(other)):
            raise UserError(f"{path}: {one.name} and {other.name} are both frame {one.stem}; remove one of them")
    return list(map(str, files))


def check_names(path: str, names: list[str]) -> None:
    """Raises UserError if the names of frames without a whole number have no certain order, or are not all of frames.

    Natural order takes 1.12 for later than 1.2, t-1 for later than t0, and a mask or a depth map beside its frame for
    the next frame.
    """
    way_out = "number the frames 0, 1, 2, ..."
    fraction, by_name = r"(\d+(?:\.\d+)?)", lambda name: natural_order(Path(name))
    if sorted(names, key=by_name) != sorted(names, key=lambda name: natural_order(Path(name), fraction)):
        name = next(name for name in names if re.search(r"\d\.\d", name))
        raise UserError(f"{path}: {name} has a number with a fraction; {way_out}")
    signs = defaultdict(dict)  # {text without signs: {text: a name}}, with 0 for each number
    for name in names:
        text = re.sub(r"\d+", "0", Path(name).stem)
        signs[re.sub(r"[-+](?=0)", "", text)].setdefault(text, name)
    for alike in signs.values():
        if len(alike) > 1:
            raise UserError(f"{path}: {alike[min(alike)]} has a sign where other names have none or another; {way_out}")
    masks = [name for name in names if "mask" in Path(name).stem.lower()]
    if 0 < len(masks) < len(names):
        raise UserError(f"{path}: {few(masks, 3)} looks like a mask beside the frames; move masks to another folder")
    by_numbers = defaultdict(list)
    for name in names:
        by_numbers[tuple(map(int, re.findall(r"[0-9]+", Path(name).stem)))].append(name)
    for numbers, same in by_numbers.items():
        if numbers and len({Path(name).stem for name in same}) > 1:  # such as s_000.png and s_000_L.png
            raise UserError(
                f"{path}: {few(same, 3)} have the same number; move what is no frame, such as masks, to another folder"
            )


def frame_number(file: Path) -> int | None:
    """The whole number that is a file's name without its ending; None if it is no number."""
    try:
        return int(file.stem)
    except ValueError:
        return None


def natural_order(file: Path, number: str = r"(\d+)") -> tuple:
    """A sort key under which numbers in a name compare as numbers, and capitals as small letters.

    number: the pattern of a number, as a group.
    """
    texts_and_numbers = re.split(number, file.stem.lower())
    return [part if i % 2 == 0 else Fraction(part) for i, part in enumerate(texts_and_numbers)], file.name


def open_folder(path: str) -> Video:
    """The clip in a folder of frames. Raises UserError if frames differ in size."""
    files = find_frames(path)
    size = common_size(files, [image_size(file) for file in files])
    return Video([Path(file).stem for file in files], size, read_ahead(lambda i: read_image(files[i]), len(files)))


def open_file(path: str) -> Video:
    """The clip in a video file. Decodes the whole file once: its header may hold a wrong number of frames, or none.

    Raises UserError if it is cut or damaged, as far as `check_whole` finds it.
    """
    check_whole(path)
    sizes, times, keys = [], [], []
    for frame in decode(path):
        keys += [len(sizes)] * frame.key_frame
        sizes.append(upright_size(frame))
        times.append(frame.pts)
    if not sizes:
        raise UserError(f"{path}: holds no frame; convert it again or give a folder of frames")
    names = [f"{index:05d}" for index in range(len(sizes))]
    size = common_size([f"{path} frame {name}" for name in names], sizes)
    frame_at = frame_reader(path, times, keys)

    def read(index: int) -> np.ndarray:
        with errors_named(path):
            return upright_image(frame_at(index))

    return Video(names, size, read_ahead(read, len(names)))


def decode(path: str) -> Iterator:
    """Yields the `av.VideoFrame`s of a file's `main_stream` in display order.

    Raises UserError if PyAV is not installed, the file is not readable, or a frame is damaged.
    """
    with open_container(path) as container:
        for index, frame in enumerate(container.decode(main_stream(container))):
            check_frame(frame, path, index)
            display_axes(frame, path)
            yield frame


def display_axes(frame, path: str = "the video") -> np.ndarray:
    """The display matrix of a decoded frame, int [2, 2]: (x, y) as stored @ axes = (x, y) as shown, up to a shift.

    Phones store it as metadata. Its entries are -1, 0 and 1: quarter turns, and mirror images as of front cameras.
    Raises UserError for any other matrix.
    """
    data = frame.side_data.get(DISPLAY_MATRIX)
    if data is None:
        return np.eye(2, dtype=int)
    axes = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65536  # 16.16 fixed-point numbers
    rounded = np.rint(axes).astype(int)
    if np.abs(axes - rounded).max() > 0.01 or (rounded @ rounded.T != np.eye(2)).any():
        raise UserError(f"{path}: its display matrix {axes.tolist()} is no quarter turn or mirror image; convert it")
    return rounded


def upright_size(frame) -> tuple[int, int]:
    """(H, W) of a decoded frame as it is shown."""
    size = frame.height, frame.width
    return size if display_axes(frame)[0, 0] else size[::-1]


def upright_image(frame) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a decoded frame as it is shown."""
    image, axes = frame.to_ndarray(format="rgb24"), display_axes(frame)
    if not axes[0, 0]:
        image = image.swapaxes(0, 1)
    x, y = axes.sum(0)  # the directions of the shown axes
    return np.ascontiguousarray(image[::y, ::x])


def common_size(names: list[str], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The (H, W) of all frames. Raises UserError if one has another size."""
    for name, size in zip(names, sizes):
        if size != sizes[0]:
            raise UserError(
                f"{name}: {size[1]} x {size[0]} pixels, but {names[0]} has {sizes[0][1]} x {sizes[0][0]}; "
                "bring all frames of a clip to one size"
            )
    return sizes[0]


def decode_from(path: str, times: list[int], first: int) -> Iterator:
    """Yields frames first, first + 1, ... of `decode`; first: a key frame, times: those of all frames, all different.

    Frames after a seek are recognized by their times; from the first one that is not as expected on, the file is
    decoded from its start.
    """
    index = first
    with open_container(path) as container:
        stream = main_stream(container)
        container.seek(times[first], stream=stream)
        for frame in container.decode(stream):
            if index == first and (frame.pts is None or frame.pts < times[first]):
                continue  # shown before the key frame, but stored after it
            if index == len(times) or frame.pts != times[index]:
                break
            check_frame(frame, path, index)
            yield frame
            index += 1
    if index < len(times):
        yield from islice(decode(path), index, None)


def forward_reader(start: Callable[[int], tuple[int, Iterator]]) -> Callable[[int], object]:
    """read(index) -> that item of a sequence. start(index) -> (number of an item up to it, iterator from there on).

    The iterator is started again only for an index below the last one.
    """
    index, item, items = -1, None, start(0)[1]

    def read(target: int):
        nonlocal index, item, items
        if target < index:
            first, items = start(target)
            index = first - 1
        while index < target:
            index, item = index + 1, next(items)
        return item

    return read


def frame_reader(path: str, times: Sequence[int | None] = (), keys: Sequence[int] = ()) -> Callable:
    """read(index) -> the `av.VideoFrame` of a video file. Raises UserError if it has none at `index`.

    times, keys: the times of all frames and the numbers of key frames, if they are known. Then an earlier frame of an
    mp4, mov, mkv or webm is reached from the key frame before it, else from the start of the file.
    """
    seekable = path.lower().endswith(SEEKABLE) and None not in times and len(set(times)) == len(times)

    def start(index: int) -> tuple[int, Iterator]:
        first = max((key for key in keys if key <= index), default=0) if seekable else 0
        return first, decode_from(path, times, first) if first else decode(path)

    read_next = forward_reader(start)

    def read(index: int):
        try:
            return read_next(index)
        except StopIteration as error:
            raise UserError(f"{path}: has no frame {index}, though its header says so; convert it again") from error

    return read

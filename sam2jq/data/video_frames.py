"""Frames of video files by name, "clip.mp4#12", for training on videos as SA-V has them: sav_000/sav_000001.mp4."""

import os
import re
import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from sam2jq.data.containers import check_whole, main_stream, open_container
from sam2jq.data.folders import walk
from sam2jq.data.video import VIDEO_SUFFIXES, decode, frame_reader, upright_image
from sam2jq.tree import fingerprint

NAME = re.compile(rf"(.+(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))}))#(\d+)", re.IGNORECASE)
LOCK = threading.Lock()


def is_video(name: str) -> bool:
    """Whether a file name has a video's ending."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def videos_below(root: Path) -> list[Path]:
    """All video files below `root`, sorted; `root` alone if it is a file."""
    if root.is_file():
        return [root]
    return sorted(path for content in walk(root) for path in content if is_video(path.name))


def frame_name(video: Path, index: int) -> str:
    """The name of a frame; names sort as the frames do."""
    return f"{video}#{index:05d}"


def count_frames(video: Path) -> int:
    """The number of frames that a video file shows; decodes it only if its header states none.

    The header's own number counts frames too that an edit list cuts away. Raises UserError if the file is cut or
    damaged, as far as `check_whole` finds it.
    """
    check_whole(str(video))
    with open_container(str(video)) as container:
        stream = main_stream(container)
        if stream.frames:
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    return sum(1 for _ in decode(str(video)))


def read_frames(path: str, indices: Iterable[int]) -> list[np.ndarray]:
    """The frames, uint8 [H, W, 3], with rising `indices` of a video file. Raises UserError if it has fewer."""
    return [upright_image(frame) for frame in map(frame_reader(path), indices)]


def read_frame(name: str) -> np.ndarray:
    """uint8 [H, W, 3] of the frame `name`. Frames of one video are read fast in rising order only."""
    path, index = NAME.fullmatch(name).groups()
    with LOCK:  # training reads by several threads
        return upright_image(cached_reader(path, os.stat(path).st_mtime)(int(index)))


@lru_cache(maxsize=1)
def cached_reader(path: str, modified: float):
    """The `frame_reader` of a video file; modified: its time of modification, so that a changed file is read anew."""
    return frame_reader(path)


@lru_cache(maxsize=1)
def file_id(path: str, modified: float) -> str:
    """A hash of a file's content."""
    return fingerprint({}, Path(path).read_bytes())


def image_id(name: str) -> str:
    """What tells an image from others: its scene name, or a hash of its file's content, with the frame of a video."""
    if name.startswith("scenes:"):
        return name
    if found := NAME.fullmatch(name):
        return f"{file_id(found[1], os.stat(found[1]).st_mtime)}#{found[2]}"
    return fingerprint({}, Path(name).read_bytes())

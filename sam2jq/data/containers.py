"""Video files as PyAV opens them, and the check that none of their frames is lost to damage."""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sam2jq.errors import UserError

QUICKTIME = "mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's name of the format; its table of frames makes damage an error
RETRY = "copy or convert the video again, or give a folder of frames"
LOG_LOCK = threading.Lock()  # the log level of PyAV is one for all threads


@contextmanager
def open_container(path: str) -> Iterator:
    """The `av` container of a file with a video stream. PyAV's errors in the block become UserErrors."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is a video and that needs the extra eval: pip install 'sam2jq[eval]', or give a folder of frames"
        ) from error
    with errors_named(path), av.open(path, metadata_errors="replace") as container:
        if container.format.name.endswith("_pipe"):  # such as png_pipe: FFmpeg goes by the content, not by the name
            kind = container.format.name.removesuffix("_pipe")
            raise UserError(f"{path}: holds an image ({kind}), not a video; give it an image's ending, or give a video")
        if not container.streams.video:
            raise UserError(f"{path}: holds no video stream; give a video or a folder of frames")
        yield container


def main_stream(container):
    """The video stream that players show, and SAM 2 reads: FFmpeg's choice of several, the default one first."""
    return container.streams.best("video")


@contextmanager
def errors_named(path: str) -> Iterator[None]:
    """A block in which PyAV reads `path`. Its errors become UserErrors with the file's name."""
    try:
        yield
    except Exception as error:  # PyAV raises errors of many classes for broken files
        if isinstance(error, UserError):  # not a clause of its own: at the interpreter's exit the name may be None
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: not a readable video ({reason}); convert it again or give a folder of frames"
        ) from error


def check_whole(path: str) -> None:
    """Raises UserError if a video file is cut, or has a hole that makes FFmpeg pass over frames without an error.

    A damaged frame is found when it is decoded, see `check_frame`. Not found, because nothing in the file tells it:
    - a cut or hole at the borders of frames in MPEG program streams (.mpg .mpeg), and most holes in .wmv;
    - a part that is missing from .mkv, .webm or .gif, if the rest joins at the border of a block by chance;
    - a cut between two fragments of a fragmented .mp4, which is made to be read up to there;
    - bytes within a frame that decode to other pixels.
    Gaps between the times of frames are no sign: clips with a variable frame rate have them.
    """
    with demuxer_errors() as said, open_container(path) as container:
        if container.format.name == QUICKTIME:
            return
        count = 0
        for packet in container.demux(main_stream(container)):
            if packet.is_corrupt:
                raise UserError(f"{path}: cut or damaged in frame {count:05d}; {RETRY}")
            count += packet.size > 0
        reasons = [text for name, text in said() if name == container.format.name]
    with errors_named(path), open(path, "rb") as file:
        fault = reasons[0] if reasons else fault_of_file(file, os.path.getsize(path))
    if fault:
        raise UserError(f"{path}: cut or damaged ({fault}), {count} frames of it are left; {RETRY}")


def check_frame(frame, path: str, index: int) -> None:
    """Raises UserError if the decoder concealed errors in a frame, the one with `index`."""
    if frame.is_corrupt:
        raise UserError(f"{path}: frame {index:05d} is damaged; {RETRY}")


@contextmanager
def demuxer_errors() -> Iterator:
    """A function that returns [(name of FFmpeg's component, message)] of the errors logged in the block so far."""
    try:
        from av import logging
    except ModuleNotFoundError:  # `open_container` says so
        yield list
        return
    with LOG_LOCK:
        level, skip = logging.get_level(), logging.get_skip_repeated()
        logging.set_level(logging.ERROR)
        logging.set_skip_repeated(False)
        try:
            with logging.Capture() as logs:
                yield lambda: [(name, " ".join(text.split())) for _, name, text in logs]
        finally:
            logging.set_level(level)
            logging.set_skip_repeated(skip)


def fault_of_file(file, size: int) -> str:
    """What is wrong with the structure of a GIF or AVI file of `size` bytes; "" if nothing, and for other files."""
    head = file.read(13)
    if head[:4] == b"RIFF":
        stated = struct.unpack("<I", head[4:8])[0] + 8
        unknown = stated == 8 or stated > 0xFFFFFFF0  # written to a pipe
        return "" if unknown or stated <= size + 1 else f"{size} bytes of {stated} are there"  # 1: an odd end unpadded
    return fault_of_gif(file, head[10]) if head[:3] == b"GIF" else ""


def fault_of_gif(file, flags: int) -> str:
    """Where the blocks of a GIF break off; "" if they end as they must. flags: those of its header, which is read."""
    skip_colors(file, flags)
    while kind := file.read(1):
        match kind:
            case b";":
                return ""
            case b"!":
                file.seek(1, os.SEEK_CUR)
            case b",":
                skip_colors(file, (file.read(9) or b"\0")[-1])
                file.seek(1, os.SEEK_CUR)
            case _:
                return f"a block of an unknown kind at byte {file.tell() - 1}"
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], os.SEEK_CUR)
    return "its end is missing"


def skip_colors(file, flags: int) -> None:
    """Passes over the color table of a GIF that `flags` state."""
    file.seek(3 << (flags & 7) + 1 if flags & 128 else 0, os.SEEK_CUR)

"""Pictures of a clip written as one file, by its ending: an mp4, an animated GIF, or a strip of frames."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import GifImagePlugin, Image, ImageChops

from sam2jq.data.containers import main_stream, open_container
from sam2jq.data.video import VIDEO_SUFFIXES
from sam2jq.errors import UserError
from sam2jq.files import atomic_write, check_target
from sam2jq.report import figures

RATE = Fraction(24)  # frames a second, as SA-V, where the clip does not say it

Pictures = Callable[[Image.Image], None]


def check_clip_file(path: str, *inputs: str | None) -> Path:
    """`path`. Raises UserError if it has an unknown ending, cannot be written, or would replace one of `inputs`."""
    out = check_target(path, *inputs)
    if out.suffix.lower() not in (".mp4", ".gif", *figures.FORMATS):
        raise UserError(f"--out {out}: give a name that ends in .mp4, .gif or, for a strip of frames, in one of "
                        f"{' '.join(figures.FORMATS)}")  # fmt: skip
    if out.suffix.lower() == ".mp4":
        import_av(out)
    return out


def import_av(path: Path):
    """The module `av`. Raises UserError that names `path` if it is not installed."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(f"--out {path} needs the extra eval: pip install 'sam2jq[eval]', or give a .gif") from error
    return av


def frame_rate(clip: str) -> Fraction:
    """Frames a second of a video file; RATE of anything else."""
    if not (clip.lower().endswith(VIDEO_SUFFIXES) and Path(clip).is_file()):
        return RATE
    with open_container(clip) as container:
        return main_stream(container).average_rate or RATE


@contextmanager
def clip_file(path: Path, rate: Fraction, count: int) -> Iterator[Pictures]:
    """Yields a function that takes each of `count` pictures and writes it to `path`, which appears if none fails."""
    match path.suffix.lower():
        case ".mp4":
            write = partial(mp4, rate=rate)
        case ".gif":
            write = partial(gif, rate=rate)
        case suffix:
            write = partial(strip, count=count, format=figures.FORMATS[suffix])
    with atomic_write(path) as temporary, write(temporary) as add:
        yield add


@contextmanager
def strip(path: Path, count: int, format: str) -> Iterator[Pictures]:
    """Yields a function that takes each of `count` pictures; those that a strip shows are written at the end."""
    shown, numbers = figures.shown_frames(count), itertools.count()
    pictures: dict[int, Image.Image] = {}

    def add(picture: Image.Image) -> None:
        if (number := next(numbers)) in shown:
            pictures[number] = picture

    yield add
    figures.strip(pictures).save(path, format=format)


@contextmanager
def gif(path: Path, rate: Fraction) -> Iterator[Pictures]:
    """Yields a function that writes each picture, or the rectangle of it that differs from the one before.

    PIL's own writer holds all pictures in memory.
    """
    before: Image.Image | None = None
    milliseconds = round(1000 / rate)
    with path.open("wb") as file:

        def add(picture: Image.Image) -> None:
            nonlocal before
            if before is None:
                box = (0, 0, *picture.size)
                header, _ = GifImagePlugin.getheader(Image.new("P", picture.size), info={"loop": 0})
                file.write(b"".join(header))
            else:
                box = ImageChops.difference(picture, before).getbbox() or (0, 0, 1, 1)
            colors = picture.crop(box).convert("P", palette=Image.Palette.ADAPTIVE)
            file.writelines(GifImagePlugin.getdata(colors, box[:2], duration=milliseconds, include_color_table=True))
            before = picture

        yield add
        file.write(b";")


@contextmanager
def mp4(path: Path, rate: Fraction) -> Iterator[Pictures]:
    """Yields a function that encodes each picture as H.264, frame by frame; odd sides get one more row or column."""
    av = import_av(path)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"

        def add(picture: Image.Image) -> None:
            pixels = np.asarray(picture)
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

        yield add
        container.mux(stream.encode())

"""Pictures of a clip written as one file, by its ending: an mp4, an animated GIF, or a strip of frames."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

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
def clip_file(path: Path, rate: Fraction) -> Iterator[Pictures]:
    """Yields a function that takes each picture and writes it to `path`; nothing is left of it if the block raises."""
    if path.suffix.lower() == ".mp4":
        with atomic_write(path) as temporary, mp4(temporary, rate) as add:
            yield add
        return
    pictures: list[Image.Image] = []
    yield pictures.append
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".gif":
            milliseconds = round(1000 / rate)
            animation = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
            pictures[0].save(temporary, format="GIF", **animation)
        else:
            figures.strip(pictures).save(temporary, format=figures.FORMATS[path.suffix.lower()])


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

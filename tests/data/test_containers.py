"""Video files that are cut or have a hole are refused, and intact ones of every container are read."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data import containers, find_images
from sam2jq.data.loader import find_items
from sam2jq.data.video import decode, open_video
from sam2jq.data.video_frames import count_frames
from sam2jq.errors import UserError

av = pytest.importorskip("av")
CODECS = {
    "mp4": "libx264", "mov": "libx264", "m4v": "mpeg4", "avi": "mpeg4", "mkv": "libx264", "webm": "libvpx",
    "mpg": "mpeg1video", "mpeg": "mpeg2video", "wmv": "wmv2", "gif": "",
}  # fmt: skip
COUNT = 24


def write(path: Path, times: list[int] | None = None, target=None) -> Path:
    """Writes COUNT frames of noise, or one for each of `times`, numbers of frames at 24 a second.

    target: an object with a method `write`, in place of `path`, whose ending says the format.
    """
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (64, 80, 3), dtype=np.uint8) for _ in times or range(COUNT)]
    if path.suffix == ".gif":
        first, *rest = map(Image.fromarray, frames)
        shown = 50 if times is None else [40 * t for t in np.diff([*times, times[-1] + 1]).tolist()]
        first.save(path, save_all=True, append_images=rest, duration=shown)
        return path
    kind = {"mkv": "matroska"}.get(path.suffix[1:], path.suffix[1:])
    with av.open(target or path, "w", format=kind if target else None) as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=24, bit_rate=1_000_000)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
        if path.suffix == ".webm":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for pixels, time in zip(frames, times or range(COUNT)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name) as raised:
        open_video(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_that_is_cut_is_refused(tmp_path, suffix):
    content = write(tmp_path / f"whole.{suffix}").read_bytes()
    assert len(open_video(str(tmp_path / f"whole.{suffix}"))) == COUNT
    for part in (0.5, 0.7, 0.9, 0.95):
        refused(tmp_path / f"cut.{suffix}", content[: int(part * len(content))])


@pytest.mark.parametrize("suffix", [suffix for suffix in CODECS if suffix != "wmv"])
def test_a_video_with_a_hole_is_refused(tmp_path, suffix):
    content = write(tmp_path / f"whole.{suffix}").read_bytes()
    first, last = int(0.5 * len(content)), int(0.6 * len(content))
    refused(tmp_path / f"hole.{suffix}", content[:first] + bytes(last - first) + content[last:])
    refused(tmp_path / f"hole.{suffix}", content[:first] + content[last:])


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_with_a_variable_frame_rate_is_read(tmp_path, suffix):
    times = [0, 1, 2, 9, 10, 30, 31, 60]
    path = write(tmp_path / f"slow.{suffix}", times)
    assert len(open_video(str(path))) == len(times)


@pytest.mark.parametrize("suffix", ["mkv", "avi", "webm"])
def test_a_video_written_to_a_pipe_is_read(tmp_path, suffix):
    """Its header states no size."""
    content = bytearray()
    pipe = type("Pipe", (), {"write": lambda self, data: content.extend(data) or len(data)})()
    path = write(tmp_path / f"pipe.{suffix}", target=pipe)
    path.write_bytes(content)
    assert len(open_video(str(path))) == COUNT


def test_an_avi_cut_at_the_border_of_a_frame_is_refused(tmp_path):
    content = write(tmp_path / "whole.avi").read_bytes()
    refused(tmp_path / "cut.avi", content[: content.rfind(b"00dc", 0, len(content) // 2)])


def test_a_gif_without_its_end_is_refused(tmp_path):
    content = write(tmp_path / "whole.gif").read_bytes()
    refused(tmp_path / "cut.gif", content[:-1])


def test_a_cut_video_is_refused_as_training_data(tmp_path):
    content = write(tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut.mkv: cut or damaged .File ended prematurely., .* frames of it are left"):
        count_frames(tmp_path / "cut.mkv")


def test_frames_that_an_edit_list_cuts_away_are_no_training_data(tmp_path):
    whole, shorter = write(tmp_path / "whole.mp4"), tmp_path / "shorter.mp4"
    with av.open(whole) as source, av.open(shorter, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, shift = stream, round(0.25 / packet.time_base)  # times below 0 become an edit list
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                target.mux(packet)
    with av.open(shorter) as container:
        assert container.streams.video[0].frames == COUNT
    shown = len(open_video(str(shorter)))
    assert count_frames(shorter) == shown < COUNT
    items = find_items(str(shorter), None, 0, frames=shown, stride=1)
    assert [len(item.read()) for item in items] == [shown]
    assert len(find_images(str(shorter), None, 0)) == shown


def test_a_file_that_is_no_video_is_no_training_data(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for find in (partial(find_items, frames=2), find_images):
        with pytest.raises(UserError, match="a.txt: not an? (image or )?video file"):
            find(str(tmp_path / "a.txt"), None, 0)


def test_a_damaged_frame_is_named(tmp_path):
    content = write(tmp_path / "hole.mpg").read_bytes()
    middle = len(content) // 2
    (tmp_path / "hole.mpg").write_bytes(content[:middle] + bytes(900) + content[middle + 900 :])
    with pytest.raises(UserError, match=r"hole.mpg: frame 000\d\d is damaged"):
        open_video(str(tmp_path / "hole.mpg"))


def test_the_log_level_of_pyav_is_as_before(tmp_path):
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    containers.check_whole(str(write(tmp_path / "a.mkv")))
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_with_the_ending_of_a_video_is_refused(tmp_path, suffix):
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}")
    shutil.copy(tmp_path / f"a.{suffix}", tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a.mp4: holds an image \(\w+\), not a video"):
        open_video(str(tmp_path / "a.mp4"))


def test_a_reader_is_closed_without_a_word_when_the_interpreter_exits(tmp_path, monkeypatch):
    """Names of modules are None then."""
    frames = decode(str(write(tmp_path / "a.mp4")))
    next(frames)
    monkeypatch.setattr(containers, "UserError", None)
    frames.close()


def test_an_index_error_of_a_reader_is_not_the_end_of_a_clip():
    from sam2jq.data.video import Video

    with pytest.raises(IndexError):
        list(Video(["0", "1"], (4, 4), lambda index: [np.zeros((4, 4, 3), np.uint8)][index]))


def test_real_videos_are_read(shared):
    assert count_frames(shared / "data/sa-v/videos/sav_000615.mp4") == 384

"""Frames read ahead by a thread."""

import threading

import numpy as np
import pytest

from sam2jq.data import video as video_module
from sam2jq.data.read_ahead import AHEAD, BLOCK, read_ahead
from sam2jq.data.video import open_video


def recorded(length: int = 60):
    """(read, the indices that it read so far, and by which threads)."""
    calls, threads = [], set()

    def read(index):
        calls.append(index)
        threads.add(threading.current_thread().name)
        if index == 41:
            raise ValueError("frame 41")
        return index * 10

    return read_ahead(read, length), calls, threads


@pytest.mark.parametrize("seed", range(5))
def test_any_order_gives_the_same_items(seed):
    read, _, threads = recorded(40)
    index = 0
    for step in np.random.default_rng(seed).choice([-1, -1, 0, 1, 1, 1, 7, -9], 300):
        index = int(np.clip(index + step, 0, 39))
        assert read(index) == index * 10
    assert len(threads) == 1


def test_rising_indices_are_read_once_and_ahead():
    read, calls, _ = recorded()
    read(0)
    assert calls == [0]  # one frame alone is no sign
    for index in range(1, 20):
        read(index), read(index)
    read(20)
    wait_for(lambda: len(calls) == 21 + AHEAD)
    assert calls == list(range(21 + AHEAD))


def wait_for(condition) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def test_falling_indices_are_read_once_in_rising_blocks():
    read, calls, _ = recorded()
    read(39)
    for index in range(38, -1, -1):
        read(index)
    blocks = [calls[1:][i : i + BLOCK] for i in range(0, 39, BLOCK)]
    assert blocks == [list(range(23, 39)), list(range(7, 23)), list(range(7))]


def test_an_error_is_that_of_its_own_frame():
    read, *_ = recorded()
    assert [read(i) for i in range(38, 41)] == [380, 390, 400]
    with pytest.raises(ValueError, match="frame 41"):
        read(41)
    assert read(42) == 420


CODECS = {
    ".mp4": ("libx264", {"bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1"}),
    ".mkv": ("libx264", {"bf": "2", "sc_threshold": "0"}),
    ".avi": ("mpeg4", {}),
    ".webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
}


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_is_read_backwards_from_its_key_frames(tmp_path, monkeypatch, suffix):
    """With frames that refer to later ones, where the codec has them: each frame is as when it is read forwards, and
    about one and a half times as many are decoded as for reading the blocks alone."""
    av, decoded = pytest.importorskip("av"), []
    monkeypatch.setattr(video_module, "check_frame", lambda frame, path, index: decoded.append(index))
    codec, options = CODECS[suffix]
    path, shades = str(tmp_path / f"long{suffix}"), np.random.default_rng(0).integers(0, 255, (150, 8, 8, 3), np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        for shade in shades.repeat(8, 1).repeat(8, 2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    video = open_video(path)
    forwards = list(video)
    assert len(forwards) == len(decoded) / 2 == 150
    decoded.clear()
    for index in reversed(range(150)):
        np.testing.assert_array_equal(video[index], forwards[index])
    assert (len(decoded) < 2 * 150) == (suffix != ".avi")
    for index in np.random.default_rng(1).integers(0, 150, 30):
        np.testing.assert_array_equal(video[index], forwards[index])

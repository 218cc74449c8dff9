import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.video import find_frames, open_video
from sam2jq.data.video_frames import count_frames
from sam2jq.errors import UserError

SIZE = (32, 48)


def random_frames(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def write_frames(folder: Path, names: list[str], frames: np.ndarray) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, frames):
        Image.fromarray(frame).save(folder / name)
    return str(folder)


def write_video(path: Path, frames: np.ndarray, clockwise: int = 0) -> str:
    """Writes a lossless video with B-frames and the metadata of a rotation by `clockwise` degrees."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"qp": "0", "bf": "3", "g": "7"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        if clockwise:
            stream.set_display_rotation(-clockwise)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(params=["folder", "clip.mp4", "clip.MKV"])
def clip(request, tmp_path) -> tuple[str, np.ndarray]:
    """(path of a clip of 12 frames, the frames)."""
    frames = random_frames(12)
    if request.param == "folder":
        return write_frames(tmp_path / "clip", [f"{index:05d}.png" for index in range(12)], frames), frames
    return write_video(tmp_path / request.param, frames), frames


def test_a_clip_is_a_sequence_of_its_frames(clip):
    path, frames = clip
    video = open_video(path)
    assert (len(video), video.size) == (12, SIZE)
    assert video.names == [f"{index:05d}" for index in range(12)]
    assert video[0].dtype == np.uint8
    np.testing.assert_array_equal(list(video), frames)


def test_frames_can_be_read_in_any_order(clip):
    path, frames = clip
    video = open_video(path)
    for index in [3, 3, 7, 2, 11, 0, -1, -12, np.int64(5)]:
        np.testing.assert_array_equal(video[index], frames[index])
    for index in [12, -13]:
        with pytest.raises(IndexError):
            video[index]


def test_a_modified_frame_does_not_change_the_video(clip):
    path, frames = clip
    video = open_video(path)
    video[4][:] = 0
    np.testing.assert_array_equal(video[4], frames[4])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_several_streams_the_one_that_players_show_is_read(tmp_path, suffix):
    """A small preview lies before the clip itself, which is marked as the default."""
    av = pytest.importorskip("av")
    path, frames = tmp_path / f"clip.{suffix}", random_frames(5)
    with av.open(path, "w") as container:
        streams = [container.add_stream("libx264rgb", rate=24, options={"qp": "0"}) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default
        for stream, scale in zip(streams, (2, 1)):
            stream.height, stream.width, stream.pix_fmt = SIZE[0] // scale, SIZE[1] // scale, "rgb24"
        for frame in frames:
            for stream, pixels in zip(streams, (frame[::2, ::2], frame)):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(picture))
        for stream in streams:
            container.mux(stream.encode(None))
    np.testing.assert_array_equal(list(open_video(path)), frames)
    assert count_frames(path) == 5


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_a_rotated_video_is_read_upright(tmp_path, clockwise):
    frames = random_frames(3)
    video = open_video(write_video(tmp_path / "phone.mp4", frames, clockwise))
    expected = np.rot90(frames, -clockwise // 90, axes=(1, 2))
    assert video.size == expected.shape[1:3]
    np.testing.assert_array_equal(list(video), expected)


MATRICES = {  # a, b, c, d of a display matrix: (x, y) is shown at (a x + c y, b x + d y)
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    "180 degrees": ((-1, 0, 0, -1), lambda x: x[:, ::-1, ::-1]),
    "90 degrees clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
    "270 degrees clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
    "90 degrees and mirrored": ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
    "270 degrees and mirrored": ((0, -1, -1, 0), lambda x: x.swapaxes(1, 2)[:, ::-1, ::-1]),
}


def set_matrix(path: str, matrix: tuple[float, ...]) -> None:
    """Writes a, b, c, d into the display matrix of an mp4's track header, in 16.16 fixed-point numbers."""
    content = bytearray(Path(path).read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (round(number * 65536) for number in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(content)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_video_is_read_as_its_display_matrix_shows_it(tmp_path, kind):
    matrix, show = MATRICES[kind]
    frames = random_frames(2)
    path = write_video(tmp_path / "phone.mp4", frames)
    set_matrix(path, matrix)
    video, expected = open_video(path), show(frames)
    assert video.size == expected.shape[1:3]
    np.testing.assert_array_equal(list(video), expected)
    height, width = SIZE  # where the matrix itself shows each pixel
    y, x = np.mgrid[:height, :width]
    a, b, c, d = matrix
    shown = np.zeros_like(expected[0])
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown[shown_y - shown_y.min(), shown_x - shown_x.min()] = frames[0]
    np.testing.assert_array_equal(shown, expected[0])


def test_a_display_matrix_that_is_no_quarter_turn_is_refused(tmp_path):
    path = write_video(tmp_path / "phone.mp4", random_frames(2))
    set_matrix(path, (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(UserError, match="phone.mp4: its display matrix .* is no quarter turn or mirror image"):
        open_video(path)


@pytest.mark.parametrize("suffix", ["gif", "m4v", "wmv", "mpg", "mpeg"])
def test_clips_of_other_containers_are_read(tmp_path, suffix):
    """Within 12 of 255 on average: these codecs are lossy; another frame is 60 away."""
    av = pytest.importorskip("av")
    frames = np.stack([np.roll(np.kron(random_frames(1, (4, 6))[0], np.ones((24, 24, 1), np.uint8)), 24 * i, 1)
                       for i in range(5)])  # fmt: skip
    path = str(tmp_path / f"clip.{suffix}")
    if suffix == "gif":
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, duration=50)
    else:
        codec = {"wmv": "wmv2", "m4v": "mpeg4"}.get(suffix, "mpeg1video")
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=24, bit_rate=8_000_000)
            stream.height, stream.width, stream.pix_fmt = 96, 144, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    video = open_video(path)
    assert (len(video), video.size) == (5, (96, 144))
    errors = [[np.abs(got - frame.astype(int)).mean() for frame in frames] for got in video]
    assert np.diag(errors).max() < 12
    assert np.argmin(errors, axis=1).tolist() == list(range(5))


@pytest.mark.parametrize(
    "names",
    [
        ["-2.jpg", "-1.jpg", "0.jpg", "1.jpg", "10.jpg"],
        ["-1.jpg", "+2.jpg", "003.jpg", "1_0.jpg"],
    ],
)
def test_numbers_with_a_sign_are_sorted_as_sam2_sorts_them(tmp_path, names):
    misc = pytest.importorskip("sam2.utils.misc")
    greys = np.broadcast_to(50 * np.arange(len(names), dtype=np.uint8)[:, None, None, None], (len(names), 8, 8, 3))
    path = write_frames(tmp_path, names[::-1], greys[::-1])
    assert [Path(frame).name for frame in find_frames(path)] == names
    expected, _, _ = misc.load_video_frames(path, 8, True, img_mean=(0,) * 3, img_std=(1,) * 3)
    np.testing.assert_allclose(np.stack(list(open_video(path)))[:, 0, 0, 0] / 255, expected[:, 0, 0, 0], atol=1e-6)


def test_two_names_of_one_number_are_an_error(tmp_path):
    with pytest.raises(UserError, match="1.jpg and .*1.jpg are both frame"):
        find_frames(write_frames(tmp_path, ["0.jpg", "1.jpg", "01.jpg"], random_frames(3)))


@pytest.mark.parametrize(
    "names",
    [
        ["2.jpg", "10.jpg"],
        ["00000.jpg", "00001.jpeg", "00100.PNG"],
        ["frame2.jpg", "frame10.jpg", "shot1.jpg"],
        ["a.jpg", "shot_3.jpg", "shot_20.jpg"],
        ["t-1.jpg", "t-2.jpg", "t-10.jpg"],
        ["Frame_1.jpg", "frame_2.jpg", "FRAME_10.jpg"],
        ["shot2.0009.png", "shot2.0010.png", "shot10.0001.png"],
        ["t_0.25.png", "t_0.50.png", "t_1.00.png"],
    ],
)
def test_numbers_in_names_order_the_frames(tmp_path, names):
    path = write_frames(tmp_path, names[::-1], random_frames(len(names)))
    write_frames(tmp_path / "below", ["0.jpg"], random_frames(1))
    (tmp_path / ".hidden.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert [Path(frame).name for frame in find_frames(path)] == names
    assert open_video(path).names == [Path(name).stem for name in names]


def test_a_frame_of_a_type_that_is_not_read_is_named(tmp_path):
    path = write_frames(tmp_path, ["0.jpg", "1.jpg", "3.jpg"], random_frames(3))
    (tmp_path / "1.dng").touch()  # the raw data of a frame
    assert len(find_frames(path)) == 3
    (tmp_path / "2.heic").touch()
    with pytest.raises(UserError, match="2.heic cannot be read; convert all frames to jpg or png"):
        find_frames(path)


@pytest.mark.parametrize("other", ["mask_1.png", "overlay.jpg"])
def test_names_without_a_number_beside_numbers_are_an_error(tmp_path, other):
    path = write_frames(tmp_path, ["0.jpg", "1.jpg", other], random_frames(3))
    with pytest.raises(UserError, match=f"0.jpg has the number of a frame, but not {other}; move what is no frame"):
        open_video(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.1.jpg", "1.12.jpg", "1.2.jpg"], "1.1.jpg has a number with a fraction"),
        (
            ["frame_0.25.png", "frame_0.5.png", "frame_1.0.png"],
            "frame_0.25.png has a number with a fraction",
        ),
        (["t-1.png", "t0.png", "t1.png"], "t-1.png has a sign where other names have none or another; number the"),
        (["t+1.png", "t+2.png", "t-2.png"], "t.[12].png has a sign where other names have none or another"),
        (["a_0.jpg", "a_0_mask.png", "a_1.jpg"], "a_0_mask.png looks like a mask beside the frames"),
        (["s_000.png", "s_000_L.png", "s_001.png"], "s_000.png, s_000_L.png have the same number; move what is no"),
        (["0_color.jpg", "0_depth.png"], "0_color.jpg, 0_depth.png have the same number"),
    ],
)
def test_names_of_no_certain_order_or_of_masks_are_an_error(tmp_path, names, message):
    path = write_frames(tmp_path, names, random_frames(3))
    with pytest.raises(UserError, match=message):
        open_video(path)


def test_frames_of_a_folder_are_decoded_one_by_one(tmp_path):
    path = write_frames(tmp_path, ["0.png", "1.png"], random_frames(2))
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    video = open_video(path)
    assert video[0].shape == (*SIZE, 3)
    with pytest.raises(ValueError, match="1.png: not a readable image"):
        video[1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone", FileNotFoundError, "gone: no such file or folder; give a video or a folder"),
        ("gone.mp4", FileNotFoundError, "gone.mp4: no such file or folder"),
        ("empty", FileNotFoundError, "empty: holds no frame; looked for .jpg .jpeg .png"),
        ("twice", ValueError, "twice: 7.jpg and 7.png are both frame 7; remove one"),
        ("sizes", ValueError, "2.png: 48 x 33 pixels, but .*1.png has 48 x 32; bring all"),
        ("notes.txt", ValueError, "notes.txt: not a video; allowed: .* .mp4 .mov .avi .mkv .webm"),
        ("text.mp4", ValueError, "text.mp4: not a readable video .Invalid data.*; convert it"),
        ("cut.mp4", ValueError, "cut.mp4: not a readable video"),
        ("sound.mp4", ValueError, "sound.mp4: holds no video stream; give"),
    ],
)
def test_an_error_names_the_path_and_the_way_out(tmp_path, name, error, message):
    av = pytest.importorskip("av")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "text.mp4").write_text("no video")
    write_frames(tmp_path / "twice", ["7.jpg", "7.png"], random_frames(2))
    write_frames(tmp_path / "sizes", ["1.png", "2.png"], [random_frames(1)[0], random_frames(1, (33, 48))[0]])
    content = Path(write_video(tmp_path / "whole.mp4", random_frames(12))).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux([*stream.encode(sound), *stream.encode(None)])
    with pytest.raises(error, match=message) as raised:
        open_video(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_an_empty_path_is_an_error_and_not_the_current_folder():
    with pytest.raises(FileNotFoundError, match="empty path: no such file"):
        open_video("")


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"a.mp4 .* pip install 'sam2jq\[eval\]'"):
        open_video(str(tmp_path / "a.mp4"))


def test_every_fourth_frame_of_a_real_video_is_that_of_its_folder(shared):
    """The folder holds frames at 6 of the video's 24 fps. Within 2 of 255, since they were stored as jpg: measured
    1.1, while the frames before and after are 4 to 9 away."""
    video = open_video(str(shared / "data/sa-v/videos/sav_000615.mp4"))
    folder = open_video(str(shared / "data/sa-v/sav_train/JPEGImages_24fps/sav_000615"))
    assert len(video) == 4 * len(folder) == 384
    assert video.size == folder.size == (540, 960)
    for index in [5, 50]:
        before, same, after = (np.abs(video[4 * index + k] - folder[index].astype(float)).mean() for k in (-1, 0, 1))
        assert same < 2 < min(before, after)

"""1,000 damaged files of every kind end in a result or in one line: no trace, no hang, no gigabytes, no code that runs.

The files are read by another process, which limits its own memory: `python -m tests.test_mutated_files FOLDER COUNT
SEED` prints one JSON line per file that ends in anything else.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 60, 4 << 30  # limits of one file, in seconds and bytes
STARTS_CODE = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")


def write_files(folder: Path) -> None:
    """Writes one intact file of each kind in READERS."""
    import sam2jq
    from converters.exports import EXPORTS
    from converters.safetensors_files import read_tensors, write_tensors
    from sam2jq.api import describe_model
    from tests.data.test_coco import SQUARE, annotation, random_mask, rle, write_json
    from tests.data.test_video import random_frames

    model, params = sam2jq.load("demo")
    small = sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), sam2jq.QuantSpec(4)))
    for name in ("package.pt", "package.safetensors"):
        sam2jq.save(folder / name, model, small)
    about = {"random_weights": False, "model": describe_model(model)}
    EXPORTS["vanilla"].write(folder, model, params, about)
    for name in ("hf", "shards"):
        (folder / name).mkdir()
        EXPORTS["safetensors"].write(folder / name, model, params, about)
    arrays, _ = read_tensors(folder / "shards" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    keys = sorted(arrays)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in halves.items():
        write_tensors(folder / "shards" / name, {key: arrays[key] for key in part})
    index = {"metadata": {}, "weight_map": {key: name for name, part in halves.items() for key in part}}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.yaml").write_bytes((ROOT / "experiments" / "demo_w4.yaml").read_bytes())
    (folder / "coco").mkdir()
    masks = [annotation(s, id=i) for i, s in enumerate((SQUARE, rle(random_mask()), rle(random_mask(1), True)))]
    write_json(folder / "coco", masks, names=("a.jpg",))
    Image.fromarray(random_frames(1, (20, 30))[0]).save(folder / "coco" / "a.jpg")
    photo = Image.fromarray(random_frames(1, (60, 80))[0])
    photo.save(folder / "photo.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    photo.quantize(16).save(folder / "palette.png")
    photo.save(folder / "photo.png")
    Image.fromarray(random_mask().astype(np.uint8)).save(folder / "mask.png")
    write_clip(folder / "clip.mp4", random_frames(6))


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Writes a video with what phones and editors put into its header: a rotation and texts."""
    import av

    with av.open(path, "w") as container:
        container.metadata.update(title="clip é", comment="made by a test", artist="nobody", encoder="none")
        stream = container.add_stream("libx264", rate=24, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.set_display_rotation(-90)
        stream.metadata.update(handler_name="VideoHandlé", language="eng")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_model(path: Path) -> None:
    """Loads a model from a file, or from the folder of a configuration file."""
    import sam2jq

    sam2jq.load(path if path.suffix in (".pt", ".safetensors") else path.parent)


def read_package(path: Path) -> None:
    from sam2jq.api import open_package

    read_model(path)
    open_package(path).summary()


def read_yaml(path: Path) -> None:
    from sam2jq.config import loader

    loader.load(str(path), [])


def read_coco(path: Path) -> None:
    from sam2jq.data.coco import coco_images, read_instances

    for image in coco_images(str(path.parents[1])):
        read_instances(image)


def read_photo(path: Path) -> None:
    from sam2jq.data import read_image

    read_image(str(path))


def read_mask(path: Path) -> None:
    from sam2jq.data.sav import read_mask

    read_mask(str(path))


def read_clip(path: Path) -> None:
    from sam2jq.data.video import open_video

    list(open_video(str(path)))


READERS: dict[str, Callable[[Path], None]] = {
    "package.pt": read_package,
    "package.safetensors": read_package,
    "vanilla.pt": read_model,
    "hf/model.safetensors": read_model,
    "hf/config.json": read_model,
    "hf/processor_config.json": read_model,
    "shards/model.safetensors.index.json": read_model,
    "config.yaml": read_yaml,
    "coco/annotations/instances_val.json": read_coco,
    "photo.jpg": read_photo,
    "photo.png": read_photo,
    "palette.png": read_photo,
    "mask.png": read_mask,
    "clip.mp4": read_clip,
}


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with some bytes changed, cut off, removed or doubled; half of the changes are near its start or end."""
    size = len(content)
    near = int(rng.integers(min(size, 2000)))
    place = [int(rng.integers(size)), near, near, size - 1 - near][rng.integers(4)]
    length = int(rng.integers(1, 200))
    match rng.integers(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + content[place + length :]
        case 2:
            return content[: place + length] + content[place:]
        case 3:
            return content + content
        case _:
            changed = bytearray(content)
            for offset in [place, *(place + rng.integers(-50, 50, rng.integers(4)))]:
                changed[int(offset) % size] ^= 1 << int(rng.integers(8))
            return bytes(changed)


def outcome(read: Callable[[Path], None], path: Path) -> str | None:
    """None if reading ends in a result, or in an error that the command line prints in one line; else what happened."""
    from sam2jq.cli.failures import one_line
    from sam2jq.errors import UserError

    signal.alarm(SECONDS)
    try:
        read(path)
    except (UserError, OSError) as error:
        message = one_line(error)
        if path.suffix not in (".yaml", ".json") and path.name not in message:  # those name a key, or an image
            return f"names no file: {message[:300]}"
        return None if len(message) < 2000 else f"a line of {len(message)} characters: {message[:200]}"
    except BaseException as error:
        return "".join(traceback.format_exception(error))[-1500:]
    finally:
        signal.alarm(0)
    return None


def main(folder: Path, count: int, seed: int) -> None:
    """Mutates and reads `count` files, the kinds in turn, and prints the bad outcomes."""
    intact = {name: (folder / name).read_bytes() for name in READERS}
    for name, read in READERS.items():  # also loads every module that is needed
        read(folder / name)
    events = []
    sys.addaudithook(lambda event, args: events.append(event) if event in STARTS_CODE else None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(RuntimeError("it hangs")))
    kinds = list(READERS)
    for number in range(count):
        name = kinds[number % len(kinds)]
        path = folder / name
        path.write_bytes(mutate(intact[name], np.random.default_rng([seed, number])))
        problem = outcome(READERS[name], path)
        path.write_bytes(intact[name])
        if problem or events:
            print(json.dumps({"file": name, "number": number, "problem": problem, "events": events}), flush=True)
            events.clear()
    print(json.dumps("done"))


@pytest.mark.slow
def test_damaged_files_end_in_a_result_or_one_line(tmp_path):
    pytest.importorskip("av")
    write_files(tmp_path)
    command = [sys.executable, "-m", "tests.test_mutated_files", str(tmp_path), "1000", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800, check=False)
    problems = done.stdout.splitlines()
    assert problems == ['"done"'], f"{len(problems)} problems: {problems[:3]}\n{done.stderr[-2000:]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

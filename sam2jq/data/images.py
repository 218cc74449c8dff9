"""Image files: their pixels, and the array that is SAM 2's input."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from sam2jq.data.folders import is_image
from sam2jq.data.synthetic.names import scene_seed
from sam2jq.errors import UserError
from sam2jq.files import home

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, in RGB order
STD = np.array([0.229, 0.224, 0.225], np.float32)
SCALED = ("PNG", "PPM")  # formats of PIL in which its mode I holds 0..65535; PGM's own range is scaled to it
ORIENTATION = 274  # a tag of EXIF; 1: as stored
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second one


def read_image(name: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of an image file, of the drawn scene "scenes:<seed>/<index>", or of a frame "a.mp4#12".

    As in SAM 2, the EXIF orientation tag is not applied. 16 bits a channel are scaled to 8. Raises UserError if the
    file is not readable, or holds several images, floats or integers of 32 bits.
    """
    name = os.fspath(name)
    if name.startswith("scenes:"):
        from sam2jq.data.synthetic.scenes import draw_scene  # which needs scipy

        return draw_scene(scene_seed(name)).image
    if "#" in name:
        from sam2jq.data import video_frames  # which builds on this file

        if video_frames.NAME.fullmatch(name):
            return video_frames.read_frame(name)
    with open_image(name) as image:
        return rgb_pixels(image, name)


def rgb_pixels(image: Image.Image, name: str = "the image") -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a PIL image. Raises UserError, which names it, if the range of its pixels is unknown."""
    if is_grey16(image):
        return np.repeat((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode.startswith(("I", "F")):
        what = {"I": "integers of 32 bits", "F": "floats"}.get(image.mode, f"of mode {image.mode}")
        raise UserError(
            f"{name}: its pixels are {what}, whose range is unknown; scale them to 8 bits and save it again"
        )
    return np.array(image.convert("RGB"))


def is_grey16(image: Image.Image) -> bool:
    """Whether a PIL image is grey with unsigned 16 bits, 0 for black."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(BITS, (16,)) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        return False
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in SCALED)


def image_size(name: str) -> tuple[int, int]:
    """(H, W) in pixels of an image file, from its header alone."""
    with open_image(name) as image:
        return image.height, image.width


def is_turned(name: str) -> bool:
    """Whether an image file has an EXIF orientation under which viewers turn or mirror it; `read_image` does not."""
    if not is_image(name):  # a scene or a frame of a video
        return False
    with open_image(name) as image:
        return image.getexif().get(ORIENTATION, 1) != 1


def check_size(path: str, size: tuple[int, int], expected: tuple[int, int], whose: str) -> None:
    """Raises UserError unless the `size` (H, W) of an image is as `expected`; whose: for the error, "its frame has"."""
    if size != expected:
        raise UserError(f"{path}: {size[1]} x {size[0]} pixels, but {whose} {expected[1]} x {expected[0]}")


@contextmanager
def open_image(name: str) -> Iterator[Image.Image]:
    """The PIL image of a file. Raises UserError with the file's name if PIL fails inside the `with` block.

    So it does if the file holds several images, except for a photo with a second view or a thumbnail (MPO).
    Raises FileNotFoundError if there is no file.
    """
    try:
        with Image.open(home(name)) as image:
            count = getattr(image, "n_frames", 1)
            if count > 1 and image.format != "MPO":
                raise UserError(f"{name}: holds {count} images, not one; save the one that is meant")
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name or 'empty path'}: no such file; give the path of an image") from error
    except Exception as error:  # PIL's readers raise errors of many classes for broken files
        raise UserError(f"{name}: not a readable image ({error}); remove it or convert it to jpg or png") from error


def as_numpy(value) -> np.ndarray:
    """`value` as a numpy array; a torch tensor in bfloat16 or float8, which numpy lacks, in float32."""
    if str(getattr(value, "dtype", "")).startswith(("torch.bfloat16", "torch.float8")):
        value = value.float()
    return np.asarray(value)


def pixels_of(image) -> np.ndarray:
    """The array of an image, which may be a PIL image, as `rgb_pixels` reads it, or an array or tensor, as it is."""
    return rgb_pixels(image) if isinstance(image, Image.Image) else as_numpy(image)


def check_image(image) -> None:
    """Raises UserError unless `image` is an array uint8 [H, W, 3] with a pixel at least."""
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UserError(f"an image must be uint8 [H, W, 3], got {dtype} {list(shape)}; read_image returns one")


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [size, size, 3] of a uint8 [H, W, 3] image, as SAM2Transforms computes it, channels last.

    The image is resized as floats in 0..1, not as bytes (PIL's resize of mode F equals torch's antialiased bilinear
    one), then normalized. Raises UserError for any other shape or dtype.
    """
    check_image(image)
    channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    resized = [Image.fromarray(c).resize((size, size), Image.Resampling.BILINEAR) for c in channels]
    return normalize(np.stack([np.asarray(c) for c in resized], axis=-1))


def resize_frame(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a frame uint8 [H, W, 3], as SAM 2 reads clips: bicubic, and normalized after that."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def normalize(image):
    """`image` [..., 3], RGB in 0..1, normalized by ImageNet's mean and standard deviation."""
    return (image - MEAN) / STD

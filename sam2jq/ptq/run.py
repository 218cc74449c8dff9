"""Post-training quantization with its images found and checked, and its statistics cached on disk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sam2jq.config.quant import CalibConfig, QuantConfig
from sam2jq.data import read_image
from sam2jq.data.loader import Item, find_items, prefetched, read_item
from sam2jq.data.video_frames import image_id
from sam2jq.errors import section
from sam2jq.models.sam2 import SAM2
from sam2jq.ptq.pipeline import Quantized, quantize_params
from sam2jq.training.sharding import own_devices


class CalibrationImages(NamedTuple):
    """The clips to calibrate on."""

    items: list[Item]  # clips; a still image is a clip of one frame
    ids: list[str]  # one for each frame: its scene name, or a hash of the file's content


def find_calibration(calib: CalibConfig, seed: int) -> CalibrationImages:
    """Returns the clips that `calib` selects. Reads every frame once, so that a broken file is found before the work.

    Raises UserError or OSError if images are missing or cannot be read.
    """
    items = find_items(calib.path, calib.num_samples, seed, calib.frames, calib.stride)
    files = [frame for item in items for frame in item.frames]
    for name in files:
        read_image(name)
    return CalibrationImages(items, [image_id(name) for name in files])


def run_ptq(
    model: SAM2,
    params: dict,
    quant: QuantConfig,
    images: CalibrationImages,
    *,
    key: str = "quant",
    seed: int,
    cache_root: str,
    on_stage: Callable,
    needs: Iterable[str] = (),
) -> Quantized:
    """Returns `quantize_params` on `images`, with a progress bar; statistics are cached under `cache_root`.

    key: the section that `quant` was read from, for errors.
    """
    size = model.variant.image_size

    def clips(start: int, step: int = 1) -> Iterator[np.ndarray]:
        shown = tqdm(images.items[start::step], leave=False, disable=True if jax.process_index() else None)
        read, devices = partial(read_item, size=size), len(own_devices())
        return map(read, shown) if devices == 1 else prefetched(read, iter(shown), devices, devices)

    cache = Path(cache_root) / "calibration", (images.ids, quant.calib.frames, quant.calib.stride)
    with section(key):
        return quantize_params(model, params, quant, clips, seed=seed, needs=needs, cache=cache, on_stage=on_stage)


def with_bits_of(quant: QuantConfig, rows: Iterable[dict]) -> QuantConfig:
    """Returns `quant` with the bits of each layer in `rows`, the layer rows of a package's summary.

    The bits of inputs are taken too if `quant` quantizes inputs to integers. `bits_from` is cleared.
    """
    wgts = replace(quant.wgts, bits={row["name"]: row["bits"] for row in rows})
    with_inputs = (row for row in rows if quant.ipts.dtype and "int" in (row["inputs"] or ""))
    ipts = replace(quant.ipts, bits={row["name"]: int(row["inputs"][4:]) for row in with_inputs})  # "sintN", "uintN"
    return replace(quant, wgts=wgts, ipts=ipts, bits_from="")

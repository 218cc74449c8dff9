from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2jq.config import loader
from sam2jq.eval.gallery import EverythingItem, Gallery, GalleryItem
from sam2jq.report.run import save_run
from sam2jq.report.schema import RunMetrics

MARKUP = """<img src=x onerror="document.title='ran'">.jpg"""  # a file may be named so
LAYERS = {
    "image_encoder.trunk.blocks.0.attn.qkv": "trunk",
    "image_encoder.neck.convs.0.conv": "neck",
    "sam_mask_decoder.conv_s0": "decoder",
}


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """make_run(name, bits=4, miou=0.6, **metrics): the folder of a finished run that no model was needed for."""
    return partial(write_run, tmp_path)


def write_run(
    root: Path, name: str, bits: int = 4, miou: float = 0.6, everything: EverythingItem | None = None, **changes
) -> Path:
    folder = root / name
    folder.mkdir()
    Image.effect_noise((64, 48), 60).convert("RGB").save(root / MARKUP, "JPEG")
    shown = gallery(str(root / MARKUP))._replace(everything=everything)
    save_run(folder, RunMetrics(**metrics(bits, miou) | changes), shown)
    return folder


def gallery(image: str) -> Gallery:
    before = np.zeros((48, 64), bool)
    before[10:30, 10:40] = True
    shown = GalleryItem(image, (0.3, 0.4), 0.5, before, np.roll(before, 10, 1), (0.9, 0.4))
    return Gallery(worst=(shown._replace(iou=0.1, click=(0.1, 0.1)),), sample=(shown,))


def metrics(bits: int, miou: float) -> dict:
    """As `sam2jq quantize` makes them."""
    settings = loader.to_dict(loader.load(None, ["--model.name", "nano", "--quant.calib.path", "scenes:7",
                                              "--quant.wgts.dtype", f"sint{bits}"]))  # fmt: skip
    layers = [
        {"name": name, "part": part, "dtype": f"sint{bits}", "bits": bits, "group": "channel", "around": [], "rank": 0,
         "inputs": None, "weights": 1000, "bytes": 1000 - 300 * i, "relative_error": 0.1 + 0.05 * i, "sqnr": 20.0 - i,
         "output_error": 0.2 / (i + 1), "alpha": None, "beta": None}
        for i, (name, part) in enumerate(LAYERS.items())
    ]  # fmt: skip
    error = {"feature_error": {"stride4": 0.1, "stride8": 0.2, "stride16": 0.3}, "mask_iou": 0.7}
    scores = lambda iou: {"box": iou, "1 click": iou - 0.1, "3 clicks": iou + 0.05}
    return {
        "model": settings["model"] | {"version": "2.1", "image_size": 256},
        "names": "original",
        "checkpoint": "c0ffee",
        "images_id": "1",
        "truth_id": "1",
        "config": settings,
        "asked": settings,
        "command": f"sam2jq quantize --job {MARKUP}",
        "versions": {"sam2jq": "0.1.0"},
        "random_weights": False,
        "layers": layers,
        "unquantized": ["sam_mask_decoder.conv_s1"],
        "parameters": 3_000_000,
        "quantized_weights": 2_975_000,
        "effective_bits": bits + 0.2,
        "bytes_float32": 12_000_000,
        "bytes_quantized": 375_000 * bits,
        "bytes_unquantized": 100_000,
        "stages": [
            {"name": "images", "what": "scenes:7", "seconds": 0.1},
            {"name": "smooth", "what": "Manual", "seconds": 2.0} | error,
            {"name": "weights", "what": MARKUP, "seconds": 3.0} | error,
        ],
        "stage_images": 4,
        "results": error
        | {"kinds": ["full precision", "weights"]}
        | {"mask_iou_worst_image": 0.4, "images": 16, "prompts_per_image": 16}
        | {"miou": {"full precision": scores(0.8), "weights": scores(miou)}, "miou_images": 16, "miou_objects": 50}
        | {"miou_data": "scenes:7", "held_out": False},
    }

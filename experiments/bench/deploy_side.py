"""Prints, as JSON, the seconds and the peak memory of one side of deploy.py: the original, sam2jq, or an ONNX engine.

python -m experiments.bench.deploy_side tiny "w8a8 in openvino" FOLDER [track]

Frameworks are imported where a side needs them, so that the peak is of nothing else. Each part is done once before, to
compile. The peak is that after an image and a click.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.bench.timing import seconds
from sam2jq.cli.cost import peak_gigabytes

FRAMES, CLICKS = 12, 64
CLIPS = {"clip": FRAMES, "short": 2}  # the folders of frames in FOLDER
IMAGE, CLICK, MANY, TRACK, SHORT = "image", "click", f"{CLICKS} clicks", f"{FRAMES} frames", "2 frames"
PARTS = IMAGE, CLICK, MANY, TRACK


def predictors(name: str, side: str, folder: Path):
    """(image predictor, video predictor, context to call them in) of a side: torch, torch bfloat16, jax, or "w8a8 in
    openvino" and "w8a8 in openvino bfloat16", whose files are in `folder`."""
    if side.startswith("torch"):
        return torch_predictors(name, "bfloat16" in side)
    if side == "jax":
        from sam2jq import ImagePredictor, VideoPredictor, build, init_params
        from sam2jq.cli.compiled import use_compilation_cache
        from sam2jq.config.run import CacheConfig

        use_compilation_cache(CacheConfig())
        model = build(name)
        params = init_params(model, 0)
        return ImagePredictor(model, params), VideoPredictor(model, params), nullcontext()
    from sam2jq.deploy import OnnxImagePredictor, OnnxVideoPredictor

    files, _, engine, *dtype = side.split()
    where, settings = (folder / files, engine), {"dtype": dtype[0] if dtype else "auto"}
    return OnnxImagePredictor(*where, **settings), OnnxVideoPredictor(*where, **settings), nullcontext()


def torch_predictors(name: str, bfloat16: bool):
    """The original's predictors, which share one model, and their context."""
    import torch

    from converters.exports.vanilla import build_original

    torch.set_grad_enabled(False)
    original = build_original(name, video=True)
    context = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
    return original_image_predictor(original), original, context


def original_image_predictor(original):
    """sam2's SAM2ImagePredictor of a model, which knows the sizes of maps at 1024 pixels only."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor  # imports torchvision, which `build_original` prepares

    predictor = SAM2ImagePredictor(original)
    predictor._bb_feat_sizes = [(original.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


def work(image_predictor, video_predictor, context, folder: Path) -> dict[str, Callable]:
    """{part: function that does it once, to the end}."""
    image = np.array(Image.open(folder / "clip" / "00000.jpg"))
    clicks = np.random.default_rng(0).uniform(0, min(image.shape[:2]), (CLICKS, 1, 2)).astype(np.float32)
    labels = np.ones((CLICKS, 1), np.int32)

    def set_image():
        image_predictor.set_image(image)
        np.asarray(image_predictor.get_image_embedding())  # jax returns before it has computed

    def track(clip: str):
        state = video_predictor.init_state(str(folder / clip))
        video_predictor.add_new_points_or_box(state, 0, 1, points=clicks[0], labels=labels[0])
        return list(video_predictor.propagate_in_video(state))

    calls = {
        IMAGE: set_image,
        CLICK: lambda: image_predictor.predict(clicks[0], labels[0]),
        MANY: lambda: image_predictor.predict(clicks, labels),
        TRACK: lambda: track("clip"),
        SHORT: lambda: track("short"),
    }

    def within(call: Callable) -> Callable:
        def run():
            with context:
                call()

        return run

    return {part: within(call) for part, call in calls.items()}


def measure(name: str, side: str, folder: Path, track: bool) -> dict[str, float]:
    """{part of PARTS: seconds, "peak": GB} of a side; the clip only with `track`."""
    calls = work(*predictors(name, side, folder), folder)
    for part in (IMAGE, CLICK):
        calls[part]()
    taken = {part: seconds(calls[part]) for part in (IMAGE, CLICK)}
    taken["peak"] = peak_gigabytes()
    calls[MANY]()
    taken[MANY] = seconds(calls[MANY])
    if track:
        calls[SHORT]()
        taken[TRACK] = seconds(calls[TRACK])
    return taken


if __name__ == "__main__":
    name, side, folder, *rest = sys.argv[1:]
    print(json.dumps(measure(name, side, Path(folder), rest == ["track"])))

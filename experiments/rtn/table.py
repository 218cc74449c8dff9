"""What each bit costs the demo model: round to nearest, one scale per output channel, all layers.

python experiments/rtn/table.py > experiments/rtn/table.md
"""

import time

from converters.checkpoint import load_checkpoint
from sam2jq import QuantSpec, build, layers, round_weights
from sam2jq.eval.evaluate import evaluate_clips, evaluate_images, find_clips, find_samples
from sam2jq.quant.ops import effective_params
from sam2jq.video import VideoPredictor

BITS = (None, 8, 6, 5, 4, 3, 2)  # None: full precision
IMAGES, CLIPS = ("scenes:1001", 100), ("scenes:2002", 6)  # held out


def row(model, params: dict, bits: int | None) -> str:
    quantized = params
    if bits:
        specs = dict.fromkeys(layers(params), QuantSpec(bits))
        quantized = effective_params(round_weights(params, specs))
    scores = [100 * x for x in evaluate_images(model, quantized, find_samples(*IMAGES))["miou"].values()]
    scores.append(evaluate_clips(VideoPredictor(model, quantized), find_clips(CLIPS[0], "", CLIPS[1]), None)["j&f"])
    return " | ".join(["", f"W{bits}" if bits else "float32", *(f"{x:.1f}" for x in scores), ""]).strip()


def main() -> None:
    begin, model = time.time(), build("nano")
    params = load_checkpoint("demo", model).params
    print("| weights | box mIoU | 1 click | 3 clicks | J&F |\n|---|---|---|---|---|", flush=True)
    for bits in BITS:
        print(row(model, params, bits), flush=True)
    print(
        f"\nnano, {IMAGES[1]} images of {IMAGES[0]} and {CLIPS[1]} clips of {CLIPS[0]}, in percent. "
        f"`python experiments/rtn/table.py > experiments/rtn/table.md`, {time.time() - begin:.0f} s."
    )


if __name__ == "__main__":
    main()

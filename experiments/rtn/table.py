"""What each bit costs the demo model: round to nearest, one scale per output channel, all layers.

python experiments/rtn/table.py > experiments/rtn/table.md
"""

import time

from converters.checkpoint import load_checkpoint
from sam2jq import QuantSpec, build, layers, round_weights
from sam2jq.eval.evaluate import evaluate_images, find_samples
from sam2jq.quant.ops import effective_params

BITS = (None, 8, 6, 5, 4, 3, 2)  # None: full precision
IMAGES = ("scenes:1001", 100)  # held out


def row(model, params: dict, bits: int | None) -> str:
    quantized = params
    if bits:
        specs = dict.fromkeys(layers(params), QuantSpec(bits))
        quantized = effective_params(round_weights(params, specs))
    miou = evaluate_images(model, quantized, find_samples(*IMAGES))["miou"]
    return " | ".join(["", f"W{bits}" if bits else "float32", *(f"{100 * x:.1f}" for x in miou.values()), ""]).strip()


def main() -> None:
    begin, model = time.time(), build("nano")
    params = load_checkpoint("demo", model).params
    print("| weights | box mIoU | 1 click | 3 clicks |\n|---|---|---|---|", flush=True)
    for bits in BITS:
        print(row(model, params, bits), flush=True)
    print(
        f"\nnano, {IMAGES[1]} images of {IMAGES[0]}, in percent. "
        f"`python experiments/rtn/table.py > experiments/rtn/table.md`, {time.time() - begin:.0f} s."
    )


if __name__ == "__main__":
    main()

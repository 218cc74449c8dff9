"""Measures mask quality of the demo model by weight bits: round to nearest, one scale per output channel, all layers.

python -m experiments.rtn.table > experiments/rtn/table.md
"""

import time

from converters.checkpoint import load_checkpoint
from experiments.measured import measure
from sam2jq import QuantSpec, build, layers
from sam2jq.quant.algorithms.rtn import round_weights
from sam2jq.quant.leaves import materialize_params

BITS = (None, 8, 6, 5, 4, 3, 2)  # None: full precision
IMAGES, CLIPS = ("scenes:1001", 100), ("scenes:2002", 6)  # held out
COLUMNS = "box", "1 click", "3 clicks", "J&F"


def row(model, params: dict, bits: int | None) -> str:
    """One line of the table."""
    quantized = params
    if bits:
        specs = dict.fromkeys(layers(params), QuantSpec(bits))
        quantized = materialize_params(round_weights(params, specs))
    scores = measure(model, quantized, IMAGES, CLIPS)
    return f"| {f'W{bits}' if bits else 'float32'} | {' | '.join(f'{scores[column]:.1f}' for column in COLUMNS)} |"


def main() -> None:
    begin, model = time.time(), build("nano")
    params = load_checkpoint("demo", model).params
    print("| weights | box mIoU | 1 click | 3 clicks | J&F |\n|---|---|---|---|---|", flush=True)
    for bits in BITS:
        print(row(model, params, bits), flush=True)
    print(
        f"\nnano, {IMAGES[1]} images of {IMAGES[0]} and {CLIPS[1]} clips of {CLIPS[0]}, in percent. "
        f"`python -m experiments.rtn.table > experiments/rtn/table.md`, {time.time() - begin:.0f} s."
    )


if __name__ == "__main__":
    main()

"""Prints a table of package sizes: every model at 8 and 4 bits, one scale per output channel.

python experiments/bench/sizes.py > experiments/bench/sizes.md

Sizes do not depend on the values of the weights, so random weights are used.
"""

import tempfile
from pathlib import Path

from converters.exports.package import load_package, save_package
from sam2jq import VARIANTS, QuantSpec, build, init_params, layers
from sam2jq.quant.algorithms.rtn import round_weights

MB = 1e6


def row(name: str) -> str:
    """One line of the table."""
    params = init_params(build(name), 0)
    names = layers(params)
    cells = []
    for bits in (8, 4):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "package.pt"
            about = {"model": {"name": name, "version": "2.1", "image_size": VARIANTS[name].image_size}}
            small = round_weights(params, dict.fromkeys(names, QuantSpec(bits)))
            save_package(path, small, dict.fromkeys(names, 0.0), about)
            summary = load_package(path).summary()
            cells.append(f"{path.stat().st_size / MB:.2f} | {summary['effective_bits']:.3f}")
    return f"| {name} | {len(names)} | {summary['bytes_float32'] / MB:.2f} | {' | '.join(cells)} |"


def main() -> None:
    print("# Package files, every tensor included\n\n`python experiments/bench/sizes.py`; bits count scales.\n")
    print("| model | quantized layers | float32 MB | W8 MB | bits/weight | W4 MB | bits/weight |")
    print("|---|---|---|---|---|---|---|")
    for name in VARIANTS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()

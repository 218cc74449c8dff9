"""Times the jitted image encoder and torch's forward_image in alternation, and writes a table.

python experiments/bench/encoder.py [--models tiny base-plus] [--runs 10] [--out experiments/bench/encoder.md]

1024 x 1024, batch 1, float32, random weights. Both frameworks run in one process in the order A B A B, so that
a change in the speed of the machine affects both. Peak memory is measured in a separate process for each framework.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import torch
from timing import processor, seconds

from converters.exports.vanilla import build_original
from sam2jq import VARIANTS, build, init_params
from sam2jq.cli import cost

SIDE = 1024


def encoders(name: str, frameworks: tuple[str, ...] = ("jax", "torch")) -> tuple[dict, float]:
    """({"jax": f, "torch": f}, seconds to compile with jax); f() runs the image encoder once, to the end."""
    image = np.random.default_rng(0).standard_normal((1, SIDE, SIDE, 3)).astype(np.float32)
    functions, compile_seconds = {}, 0.0
    if "jax" in frameworks:
        model, batch = build(name), jax.device_put(image)
        params = init_params(model, 0)
        encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode_image"))
        begin = time.perf_counter()
        compiled = encode.lower(params, batch).compile()
        compile_seconds = time.perf_counter() - begin
        functions["jax"] = lambda: jax.block_until_ready(compiled(params, batch))
    if "torch" in frameworks:
        original = build_original(name)
        tensor = torch.from_numpy(image).permute(0, 3, 1, 2)
        functions["torch"] = torch.no_grad()(lambda: original.forward_image(tensor))
    return functions, compile_seconds


def peak_gigabytes(name: str, framework: str) -> float:
    """The peak memory, in GB, of a new process that loads the weights and runs the encoder of one framework twice."""
    command = [sys.executable, __file__, "--alone", framework, "--models", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def row(name: str, runs: int) -> str:
    """One line of the table."""
    functions, compile_seconds = encoders(name)
    for run in functions.values():
        run()
    pairs = [(seconds(functions["jax"]), seconds(functions["torch"])) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    ours, theirs = (statistics.median(column) for column in zip(*pairs))
    memory = [peak_gigabytes(name, framework) for framework in ("jax", "torch")]
    return (
        f"| {name} | {ours:.3f} | {theirs:.3f} | {statistics.median(ratios):.3f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}) | {compile_seconds:.1f} | {memory[0]:.2f} | {memory[1]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base-plus"], choices=list(VARIANTS))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=["jax", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        functions, _ = encoders(args.models[0], (args.alone,))
        for _ in range(2):
            functions[args.alone]()
        print(cost.peak_gigabytes())
        return
    lines = [
        "# Image encoder: sam2jq against torch",
        "",
        f"`python experiments/bench/encoder.py --runs {args.runs}` on {os.cpu_count()} cores of "
        f"{processor()}, jax {version('jax')}, torch {version('torch')}; 1024 x 1024, batch 1, "
        f"float32. Medians of {args.runs} runs in turn; ratio: median (range) of the pairs' ratios.",
        "",
        "| model | sam2jq s | torch s | ratio | compile s | peak GB sam2jq | peak GB torch |",
        "|---|---|---|---|---|---|---|",
        *(row(name, args.runs) for name in args.models),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

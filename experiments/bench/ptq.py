"""Times the slow transforms on a whole Hiera, in JAX and in plain torch, and calibration, and writes a table.

python experiments/bench/ptq.py [--model tiny] [--runs 5] [--out experiments/bench/ptq.md]

All linear layers of the trunk, calibrated on two synthetic images, random weights; W4 in groups of 32, which divide
every width, and A8. Both frameworks run in one process in the order A B A B. Peak memory of calibration is measured in
a new process each, for the encoder and, with the fewest images, for the whole model.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import torch

from sam2jq import QuantSpec, build, init_params
from sam2jq.data import preprocess
from sam2jq.data.synthetic.scenes import draw_scene
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import TRUNK_LINEAR
from sam2jq.ptq.calibration import collect
from sam2jq.quant.algorithms.activations import quantize_inputs
from sam2jq.quant.algorithms.gptq import GptqConfig, gptq_kernel
from sam2jq.quant.algorithms.lowrank import LowRankConfig, low_rank_kernel
from sam2jq.quant.algorithms.smooth import SmoothConfig, smooth_kernel
from sam2jq.quant.leaves import matmul
from sam2jq.quant.qtensor import quantize
from sam2jq.tree import flatten, kernels, layer_name

W4, A8 = QuantSpec(4, group_size=32), QuantSpec(8)
RANK, BLOCK, DAMP = 32, 128, 0.01


def calibrate(name: str, images: int, size: int | None, needs: tuple[str, ...], everything: bool = False) -> tuple:
    """({layer: kernel}, {layer: Stats}) of the trunk's linear layers; everything: calibrate all layers of the model."""
    model = build(name, image_size=size)
    params, side = init_params(model, 0), model.variant.image_size
    clips = lambda n, step=1: (preprocess(draw_scene(seed, side).image, side)[None] for seed in range(n, images, step))
    weights = {layer_name(path): w for path, w in kernels(flatten(params)).items()}
    chosen = [layer for layer in weights if TRUNK_LINEAR.fullmatch(layer)]
    stats = collect(model, params, clips, needs, layers=None if everything else chosen)
    return {layer: weights[layer] for layer in chosen}, {layer: stats[layer] for layer in chosen}


def torch_gptq(w: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """w [N, K] rounded by GPTQ (arXiv 2210.17323, algorithm 1) with act-order, static groups and blocks of BLOCK."""
    w, h = w.clone(), gram.clone()
    order = torch.argsort(torch.diag(h), descending=True)
    scales = w.reshape(len(w), -1, W4.group_size).abs().amax(-1) / W4.qmax
    scales = scales.repeat_interleave(W4.group_size, 1)[:, order]
    w, h = w[:, order], h[order][:, order]
    h += DAMP * torch.diag(h).mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.zeros_like(w)
    for begin in range(0, w.shape[1], BLOCK):
        end = min(begin + BLOCK, w.shape[1])
        errors = torch.zeros(len(w), end - begin)
        for k in range(begin, end):
            out[:, k] = torch.clamp(torch.round(w[:, k] / scales[:, k]), W4.qmin, W4.qmax) * scales[:, k]
            errors[:, k - begin] = (w[:, k] - out[:, k]) / inverse[k, k]
            w[:, k:end] -= errors[:, k - begin, None] * inverse[k, k:end]
        w[:, end:] -= errors @ inverse[begin:end, end:]
    return out[:, torch.argsort(order)]


def torch_svd(w: torch.Tensor) -> torch.Tensor:
    """w [N, K] minus its best approximation of rank RANK, by a full SVD."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return w - (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def seconds(run) -> float:
    """The duration of run()."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def row(name: str, ours, theirs, runs: int) -> str:
    """One line of the table: first call, medians of `runs` alternating calls of both, and their ratio."""
    first = seconds(ours)
    print(f"{name}: first call {first:.1f} s", flush=True)  # an interrupted run leaves these
    if theirs is None:
        times = [seconds(ours) for _ in range(runs)]
        return f"| {name} | {first:.1f} | {statistics.median(times):.1f} | | |"
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"| {name} | {first:.1f} | {medians[0]:.2f} | {medians[1]:.2f} | {spread} |"


def products(runs: int) -> list[str]:
    """Table lines of one linear layer, 384 -> 1536 for 4096 tokens: float32, simulated and integer products."""
    rng = np.random.default_rng(0)
    x, w = (jax.numpy.asarray(rng.standard_normal(shape), jax.numpy.float32) for shape in ((4096, 384), (384, 1536)))
    lines = []
    for name, spec in {"W8A8": QuantSpec(8), "W4A8, groups of 32": W4}.items():
        quantized = quantize_inputs(quantize(w, spec), None, A8)
        leaves = {"float32": w, "simulated": quantized, "integer": replace(quantized, integer=True)}
        calls = {mode: partial(jax.jit(matmul), leaf, x) for mode, leaf in leaves.items()}
        for call in calls.values():
            jax.block_until_ready(call())
        times = {mode: [] for mode in calls}
        for _ in range(runs):
            for mode, call in calls.items():
                times[mode].append(seconds(lambda call=call: jax.block_until_ready(call())))
        medians = {mode: 1000 * statistics.median(values) for mode, values in times.items()}
        lines.append(f"| {name} | " + " | ".join(f"{medians[mode]:.1f}" for mode in leaves) + " |")
    return lines


def peak(name: str, images: int, *whole: str) -> str:
    """The peak memory and time of a new process that calibrates on `images` images; whole: "--whole" or nothing."""
    start, command = time.perf_counter(), [sys.executable, __file__, "--alone", str(images), "--model", name, *whole]
    memory = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e9
    duration = time.perf_counter() - start
    text = f"{images} images{', the whole model' if whole else ''}: {memory:.2f} GB, {duration:.0f} s"
    print(text, flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--size", type=int, help="side of the images; default: the model's own")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("experiments/bench/ptq.md"))
    parser.add_argument("--memory", type=int, nargs="*", default=[8, 128], help="numbers of images")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        calibrate(args.model, args.alone, args.size, ("gram",), args.whole)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return

    begin = time.perf_counter()
    weights, stats = calibrate(args.model, 2, args.size, ("gram", "tokens"))
    taken = time.perf_counter() - begin
    ws = {k: torch.from_numpy(np.array(w).T.copy()) for k, w in weights.items()}
    grams = {k: torch.from_numpy(np.array(stats[k].gram)) for k in weights}
    for_all = lambda fn, args: lambda: jax.block_until_ready([fn(weights[k], stats[k], *args) for k in weights])
    search = W4, A8, SmoothConfig(strategy="GridSearch", num_grids=20)
    branch = lambda **settings: (W4, A8, LowRankConfig(rank=RANK, **settings))
    lines = [
        row("GPTQ, first pass only", for_all(gptq_kernel, (W4, GptqConfig(sweeps=0))),
            lambda: [torch_gptq(ws[k], grams[k]) for k in ws], args.runs),
        row("GPTQ with two sweeps", for_all(gptq_kernel, (W4,)), None, args.runs),
        row("smoothing, 20 candidates", for_all(smooth_kernel, search), None, args.runs),
        row("low rank 32, against one full SVD", for_all(low_rank_kernel, branch()),
            lambda: [torch_svd(w) for w in ws.values()], args.runs),
        row("low rank 32, ten rounds", for_all(low_rank_kernel, branch(num_iters=10)), None, args.runs),
    ]  # fmt: skip
    memory = [peak(args.model, n) for n in args.memory]
    memory += [peak(args.model, min(args.memory), "--whole")] if memory else []
    text = "\n".join(
        [
            "| of all trunk linears | first call, s | JAX, s | torch, s | JAX / torch |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"{args.model}, {len(weights)} linears, 2 images at {args.size or 'its own size'}, {os.cpu_count()} cores; "
            f"medians of {args.runs} alternating runs. "
            f"jax {version('jax')}, torch {version('torch')}. Calibration: {taken:.0f} s, of which most is compiling; "
            f"peak memory and time of a process that does only that: {'; '.join(memory)}.",
            "",
            "| one linear, ms | float32 | codes multiplied in float32 | in int8 with int32 sums |",
            "|---|---|---|---|",
            *products(4 * args.runs),
            "",
            "384 -> 1536 for 4096 tokens; the last two round activations first. `python experiments/bench/ptq.py`",
            "",
        ]
    )
    with atomic_write(args.out) as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

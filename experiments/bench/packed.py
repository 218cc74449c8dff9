"""Memory and time of 4-bit weights that devices hold as two codes a byte, against a byte each and against float32.

taskset -c 0 python -m experiments.bench.packed [--model tiny] [--runs 5]  # > experiments/bench/packed.md

uint4 in groups of 128, random weights. The three run in turns, on one core: other programs then change the CPU time
little, and the least of the runs hardly at all.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import sam2jq
from experiments.bench.timing import processor
from sam2jq.predictors.image import decode, encode_images
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.qtensor import QTensor

CLICK = (jnp.array([[[500.0, 600.0]]]), jnp.array([[1]]))


def in_bytes(leaf):
    """A leaf whose codes take a byte each."""
    return replace(leaf, qvalue=leaf.qvalue.astype(jnp.uint8)) if isinstance(leaf, QTensor) else leaf


def held(params: dict) -> float:
    """MB that the device holds: what XLA allocates for the arguments of a program."""
    return jax.jit(lambda params: params).lower(params).compile().memory_analysis().argument_size_in_bytes / 1e6


def cpu_seconds(fn: Callable, repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(fn())
    return (time.process_time() - begin) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", choices=sam2jq.VARIANTS)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model, plain = sam2jq.load("random:0", name=args.model)
    packed = sam2jq.rtn(sam2jq.QuantSpec(4, symmetric=False, group_size=128)).apply(plain, {})
    trees = {
        "two codes a byte": packed,
        "one code a byte": jax.tree.map(in_bytes, packed, is_leaf=lambda node: not isinstance(node, dict)),
        "float32": materialize_weights(packed),
    }
    size = model.variant.image_size
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, size, size, 3)), jnp.float32)
    features = {name: encode_images(model, params, image) for name, params in trees.items()}
    click = lambda name: decode(model, trees[name], features["float32"], CLICK, multimask=True)
    for name in trees:
        jax.block_until_ready(click(name))
    encoder, decoder = ({name: [] for name in trees} for _ in range(2))
    for _ in range(args.runs):
        for name, params in trees.items():
            encoder[name].append(cpu_seconds(lambda params=params: encode_images(model, params, image), 1))
            decoder[name].append(cpu_seconds(lambda name=name: click(name), 5))
    print("# 4-bit weights in memory\n")
    print(f"`taskset -c 0 python -m experiments.bench.packed --model {args.model} --runs {args.runs}`, {processor()}, "
          f"jax {jax.__version__}, {size} x {size}: the least CPU time of the runs, on one core.\n")  # fmt: skip
    print("| weights | MB | image encoder s | one click ms |\n|---|---|---|---|")
    for name, params in trees.items():
        times = min(encoder[name]), 1e3 * min(decoder[name])
        print(f"| {name} | {held(params):.1f} | {times[0]:.2f} | {times[1]:.1f} |")


if __name__ == "__main__":
    main()

"""Times one distillation step of the image encoder, alternating with the same step in plain torch; writes a table.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/bench/distill.py [--student tiny] [--teacher small] [--runs 8]
    [--out experiments/bench/distill.md]

1024 x 1024, batch 1, float32, random weights: the teacher's features, the student's under 4-bit weights with straight-
through gradients (one scale an output channel, from the weights' present range), the relative square error of the three
maps, and AdamW on the whole encoder. Each implementation has its own process. They run in the order A B C A B C, one at
a time, and their losses are compared step by step. Huge pages are enabled for all of them. Without them, sam2jq's step,
which allocates its memory anew each time, waits longer for the system.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from timing import processor

from converters.exports.vanilla import build_original
from converters.names import to_torch
from sam2jq import build, init_params
from sam2jq.cli import cost
from sam2jq.distillation.losses import relative_square_error
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.algorithms.fake_quant import init_fake_quant, stop_gradient_where, trainable_mask
from sam2jq.quant.spec import QuantSpec
from sam2jq.training.state import init_state
from sam2jq.training.step import make_train_step
from sam2jq.tree import flatten, kernels, layer_name, unflatten

SIDE, BITS, RATE = 1024, 4, 1e-4
ENCODER = ("image_encoder", "sam_mask_decoder/conv_s")


def encoder_of(params: dict) -> tuple[dict, dict]:
    """The encoder of a whole SAM 2, and the top-level arrays that the model also needs."""
    flat = flatten(params)
    ours = {path: leaf for path, leaf in flat.items() if path.startswith(ENCODER)}
    return unflatten(ours), {path: leaf for path, leaf in flat.items() if "/" not in path}


def jax_step(student_name: str, teacher_name: str, image: np.ndarray, remat: bool = False):
    """A function that takes one step and returns its loss. remat: as in train.remat."""
    teacher, model = build(teacher_name), build(student_name).clone(remat=remat)
    (targets, other), (params, rest) = encoder_of(init_params(teacher, 0)), encoder_of(init_params(model, 1))
    targets |= other
    layers = [layer_name(path) for path in kernels(flatten(params))]
    student = init_fake_quant(params, dict.fromkeys(layers, QuantSpec(BITS)))
    encode = lambda model, params, x: model.apply({"params": params}, x, method="encode_image")

    frozen = jax.tree.map(lambda trained: not trained, trainable_mask(student, clipping=False))

    def loss(params, batch, key):
        image, targets, rest = (
            batch  # as arguments: constants of the program would be in memory several times during compilation
        )
        expected = encode(teacher, targets, image)
        got = encode(model, unflatten(rest | flatten(materialize_weights(stop_gradient_where(params, frozen)))), image)
        return sum(relative_square_error(a, b) for a, b in zip(got, expected)) / 3, {}

    optimizer = optax.chain(optax.adamw(RATE, weight_decay=0), optax.masked(optax.set_to_zero(), frozen))
    step, state = make_train_step(loss, optimizer), init_state(student, optimizer, 0)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, (image, targets, rest))
        return float(metrics["loss"])

    return run


class FakeQuant(torch.nn.Module):
    """Rounds weights to 4 bits, one scale an output channel, with straight-through gradients."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, w):
        with torch.no_grad():
            other = [i for i in range(w.ndim) if i != self.axis]
            scale = w.abs().amax(other, keepdim=True) / (2 ** (BITS - 1) - 1)
            rounded = torch.round(w / scale) * scale
        return w + (rounded - w).detach()


def torch_step(student_name: str, teacher_name: str, image: np.ndarray):
    """The same step in torch, with torch's own layers."""
    teacher, model = build_original(teacher_name), build_original(student_name)
    teacher.load_state_dict(to_torch(init_params(build(teacher_name), 0)))
    model.load_state_dict(to_torch(init_params(build(student_name), 1)))
    parts = [*model.image_encoder.modules(), model.sam_mask_decoder.conv_s0, model.sam_mask_decoder.conv_s1]
    for part in parts:
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.utils.parametrize.register_parametrization(part, "weight", FakeQuant(0))
    trainable = [p for part in (model.image_encoder, *parts[-2:]) for p in part.parameters()]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0)
    batch = torch.from_numpy(image).permute(0, 3, 1, 2)

    def run() -> float:
        optimizer.zero_grad()
        with torch.no_grad():
            expected = teacher.forward_image(batch)["backbone_fpn"]
        got = model.forward_image(batch)["backbone_fpn"]
        loss = sum(torch.square(a - b).sum() / (torch.square(b).sum() + 1e-12) for a, b in zip(got, expected)) / 3
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


STEPS = {"sam2jq": jax_step, "sam2jq, `train.remat`": partial(jax_step, remat=True), "torch": torch_step}


def work(run: Callable[[], float]) -> None:
    """Takes a step for each line of stdin and prints its seconds and its loss; at the end, the peak memory in kB."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = run()
        print(time.perf_counter() - start, loss, flush=True)
    print(cost.peak_gigabytes())


class Worker:
    """A process that takes one of STEPS at each call of `step`."""

    def __init__(self, name: str, args: argparse.Namespace):
        command = [sys.executable, __file__, "--alone", name, "--student", args.student, "--teacher", args.teacher]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(self) -> tuple[float, float]:
        """The seconds and the loss of one step."""
        print(file=self.process.stdin, flush=True)
        took, loss = map(float, self.process.stdout.readline().split())
        return took, loss

    def peak_gigabytes(self) -> float:
        """The peak memory in GB; ends the process."""
        return float(self.process.communicate()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="tiny")
    parser.add_argument("--teacher", default="small")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        image = np.random.default_rng(0).standard_normal((1, SIDE, SIDE, 3)).astype(np.float32)
        work(STEPS[args.alone](args.student, args.teacher, image))
        return
    workers = {name: Worker(name, args) for name in STEPS}
    first = {name: worker.step() for name, worker in workers.items()}
    turns = [{name: worker.step() for name, worker in workers.items()} for _ in range(args.runs)]
    memory = {name: worker.peak_gigabytes() for name, worker in workers.items()}
    times = {name: [turn[name][0] for turn in turns] for name in STEPS}
    losses = {name: [turn[name][1] for turn in (first, *turns)] for name in STEPS}
    reference = losses["torch"]
    difference = max(abs(a / b - 1) for values in losses.values() for a, b in zip(values, reference))
    tunables = os.environ.get("GLIBC_TUNABLES")
    prefix = f"GLIBC_TUNABLES={tunables} " if tunables else ""
    lines = [
        "# A distillation step: sam2jq against torch",
        "",
        f"`{prefix}python experiments/bench/distill.py --student {args.student} --teacher {args.teacher} "
        f"--runs {args.runs}`",
        f"on {os.cpu_count()} cores of {processor()}, jax {version('jax')}, torch {version('torch')};",
        f"{args.teacher} teaches {args.student}, 1024 x 1024, batch 1, float32, encoders only. Medians of {args.runs} "
        "steps in turn, each in a process of its own; ratio to torch: median (range) of the turns' ratios. Losses of "
        f"the {args.runs + 1} steps differ by {difference:.1e} at most, relative ({reference[0]:.4f} at the first, "
        f"{reference[-1]:.4f} at the last).",
        "",
        "| step | s | ratio | first step s | peak GB |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["torch"])]
        lines.append(
            f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.3f} ({min(ratios):.2f}-"
            f"{max(ratios):.2f}) | {first[name][0]:.0f} | {memory[name]:.2f} |"
        )
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

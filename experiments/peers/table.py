"""Compares the demo model quantized by this program with the same weights quantized by public libraries.

.peers/bin/python -m experiments.peers.table > experiments/peers/table.md

The libraries are in an environment of their own, which `make peers` creates before it runs this. Every method sees the
same 131 layers, convolutions as matrices, and the same function scores all. An interrupted run is continued by the same
command: each finished run is a line of runs.jsonl, which also holds a fingerprint of the weights. Names of libraries
as arguments, or sam2jq, make only their rows. With --kept nothing is run and the table is printed from runs.jsonl.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.checkpoint import load_checkpoint
from experiments.measured import Runs, cached_samples, effective_bits
from experiments.peers import onnx_graphs
from experiments.peers.libraries import METHODS, SCALE_BITS, Method
from sam2jq import build
from sam2jq.cli.compiled import use_compilation_cache
from sam2jq.config import loader
from sam2jq.config.run import CacheConfig
from sam2jq.data import find_images, preprocess, read_image
from sam2jq.eval.image_benchmark import PROMPTS, object_ious, segment_objects
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.ptq.pipeline import calibrated, quantize_params
from sam2jq.quant.algorithms.activations import materialize_weights, quantize_activations
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.stats import Stats
from sam2jq.tree import flatten, kernels, layer_name, unflatten

STATIC = "W8A8 static"  # fixed grids for inputs, as ONNX engines have them
OURS = {  # {scheme: config}
    "W8A8": "nano_w8a8",
    STATIC: "nano_w8a8_static",
    "W4A8": "nano_w4a8",
    "W4A16": "nano_w4a16",
    "W3A16": "nano_w3a16",
    "W2A16": "nano_w2a16",
}
ON_GRAPHS = {
    "nncf": "nncf.quantize, transformer, no smoothing or bias correction",
    "onnxruntime": "quantize_static, per channel, float biases",
}
SEEDS = (7, 8, 9)  # of the calibration scenes of our rows; the libraries calibrate on the first
CALIBRATED, IMAGES = 32, ("scenes:1001", 48)  # the latter held out
RESAMPLES = 10_000
NEEDS = frozenset({"gram", "tokens"})  # the statistics that any row needs, so that all rows share one calibration


def score(predictor: PromptedImage) -> dict[str, list[float]]:
    """{"box", "1 click", "3 clicks": mIoU of each image in percent, "objects": their number in each image}."""
    rows = []
    for sample in cached_samples(*IMAGES):
        image, masks = sample.read()
        ious = object_ious(segment_objects(predictor, image, masks), masks)
        rows.append([*(round(100 * float(ious[prompt].mean()), 4) for prompt in PROMPTS), len(masks)])
    return dict(zip((*PROMPTS, "objects"), map(list, zip(*rows))))


def bootstrap(full: dict, runs: Sequence[dict]) -> list[tuple[float, float, float]]:
    """[(change of mIoU, 2.5th and 97.5th percentile of it over resampled images)] for each prompt, in points.

    The change is the median over `runs`, in each resample too. full, runs: results of `score` on the same images.
    """
    objects = np.array(full["objects"])
    everything = np.arange(len(objects))[None]
    resampled = np.random.default_rng(0).integers(len(objects), size=(RESAMPLES, len(objects)))

    def change(prompt: str, images: np.ndarray) -> np.ndarray:
        of_run = lambda run: np.array(run[prompt]) - np.array(full[prompt])
        means = [(of_run(run) * objects)[images].sum(1) / objects[images].sum(1) for run in runs]
        return np.median(means, 0)

    return [(change(p, everything)[0], *np.percentile(change(p, resampled), [2.5, 97.5])) for p in PROMPTS]


def calibration_clips(model: SAM2, seed: int) -> tuple[Callable, tuple[Path, list[str]]]:
    """(the images of scenes:<seed> as `quantize_params` takes them, where their statistics are kept)."""
    size, names = model.variant.image_size, find_images(f"scenes:{seed}", CALIBRATED, 0)
    clips = lambda n, step=1: (preprocess(read_image(image), size)[None] for image in names[n::step])
    return clips, (Path("cache/sam2/calibration"), names)


def quantize(model: SAM2, params: dict, name: str, seed: int) -> tuple[dict, float]:
    """(params quantized by experiments/<name>.yaml and calibrated on scenes:<seed>, bits a weight)."""
    clips, kept = calibration_clips(model, seed)
    quant = loader.load(f"experiments/{name}.yaml", []).quant
    quantized = quantize_params(model, params, quant, clips, seed=seed, needs=NEEDS, cache=kept).params
    return quantized, effective_bits(quantized)


def quantize_by(method: Method, params: dict, stats: dict[str, Stats]) -> tuple[dict, float]:
    """(params with the weights and the rounding of inputs of a library, bits a weight).

    A matrix whose rows are no multiple of the group size is filled up with zeros, which are not counted.
    """
    flat, stored, weights = flatten(params), 0, 0
    for path, kernel in kernels(flat).items():
        w = np.asarray(kernel).reshape(-1, kernel.shape[-1]).T
        fill = lambda rows: np.pad(rows, ((0, 0), (0, -rows.shape[1] % method.group)))
        w_hat, extra = method.quantize(fill(w), fill(np.asarray(stats[layer_name(path)].tokens)))
        flat[path] = jnp.asarray(w_hat[:, : w.shape[1]].T.reshape(kernel.shape), jnp.float32)
        stored, weights = stored + w.size * method.bits + extra, weights + w.size
    quantized = unflatten(flat)
    if method.inputs:
        quantized = quantize_activations(method.inputs).apply(quantized, {})
    return quantized, stored / weights


def make_row(runs: Runs, name: str, make: Callable[[], tuple[PromptedImage, float]], others: bool = True) -> None:
    """Adds a run to `runs` if it is missing: its "scores" and "bits", or why a library "refused"."""
    if name in runs:
        return
    print(name, file=sys.stderr)
    try:
        predictor, bits = make()
        runs.add(name, {"bits": bits, "scores": score(predictor)})
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a library raises is its answer
        if not others:
            raise
        runs.add(name, {"refused": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"})


def label(method: Method) -> str:
    """The name of a library's run."""
    return f"{method.scheme} {method.library} {method.name} g{method.group}"


def make_rows(runs: Runs, libraries: Sequence[str]) -> None:
    """Adds the missing runs of `libraries`; ours with the first seed come first, with the others last."""
    model = build("nano")
    full = materialize_params(load_checkpoint("demo", model).params)
    predict = lambda params: ImagePredictor(model, materialize_weights(params))

    def ours(config: str, seed: int) -> tuple[PromptedImage, float]:
        params, bits = quantize(model, full, config, seed)
        return predict(params), bits

    @cache
    def statistics() -> dict[str, Stats]:
        clips, kept = calibration_clips(model, SEEDS[0])
        return calibrated(model, full, clips, NEEDS, kept, frozenset(map(layer_name, kernels(flatten(full)))))

    def theirs(method: Method) -> tuple[PromptedImage, float]:
        params, bits = quantize_by(method, full, statistics())
        return predict(params), bits

    def on_graphs(library: str) -> tuple[PromptedImage, float]:
        samples, folder = cached_samples(f"scenes:{SEEDS[0]}", CALIBRATED), Path("outputs/peers") / library
        return onnx_graphs.quantized_predictor(model, full, samples, getattr(onnx_graphs, library), folder)

    make_row(runs, "full", lambda: (predict(full), 32.0), others=False)
    for seed in SEEDS:
        if "sam2jq" in libraries:
            for scheme, config in OURS.items():
                make_row(runs, f"{scheme} {config} {seed}", partial(ours, config, seed), others=False)
        for method in METHODS if seed == SEEDS[0] else ():
            if method.library in libraries:
                make_row(runs, label(method), partial(theirs, method))
        for library in ON_GRAPHS if seed == SEEDS[0] else ():
            if library in libraries:
                make_row(runs, f"{STATIC} {library}", partial(on_graphs, library))


def print_table(runs: Runs) -> None:
    """Prints the rows of all finished runs, scheme by scheme."""
    full, refused = runs["full"]["scores"], []
    print("| scheme | library | method | runs | bits a weight | box | 1 click | 3 clicks |")
    print("|---|---|---|---|---|---|---|---|")
    means = [np.average(full[prompt], weights=full["objects"]) for prompt in PROMPTS]
    print("| float32 | | (the scores) | | 32 | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")

    def print_row(scheme: str, library: str, name: str, labels: Sequence[str]) -> None:
        made = [runs[label] for label in labels if label in runs]
        refused.extend(f"{scheme}, {library} {name}: {run['refused']}" for run in made if "refused" in run)
        made = [run for run in made if "scores" in run]
        if made:
            cells = [f"{x:+.1f} [{a:+.1f}, {b:+.1f}]" for x, a, b in bootstrap(full, [run["scores"] for run in made])]
            bits = np.median([run["bits"] for run in made])
            print(f"| {scheme} | {library} | {name} | {len(made)} | {bits:.2f} | {' | '.join(cells)} |")

    for scheme, config in OURS.items():
        print_row(scheme, "**sam2jq**", f"`{config}.yaml`", [f"{scheme} {config} {seed}" for seed in SEEDS])
        for method in METHODS:
            if method.scheme == scheme:
                name = method.name + (f", groups of {method.group}" if method.group > 1 else "")
                print_row(scheme, method.library, name, [label(method)])
        for library, name in ON_GRAPHS.items() if scheme == STATIC else ():
            print_row(scheme, library, name, [f"{STATIC} {library}"])
    print(
        f"\nnano: the first row in percent, the others the change in points of mIoU on {IMAGES[1]} held-out images of "
        f"{IMAGES[0]}, with a 95 % interval (paired bootstrap over images). Rows of sam2jq are medians over "
        f"calibrations on {CALIBRATED} images each of {', '.join(f'scenes:{seed}' for seed in SEEDS)}; the column runs "
        f"counts them. The libraries calibrate on scenes:{SEEDS[0]}. Bits are codes, scales and zero points of the "
        f"quantized weights; a scale of a library counts {SCALE_BITS} bits."
    )
    if refused:
        print("\nRefused:\n\n" + "\n".join(f"- {line}" for line in refused))


def main() -> None:
    libraries = [argument for argument in sys.argv[1:] if argument != "--kept"]
    every = ["sam2jq", *dict.fromkeys(method.library for method in METHODS), *ON_GRAPHS]
    if unknown := [name for name in libraries if name not in every]:
        sys.exit(f"no library {unknown[0]}; there are {', '.join(every)}")
    use_compilation_cache(CacheConfig())
    runs = Runs(Path(__file__).with_name("runs.jsonl"))
    if "--kept" not in sys.argv:
        try:
            make_rows(runs, libraries or every)
        except ModuleNotFoundError as error:
            sys.exit(f"{error}: `make peers` installs the libraries")
    print_table(runs)


if __name__ == "__main__":
    main()

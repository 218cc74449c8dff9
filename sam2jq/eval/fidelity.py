"""What quantization cost: masks against those in full precision and against true ones, layer by layer, by stage."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2jq.config import Config
from sam2jq.data import read_image
from sam2jq.eval.agreement import Compared, compare, summarize
from sam2jq.eval.evaluate import Annotated, Sample, evaluate_clips, find_clips, find_samples
from sam2jq.eval.gallery import Gallery, add, draw, of_clicks, of_objects
from sam2jq.eval.metrics import relative_error
from sam2jq.eval.prompted import mean_ious, object_ious, segment_objects
from sam2jq.models.sam2 import FLOW, SAM2
from sam2jq.predictors.video import VideoPredictor
from sam2jq.ptq.calibration import fingerprint
from sam2jq.ptq.pipeline import UNROUNDED, in_order
from sam2jq.quant.leaves import effective_params
from sam2jq.quant.transform import Stats
from sam2jq.tree import flatten, kernels, layer_name

GRID = 4  # clicks per side of an image
STAGE_IMAGES = 4  # that the model is compared on after every stage
PARTS = ("trunk", "trunk", "neck", "prompts", "decoder", "memory encoder", "memory attention")  # of FLOW


def find_truth(config: Config) -> tuple[list[Sample], list[Annotated]]:
    """The images and the clips whose masks are known; none where the config names none."""
    wanted, calib = config.measure, config.quant.calib
    source, number = wanted.images, wanted.num_images
    if not source and calib.path.startswith("scenes:"):
        source, number = calib.path, calib.num_samples
    samples = find_samples(source, number) if source else []
    return samples, find_clips(wanted.clips, wanted.split, wanted.num_clips) if wanted.clips else []


def truth_id(truth: tuple[list[Sample], list[Annotated]]) -> str:
    """What only runs share that are measured on the same images and clips with known masks, wherever these lie."""
    return fingerprint({}, [Path(one.name).name for found in truth for one in found])


def measure(
    model: SAM2,
    kinds: Mapping[str, dict],
    reached: Mapping[str, dict],
    names: list[str],
    truth: tuple[list[Sample], list[Annotated]],
    config: Config,
    watch: Callable,
) -> tuple[dict, dict[str, dict], Gallery]:
    """What was measured of the params trees `kinds`, the errors after each stage, and masks to show.

    kinds: "full precision", what rounding `reached`, and maybe "nunchaku"; names: images without masks; truth: images
    and clips with them; watch: as `quantize_params` takes it.
    """
    full, (*_, last), (samples, clips) = kinds["full precision"], reached, truth
    with watch("compare", f"{len(names)} images x {GRID * GRID} clicks"):
        compared, gallery = against_full(model, full, kinds[last], names, config)
        results = summarize(compared) | {"kinds": ["full precision", last]}
        if "nunchaku" in kinds:
            results["nunchaku"] = summarize(against_full(model, full, kinds["nunchaku"], names, config)[0])
        errors = stage_errors(model, full, reached, compared, names, config)
    if samples:
        with watch("segment", f"{len(samples)} images whose masks are known"):
            scores, gallery = against_truth(model, kinds, last, samples, config)
        used = {Path(name).resolve() for name in names}
        held_out = used.isdisjoint(Path(sample.name).resolve() for sample in samples)
        results |= scores | {"miou_data": config.measure.images or config.quant.calib.path, "held_out": held_out}
    if clips:
        with watch("track", f"{len(clips)} clips whose masks are known"):
            both = {kind: kinds[kind] for kind in results["kinds"]}
            results |= against_clips(model, both, clips, config) | {"video_data": config.measure.clips}
    return results, errors, gallery


def against_full(
    model: SAM2, full: dict, quantized: dict, names: list[str], config: Config
) -> tuple[list[Compared], Gallery]:
    """What `compare` finds on every image, without its masks, and those to show."""
    size = config.quant.calib.batch_size
    batches = ([read_image(name) for name in names[i : i + size]] for i in range(0, len(names), size))
    compared = compare(model, full, quantized, batches, GRID, config.model.dtype)
    progress = tqdm(zip(names, compared), total=len(names), unit="image", leave=False, disable=None)
    drawn, gallery, results = draw(len(names), config.seed), Gallery(), []
    for i, (name, result) in enumerate(progress):
        gallery = add(gallery, of_clicks(name, result), drawn.get(i))
        results.append(result._replace(masks=None))
    return results, gallery


def against_truth(
    model: SAM2, kinds: Mapping[str, dict], last: str, samples: list[Sample], config: Config
) -> tuple[dict, Gallery]:
    """{"miou": {kind: {prompt: mIoU}}, "miou_images", "miou_objects"} of params trees, and masks to show of `last`."""
    drawn, gallery, scores = draw(len(samples), config.seed), Gallery(), {kind: [] for kind in kinds}
    for i, sample in enumerate(tqdm(samples, unit="image", leave=False, disable=None)):
        image, masks = sample.read()
        if len(masks):
            found = {k: segment_objects(model, params, image, masks, config.model.dtype) for k, params in kinds.items()}
            for kind in kinds:
                scores[kind].append(object_ious(found[kind], masks))
            both = (found[kind]["1 click"] for kind in ("full precision", last))
            gallery = add(gallery, of_objects(sample.name, masks, *both), drawn.get(i))
    of_last = scores[last]
    if not of_last:
        raise ValueError(f"{config.measure.images}: no image has an object to segment, give others for measure.images")
    objects = sum(len(ious["box"]) for ious in of_last)
    means = {kind: mean_ious(of) for kind, of in scores.items()}
    return {"miou": means, "miou_images": len(of_last), "miou_objects": objects}, gallery


def against_clips(model: SAM2, kinds: Mapping[str, dict], clips: list[Annotated], config: Config) -> dict:
    """{"video": {kind: {"j", "f", "j&f"}}, in percent, "video_clips", "video_objects"} of params trees."""
    found = {
        kind: evaluate_clips(
            VideoPredictor(model, params, dtype=config.model.dtype),
            tqdm(clips, unit="clip", leave=False, disable=None),
        )
        for kind, params in kinds.items()
    }
    last = next(reversed(found.values()))
    scores = {kind: {name: of[name] for name in ("j", "f", "j&f")} for kind, of in found.items()}
    return {"video": scores, "video_clips": last["clips"], "video_objects": last["objects"]}


def stage_errors(
    model: SAM2, full: dict, reached: Mapping[str, dict], results: list[Compared], names: list[str], config: Config
) -> dict[str, dict]:
    """{stage: what `summarize` says after it} on the first few images; `results`: those of the last stage.

    Weights are the plain arrays they stand for, so that all stages share one compiled program; the one stage that
    would lose something by that, the rounding of inputs, is the last.
    """
    some, (*stages, last) = names[:STAGE_IMAGES], (name for name in reached if name != UNROUNDED)
    found = {
        name: summarize(against_full(model, full, effective_params(reached[name]), some, config)[0]) for name in stages
    }
    return found | {last: summarize(results[:STAGE_IMAGES])}


def layer_figures(full: dict, quantized: dict, stats: Mapping[str, Stats]) -> dict[str, dict]:
    """{layer: {"part", "relative_error", "output_error"}}, as data runs through them, of every quantized layer.

    relative_error: |w_hat - w| / |w|; output_error: |x w_hat - x w| / |x w| for the inputs x of calibration, which
    the weight alone makes; None where no Gram matrix of them was collected.
    """
    plain, rounded = flatten(full), flatten(effective_params(quantized))
    paths = {layer_name(p): p for p, leaf in kernels(flatten(quantized)).items() if leaf is not plain[p]}
    order = [layer for group in in_order(paths) for layer in group]
    return {layer: figures_of(rounded[paths[layer]], plain[paths[layer]], stats.get(layer)) | {"part": part(layer)}
            for layer in order}  # fmt: skip


def figures_of(rounded, plain, stats: Stats | None) -> dict:
    """{"relative_error", "output_error"} of one kernel."""
    error = None
    if stats is not None and stats.gram is not None:
        gram = np.asarray(stats.gram)
        energy = lambda w: float(np.vdot(w, gram @ w))
        w, w_hat = (np.asarray(x).reshape(len(gram), -1) for x in (plain, rounded))
        error = (max(energy(w_hat - w), 0) / energy(w)) ** 0.5 if energy(w) > 0 else None
    return {"relative_error": relative_error(rounded, plain), "output_error": error}


def part(layer: str) -> str:
    """The part of SAM 2 that a layer belongs to, in a word or two."""
    return next(name for name, pattern in zip(PARTS, FLOW) if pattern.match(layer))

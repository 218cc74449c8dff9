"""Fidelity of a quantized model: masks against full precision and ground truth, and errors by stage and layer."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2jq.config.run import Config
from sam2jq.data import read_image
from sam2jq.data.sources import LabeledClip, LabeledImage, find_clips, find_samples
from sam2jq.errors import UserError
from sam2jq.eval.agreement import Compared, compare, summarize
from sam2jq.eval.gallery import Gallery, add, of_clicks, of_objects, sample_images
from sam2jq.eval.image_benchmark import mean_ious, object_ious, segment_objects
from sam2jq.eval.vos_benchmark import evaluate_clips
from sam2jq.models.sam2 import FLOW, SAM2
from sam2jq.predictors.video import VideoPredictor
from sam2jq.ptq.pipeline import UNROUNDED, in_order
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.stats import Stats
from sam2jq.tree import fingerprint, flatten, kernels, layer_name

GRID = 4  # clicks per side of an image
STAGE_IMAGES = 4  # that the model is compared on after every stage
PARTS = ("trunk", "trunk", "neck", "prompts", "decoder", "memory encoder", "memory attention")  # of FLOW


def find_ground_truth(config: Config) -> tuple[list[LabeledImage], list[LabeledClip]]:
    """The images and clips with ground-truth masks that the config names; empty lists where it names none."""
    settings, calib = config.measure, config.quant.calib
    source, number = settings.images, settings.num_images
    if not source and calib.path.startswith("scenes:"):
        source, number = calib.path, calib.num_samples
    samples = find_samples(source, number) if source else []
    return samples, find_clips(settings.clips, settings.split, settings.num_clips) if settings.clips else []


def ground_truth_id(ground_truth: tuple[list[LabeledImage], list[LabeledClip]]) -> str:
    """A fingerprint of the file names of the images and clips with ground truth, without their folders."""
    return fingerprint({}, [Path(one.name).name for found in ground_truth for one in found])


def measure(
    model: SAM2,
    variants: Mapping[str, dict],
    params_by_stage: Mapping[str, dict],
    names: list[str],
    ground_truth: tuple[list[LabeledImage], list[LabeledClip]],
    config: Config,
    on_stage: Callable,
) -> tuple[dict, dict[str, dict], Gallery]:
    """What was measured of the params trees `variants`, the errors after each stage, and masks to show.

    variants: {"full precision", the stages that round, and maybe "nunchaku": params tree}; names: images without masks;
    ground_truth: images and clips with masks; on_stage: as `quantize_params` takes it.
    """
    full, (*_, last), (samples, clips) = variants["full precision"], params_by_stage, ground_truth
    with on_stage("compare", f"{len(names)} images x {GRID * GRID} clicks"):
        compared, gallery = against_full(model, full, variants[last], names, config)
        results = summarize(compared) | {"kinds": ["full precision", last]}
        if "nunchaku" in variants:
            results["nunchaku"] = summarize(against_full(model, full, variants["nunchaku"], names, config)[0])
        errors = stage_errors(model, full, params_by_stage, compared, names, config)
    if samples:
        with on_stage("segment", f"{len(samples)} images with ground-truth masks"):
            scores, gallery = against_ground_truth(model, variants, last, samples, config)
        used = {Path(name).resolve() for name in names}
        held_out = used.isdisjoint(Path(sample.name).resolve() for sample in samples)
        results |= scores | {"miou_data": config.measure.images or config.quant.calib.path, "held_out": held_out}
    if clips:
        with on_stage("track", f"{len(clips)} clips with ground-truth masks"):
            both = {kind: variants[kind] for kind in results["kinds"]}
            results |= against_clips(model, both, clips, config) | {"video_data": config.measure.clips}
    return results, errors, gallery


def against_full(
    model: SAM2, full: dict, quantized: dict, names: list[str], config: Config
) -> tuple[list[Compared], Gallery]:
    """The results of `compare` per image, without their masks, and a gallery of some masks."""
    size = config.quant.calib.batch_size
    batches = ([read_image(name) for name in names[i : i + size]] for i in range(0, len(names), size))
    compared = compare(model, full, quantized, batches, GRID, config.model.dtype)
    progress = tqdm(zip(names, compared), total=len(names), unit="image", leave=False, disable=None)
    drawn, gallery, results = sample_images(len(names), config.seed), Gallery(), []
    for i, (name, result) in enumerate(progress):
        gallery = add(gallery, of_clicks(name, result), drawn.get(i))
        results.append(result._replace(masks=None))
    return results, gallery


def against_ground_truth(
    model: SAM2, variants: Mapping[str, dict], last: str, samples: list[LabeledImage], config: Config
) -> tuple[dict, Gallery]:
    """{"miou": {kind: {prompt: mIoU}}, "miou_images", "miou_objects"} of params trees, and masks to show of `last`."""
    drawn, gallery, scores = sample_images(len(samples), config.seed), Gallery(), {kind: [] for kind in variants}
    for i, sample in enumerate(tqdm(samples, unit="image", leave=False, disable=None)):
        image, masks = sample.read()
        if len(masks):
            found = {
                k: segment_objects(model, params, image, masks, config.model.dtype) for k, params in variants.items()
            }
            for kind in variants:
                scores[kind].append(object_ious(found[kind], masks))
            both = (found[kind]["1 click"] for kind in ("full precision", last))
            gallery = add(gallery, of_objects(sample.name, masks, *both), drawn.get(i))
    of_last = scores[last]
    if not of_last:
        raise UserError(f"{config.measure.images}: no image has an object to segment, give others for measure.images")
    objects = sum(len(ious["box"]) for ious in of_last)
    means = {kind: mean_ious(of) for kind, of in scores.items()}
    return {"miou": means, "miou_images": len(of_last), "miou_objects": objects}, gallery


def against_clips(model: SAM2, variants: Mapping[str, dict], clips: list[LabeledClip], config: Config) -> dict:
    """{"video": {kind: {"j", "f", "j&f"}}, in percent, "video_clips", "video_objects"} of params trees."""
    found = {
        kind: evaluate_clips(
            VideoPredictor(model, params, dtype=config.model.dtype),
            tqdm(clips, unit="clip", leave=False, disable=None),
        )
        for kind, params in variants.items()
    }
    last = next(reversed(found.values()))
    scores = {kind: {name: of[name] for name in ("j", "f", "j&f")} for kind, of in found.items()}
    return {"video": scores, "video_clips": last["clips"], "video_objects": last["objects"]}


def stage_errors(
    model: SAM2,
    full: dict,
    params_by_stage: Mapping[str, dict],
    results: list[Compared],
    names: list[str],
    config: Config,
) -> dict[str, dict]:
    """{stage: what `summarize` says after it} on the first few images; `results`: those of the last stage.

    Weights are the plain arrays they stand for, so that all stages share one compiled program; the one stage that
    would lose something by that, the rounding of inputs, is the last.
    """
    some, (*stages, last) = names[:STAGE_IMAGES], (name for name in params_by_stage if name != UNROUNDED)
    found = {
        name: summarize(against_full(model, full, materialize_params(params_by_stage[name]), some, config)[0])
        for name in stages
    }
    return found | {last: summarize(results[:STAGE_IMAGES])}


def layer_figures(full: dict, quantized: dict, stats: Mapping[str, Stats]) -> dict[str, dict]:
    """{layer: {"part", "relative_error", "output_error"}}, as data runs through them, of every quantized layer.

    relative_error: |w_hat - w| / |w|; output_error: |x w_hat - x w| / |x w| for the inputs x of calibration, which
    the weight alone makes; None where no Gram matrix of them was collected.
    """
    plain, rounded = flatten(full), flatten(materialize_params(quantized))
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
    """The name in PARTS of the part of SAM 2 that a layer belongs to."""
    return next(name for name, pattern in zip(PARTS, FLOW) if pattern.match(layer))

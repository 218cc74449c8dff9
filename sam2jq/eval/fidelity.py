"""Fidelity of a quantized model: masks against full precision and ground truth, and errors by stage and layer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import numpy as np

from sam2jq.config.run import Config
from sam2jq.data import read_image
from sam2jq.data.labeled import LabeledClip, LabeledImage
from sam2jq.data.sources import find_clips, find_samples
from sam2jq.errors import UserError
from sam2jq.eval.agreement import ImageAgreement, compare, summarize
from sam2jq.eval.everything_benchmark import compare_everything
from sam2jq.eval.gallery import (
    EverythingItem,
    Gallery,
    add_items,
    click_items,
    merge_galleries,
    object_items,
    sample_images,
)
from sam2jq.eval.image_benchmark import mean_ious, object_ious, read_sample, segment_objects
from sam2jq.eval.vos_benchmark import evaluate_clips
from sam2jq.models.precision import cast_kernels, float_dtype
from sam2jq.models.sam2 import FLOW, SAM2
from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.predictors.video import VideoPredictor
from sam2jq.ptq.pipeline import UNROUNDED, in_order
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize_params
from sam2jq.quant.stats import Stats
from sam2jq.training.distributed import all_gather_objects
from sam2jq.training.parallel_map import Replicas, parallel_map, replicate
from sam2jq.tree import fingerprint, flatten, kernels, layer_name

GRID = 4  # clicks per side of an image
STAGE_IMAGES = 4  # the number of images on which the model is compared after every stage
PARTS = (
    "trunk",
    "trunk",
    "neck",
    "prompts",
    "decoder",
    "memory encoder",
    "memory attention",
)  # of the patterns in FLOW


def find_ground_truth(
    config: Config, say: Callable[[str], None] = lambda line: None
) -> tuple[list[LabeledImage], list[LabeledClip]]:
    """(images, clips) with ground-truth masks that the config names; an empty list for those that it does not name.

    say: called with a line on images that are left out.
    """
    settings, calib = config.measure, config.quant.calib
    source, number = settings.images, settings.num_images
    if not source and calib.path.startswith("scenes:"):
        source, number = calib.path, calib.num_samples
    samples = find_samples(source, number, settings.allow_missing, say) if source else []
    return samples, find_clips(settings.clips, settings.split, settings.num_clips) if settings.clips else []


def ground_truth_id(ground_truth: tuple[list[LabeledImage], list[LabeledClip]]) -> str:
    """A fingerprint of the file names of the images and clips with ground truth, without their folders."""
    return fingerprint({}, [Path(sample.name).name for samples in ground_truth for sample in samples])


def measure(
    model: SAM2,
    variants: Mapping[str, dict],
    params_by_stage: Mapping[str, dict],
    names: list[str],
    ground_truth: tuple[list[LabeledImage], list[LabeledClip]],
    config: Config,
    on_stage: Callable,
    deployed: Mapping[str, PromptedImage] = MappingProxyType({}),
) -> tuple[dict, dict[str, dict], Gallery]:
    """(results, {stage: errors after it}, gallery of masks) of a quantized model.

    variants: {"full precision", the quantizing stages, and optionally "nunchaku": params}. params_by_stage: {stage:
    params after it}. names: images without masks. ground_truth: images and clips with masks. on_stage: as for
    `quantize_params`. deployed: {name: predictor of exported files}, for scores with known masks.

    Images and clips are split over all devices of all processes, which all call this with the same arguments.
    """
    full, (*_, last), (samples, clips) = variants["full precision"], params_by_stage, ground_truth
    with on_stage("compare", f"{len(names)} images x {GRID * GRID} clicks"):
        compared, gallery = compare_to_full_precision(model, full, variants[last], names, config)
        results = summarize(compared) | {"kinds": ["full precision", last]}
        if "nunchaku" in variants:
            results["nunchaku"] = summarize(
                compare_to_full_precision(model, full, variants["nunchaku"], names, config)[0]
            )
        errors = stage_errors(model, full, params_by_stage, compared, names, config)
    if samples:
        with on_stage("segment", f"{len(samples)} images with ground-truth masks"):
            of_params = lambda params: ImagePredictor(model, params, dtype=config.model.dtype)
            of_all = lambda variants: {name: of_params(params) for name, params in variants.items()} | dict(deployed)
            # engines of exported files run in one thread
            predictors = of_all(variants) if deployed else replicate(of_all, dict(variants))
            scores, gallery = score_images(predictors, last, samples, config)
        used = {Path(name).resolve() for name in names}
        held_out = used.isdisjoint(Path(sample.name).resolve() for sample in samples)
        results |= scores | {"miou_data": config.measure.images or config.quant.calib.path, "held_out": held_out}
    if clips:
        with on_stage("track", f"{len(clips)} clips with ground-truth masks"):
            both = {name: variants[name] for name in results["kinds"]}
            results |= score_clips(model, both, clips, config) | {"video_data": config.measure.clips}
    if number := config.measure.num_everything:
        images = [(sample.name, lambda sample=sample: sample.read()[0]) for sample in samples]
        images = (images or [(name, partial(read_image, name)) for name in names])[:number]
        with on_stage("everything", f"{len(images)} images"):
            settings = asdict(config.measure.everything) | {"dtype": config.model.dtype}
            of_params = lambda params: AutomaticMaskGenerator(model, params, **settings)
            pairs = replicate(lambda pair: tuple(map(of_params, pair)), (variants[last], full))
            place, shown = {name: i for i, (name, _) in enumerate(images)}, []

            def keep_first(name: str, after: np.ndarray, before: np.ndarray) -> None:
                if not shown or place[name] < place[shown[0].image]:
                    shown[:] = [EverythingItem(name, before, after)]

            results["everything"] = compare_everything(pairs, images, keep_first)
        gallery = gallery._replace(everything=shown[0] if shown else None)
    return results, errors, gallery


def compare_to_full_precision(
    model: SAM2, full: dict, quantized: dict, names: list[str], config: Config
) -> tuple[list[ImageAgreement], Gallery]:
    """(the result of `compare` for each image, without masks; a gallery of some masks)."""
    size, dtype = config.quant.calib.batch_size, float_dtype(config.model.dtype)
    sampled, gallery, lock = sample_images(len(names), config.seed), Gallery(), Lock()

    def compare_batch(pair: tuple[dict, dict], indices: range) -> list[ImageAgreement]:
        nonlocal gallery
        results = []
        for i, result in zip(indices, compare(model, *pair, [read_image(names[i]) for i in indices], GRID, dtype)):
            with lock:
                gallery = add_items(gallery, click_items(names[i], result), sampled.get(i))
            results.append(result._replace(masks=None))
        return results

    pairs = replicate(lambda pair: tuple(cast_kernels(params, dtype) for params in pair), (full, quantized))
    batches = [range(len(names))[i : i + size] for i in range(0, len(names), size)]
    results = list(chain.from_iterable(parallel_map(compare_batch, pairs, batches, "batch")))
    return results, merge_galleries(all_gather_objects(gallery), names)


def score_images(
    predictors: Mapping[str, PromptedImage] | Replicas, last: str, samples: list[LabeledImage], config: Config
) -> tuple[dict, Gallery]:
    """({"miou": {predictor: {prompt: mIoU}}, "miou_images", "miou_objects"}, gallery of masks of the predictor `last`).

    Raises UserError if no image has an object.
    """
    sampled, gallery, lock = sample_images(len(samples), config.seed), Gallery(), Lock()

    def score(predictors: Mapping[str, PromptedImage], index: int) -> tuple[dict[str, dict] | None, dict[str, str]]:
        nonlocal gallery
        pair, left_out = read_sample(samples[index])
        if pair is None:
            return None, left_out
        image, masks = pair
        predicted = {name: segment_objects(predictor, image, masks) for name, predictor in predictors.items()}
        both = (predicted[name]["1 click"] for name in ("full precision", last))
        items = object_items(samples[index].name, masks, *both)
        with lock:
            gallery = add_items(gallery, items, sampled.get(index))
        return {name: object_ious(predicted[name], masks) for name in predictors}, left_out

    rows = parallel_map(score, predictors, range(len(samples)))
    scores, left_out = [found for found, _ in rows if found], dict(chain(*(each.items() for _, each in rows)))
    if not scores:
        raise UserError(f"{config.measure.images}: no image has an object to segment, give others for measure.images")
    objects = sum(len(ious[last]["box"]) for ious in scores)
    means = {name: mean_ious([ious[name] for ious in scores]) for name in scores[0]}
    results = {"miou": means, "miou_images": len(scores), "miou_objects": objects}
    gallery = merge_galleries(all_gather_objects(gallery), [sample.name for sample in samples])
    return results | ({"miou_left_out": left_out} if left_out else {}), gallery


def score_clips(model: SAM2, variants: Mapping[str, dict], clips: list[LabeledClip], config: Config) -> dict:
    """{"video": {variant: {"j", "f", "j&f"}}, in percent, "video_clips", "video_objects"}.

    Also of the last variant with the memories in each of `measure.memory_bits`, as "memory in 8 bits".
    """
    runs = {name: (params, None) for name, params in variants.items()}
    last_params = next(reversed(variants.values()))
    runs |= {f"memory in {bits} bits": (last_params, bits) for bits in config.measure.memory_bits}
    make = partial(VideoPredictor, model, dtype=config.model.dtype)
    results = {
        name: evaluate_clips(replicate(partial(make, memory_bits=bits), params), clips)
        for name, (params, bits) in runs.items()
    }
    last = next(reversed(results.values()))
    scores = {name: {key: result[key] for key in ("j", "f", "j&f")} for name, result in results.items()}
    results = {"video": scores, "video_clips": last["clips"], "video_objects": last["objects"]}
    return results | ({"video_left_out": last["left_out"]} if last["left_out"] else {})


def stage_errors(
    model: SAM2,
    full: dict,
    params_by_stage: Mapping[str, dict],
    results: list[ImageAgreement],
    names: list[str],
    config: Config,
) -> dict[str, dict]:
    """{stage: `summarize` of the model after it} on the first few images; results: those of the last stage.

    Weights are dequantized, so that all stages share one compiled program. That would drop the quantization of inputs,
    but it is the last stage, whose results are given.
    """
    images, (*stages, last) = names[:STAGE_IMAGES], (name for name in params_by_stage if name != UNROUNDED)
    errors = {
        name: summarize(
            compare_to_full_precision(model, full, materialize_params(params_by_stage[name]), images, config)[0]
        )
        for name in stages
    }
    return errors | {last: summarize(results[:STAGE_IMAGES])}


def layer_errors(full: dict, quantized: dict, stats: Mapping[str, Stats]) -> dict[str, dict]:
    """{layer: {"part", "relative_error", "output_error"}} of every quantized layer, in the order of the forward pass.

    relative_error: |w_hat - w| / |w|. output_error: |x w_hat - x w| / |x w| for the calibration inputs x, not
    quantized; None if no Gram matrix of them was collected.
    """
    plain, after = flatten(full), flatten(materialize_params(quantized))
    paths = {layer_name(p): p for p, leaf in kernels(flatten(quantized)).items() if is_dataclass(leaf)}
    order = [layer for group in in_order(paths) for layer in group]
    return {layer: kernel_errors(after[paths[layer]], plain[paths[layer]], stats.get(layer)) | {"part": part(layer)}
            for layer in order}  # fmt: skip


def kernel_errors(quantized, plain, stats: Stats | None) -> dict:
    """{"relative_error", "output_error"} of one kernel; quantized, plain: [*reduce, out]."""
    error = None
    if stats is not None and stats.gram is not None:
        gram = np.asarray(stats.gram)
        energy = lambda w: float(np.vdot(w, gram @ w))
        w, w_hat = (np.asarray(x).reshape(len(gram), -1) for x in (plain, quantized))
        error = (max(energy(w_hat - w), 0) / energy(w)) ** 0.5 if energy(w) > 0 else None
    return {"relative_error": relative_error(quantized, plain), "output_error": error}


def part(layer: str) -> str:
    """The part of SAM 2 that a layer belongs to, one of PARTS."""
    return next(name for name, pattern in zip(PARTS, FLOW) if pattern.match(layer))

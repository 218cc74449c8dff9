"""`sam2jq evaluate`: mIoU or AP of prompted objects, J&F of tracked ones, or all masks against a reference."""

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from sam2jq.cli.arguments import add_config
from sam2jq.cli.loading import load_image_predictor, load_mask_generators, load_video_predictor
from sam2jq.cli.processes import joined_processes, shared_job_folder
from sam2jq.cli.run_folder import job_path, stage
from sam2jq.config import loader
from sam2jq.config.run import EvaluateConfig
from sam2jq.data.detections import find_detections
from sam2jq.data.images import read_image
from sam2jq.data.masks import write_labels
from sam2jq.data.sav import write_mask
from sam2jq.data.sources import find_clips, find_images, find_samples
from sam2jq.eval.detection_benchmark import evaluate_detections
from sam2jq.eval.everything_benchmark import compare_everything
from sam2jq.eval.image_benchmark import evaluate_images
from sam2jq.eval.vos_benchmark import evaluate_clips
from sam2jq.report import text
from sam2jq.training.parallel_map import replicate

SCHEMA = EvaluateConfig
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes metrics.json, and the masks of videos, to <output.root>/<job>/."""
    config = loader.load(args.config, flags, EvaluateConfig)
    final = job_path(config.output, args.config, f"evaluate_{config.task}")
    with (
        joined_processes(config.distributed, config.model.device),
        shared_job_folder(final, loader.dump(config)) as folder,
    ):
        results = evaluate(config, folder)
        if jax.process_index() == 0:
            (folder / "metrics.json").write_text(json.dumps(results, indent=1))
        log.info("\n%s", text.scores(results))
    log.info("\nwritten     %s", final)


def evaluate(config: EvaluateConfig, folder: Path) -> dict:
    """The scores of the checkpoint on the data that `config` names; masks of videos are written into `folder`.

    The data is split over all devices of all processes, and each process returns all scores.
    """
    unscored = {}
    with stage("data", config.data):
        match config.task:
            case "image" if config.boxes:
                detections = find_detections(config.data, config.boxes, config.allow_missing)
                samples = detections.images[: config.num_samples]
            case "image":
                say = partial(log.warning, "note        %s")
                samples = find_samples(config.data, config.num_samples, config.allow_missing, say)
            case "everything":
                names = find_images(config.data, config.num_samples, seed=0)
                samples = [(name, partial(read_image, name)) for name in names]
            case _:
                samples = find_clips(config.data, config.split, config.num_samples)
                unscored = {f"{clip.name}/{obj}": why for clip in samples for obj, why in clip.unscored.items()}
    log_left_out(unscored)
    match config.task:
        case "image" if config.boxes:
            score = partial(evaluate_detections, load_image_predictor(config, replicate)[0], detections=detections)
        case "image":
            score = partial(evaluate_images, load_image_predictor(config, replicate)[0])
        case "everything":
            score = partial(compare_everything, load_mask_generators(config))
        case _:
            write = mask_writer(folder) if config.masks else None
            score = partial(evaluate_clips, load_video_predictor(config, replicate)[0], write=write)
    with stage("evaluate", f"{len(samples)} {'clips' if config.task == 'vos' else 'images'}"):
        results = score(samples)
    log_left_out({name: why for name, why in results["left_out"].items() if name not in unscored})
    return results


def log_left_out(names: dict[str, str]) -> None:
    """Logs a line with the reason for each name."""
    for name, why in names.items():
        log.warning("left out    %s", why if name in why else f"{name}: {why}")


def mask_writer(folder: Path) -> Callable:
    """A function (clip, object, frame name, mask) that writes masks/<clip>/<object>/<frame>.png below `folder`, as the
    SA-V evaluator reads them, or for label images masks/<clip>/<frame>.png, as the DAVIS evaluator reads them."""

    def write(clip: str, name: str, frame: str, mask) -> None:
        write_file = write_mask if name else write_labels
        write_file(folder / "masks" / clip.replace(":", "_") / name / f"{frame}.png", mask)

    return write

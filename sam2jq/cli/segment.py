"""`sam2jq segment`: masks of one image from clicks or boxes, or of everything in it."""

import argparse
import logging
from dataclasses import asdict

import numpy as np

from sam2jq.cli.loading import load_image_predictor, load_model, refuse_engine
from sam2jq.cli.mask_files import add_mask_files, check_mask_files, labels_of, mask_facts, write_image_masks
from sam2jq.cli.prompts import Prompt, add_prompts, check_inside, has_prompt_flags, prompts_of
from sam2jq.cli.run_folder import stage
from sam2jq.config import loader
from sam2jq.config.run import SegmentConfig
from sam2jq.data import read_image
from sam2jq.data.images import is_turned
from sam2jq.errors import UserError
from sam2jq.files import atomic_write, check_target
from sam2jq.predictors.automatic_masks import AutomaticMaskGenerator
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.report import figures

SCHEMA = SegmentConfig
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="an image file, or scenes:<seed>/0000 for a synthetic one")
    add_prompts(parser)
    parser.add_argument("--mask", help=argparse.SUPPRESS)  # of `track`
    parser.add_argument("--multimask", action="store_true", help="three masks for an ambiguous prompt")
    parser.add_argument("--everything", action="store_true", help="all masks, from a grid of clicks")
    parser.add_argument("--out", default="mask.png", help="the image with its masks to write (mask.png)")
    add_mask_files(parser, palette="FILE")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes the image with the masks drawn on it to `args.out`, and the masks to the files that are named."""
    out = check_target(args.out, args.image, args.prompts)
    if out.suffix.lower() not in figures.FORMATS:
        raise UserError(f"--out {out}: give a name that ends in one of {' '.join(figures.FORMATS)}")
    check_mask_files(args, False, args.image, args.prompts)
    prompts = [] if is_everything(args) else image_prompts(args)
    image = read_image(args.image)
    if is_turned(args.image):
        log.warning("note        its EXIF orientation is not applied, as in sam2: prompts are in pixels as stored")
    check_inside(prompts, image.shape[:2])
    config = loader.load(None, flags, SegmentConfig)
    if prompts:
        predictor, random = load_image_predictor(config)
        records = segment_prompted(predictor, image, prompts, multimask=args.multimask)
    else:
        refuse_engine(config)
        model, checkpoint = load_model(config.model, config.cache)
        params, random = materialize_weights(checkpoint.params), checkpoint.random
        generator = AutomaticMaskGenerator(model, params, **asdict(config.everything), dtype=config.model.dtype)
        records = segment_everything(generator, image)
    masks = np.array([record["segmentation"] for record in records]).reshape(-1, *image.shape[:2])
    areas = np.maximum(masks.sum((1, 2), keepdims=True), 1)
    labels = labels_of([record["id"] for record in records], masks / areas)  # the smaller mask is in front
    picture = figures.overlay(image, masks)
    for prompt in prompts:
        figures.draw_prompts(picture, prompt.points, prompt.labels, prompt.box)
    if random:
        figures.write(picture, "random weights")
    write_image_masks(args, args.image, records, labels)
    with atomic_write(out) as temporary:
        picture.save(temporary, format=figures.FORMATS[out.suffix.lower()])
    if prompts:
        for record in records:
            share, iou = 100 * record["area"] / labels.size, record["predicted_iou"]
            log.info("mask        %.1f %% of the image, estimated IoU %.3f", share, iou)
    log.info("written     %s", out)


def is_everything(args: argparse.Namespace) -> bool:
    """Whether all masks are asked for. Raises UserError if there are prompts, too."""
    if args.everything and (has_prompt_flags(args) or args.prompts is not None or args.multimask):
        raise UserError("--everything: it takes no prompt: leave --points, --labels, --box, --prompts and --multimask "
                        "out")  # fmt: skip
    return args.everything


def image_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of a command that segments an image. Raises UserError for masks, and for --multimask of several."""
    if args.mask is not None:
        raise UserError("--mask: a mask prompts an object of a clip, for sam2jq track; give points or a box")
    prompts = prompts_of(args)
    if masked := [prompt for prompt in prompts if prompt.mask is not None]:
        raise UserError(f"{masked[0].source}a mask prompts an object of a clip; give points or a box")
    if args.multimask and len(prompts) > 1:
        raise UserError(f"--multimask: three masks are of one object, but there are {len(prompts)}")
    return prompts


def segment_prompted(predictor: PromptedImage, image: np.ndarray, prompts: list[Prompt], *, multimask: bool):
    """A record of each mask: id, segmentation bool [H, W], area, bbox and predicted_iou."""
    predictor.set_image(image)
    records = []
    for prompt in prompts:
        clicks = prompt.clicks("point_coords", "point_labels")
        masks, ious, _ = predictor.predict(**clicks, box=prompt.box, multimask_output=multimask)
        for i, (mask, iou) in enumerate(zip(masks > 0, ious.tolist())):
            records.append({"id": prompt.object + i, "segmentation": mask} | mask_facts(mask) | {"predicted_iou": iou})
    return records


def segment_everything(generator: AutomaticMaskGenerator, image: np.ndarray) -> list[dict]:
    """The records of everything in an image, numbered from 1 on as "id"."""
    with stage("everything", f"{sum(map(len, generator.point_grids))} points"):
        records = [{"id": i} | record for i, record in enumerate(generator.generate(image), 1)]
    if not records:
        log.info("masks       none: lower --everything.pred_iou_thresh or --everything.stability_score_thresh")
    else:
        log.info("masks       %d", len(records))
    return records

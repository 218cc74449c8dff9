"""`sam2jq segment`: masks of one image from clicks or a box."""

import argparse
import logging

from sam2jq.cli.arguments import add_prompts, check_inside, prompt_labels
from sam2jq.cli.loading import load_image_predictor
from sam2jq.config import loader
from sam2jq.config.run import SegmentConfig
from sam2jq.data import read_image
from sam2jq.data.images import is_turned
from sam2jq.errors import UserError
from sam2jq.files import atomic_write, check_target
from sam2jq.report import figures

SCHEMA = SegmentConfig
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}  # of PIL, by ending
FORMATS |= dict.fromkeys((".tif", ".tiff"), "TIFF")
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="an image file, or scenes:<seed>/0000 for a synthetic one")
    add_prompts(parser)
    parser.add_argument("--multimask", action="store_true", help="three masks for an ambiguous prompt")
    parser.add_argument("--out", default="mask.png", help="the image with its masks to write (mask.png)")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes the image with the predicted masks drawn on it to `args.out`."""
    labels, out = prompt_labels(args), check_target(args.out, args.image)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: give a name that ends in one of {' '.join(FORMATS)}")
    image = read_image(args.image)
    if is_turned(args.image):
        log.warning("note        its EXIF orientation is not applied, as in sam2: prompts are in pixels as stored")
    check_inside(args, image.shape[:2])
    config = loader.load(None, flags, SegmentConfig)
    predictor, random = load_image_predictor(config)
    predictor.set_image(image)
    points = {"point_coords": args.points, "point_labels": labels} if args.points else {}
    masks, scores, _ = predictor.predict(**points, box=args.box, multimask_output=args.multimask)
    picture = figures.overlay(image, masks > 0)
    figures.draw_prompts(picture, args.points, labels, args.box)
    if random:
        figures.write(picture, "random weights")
    with atomic_write(out) as temporary:
        picture.save(temporary, format=FORMATS[out.suffix.lower()])
    for mask, score in zip(masks, scores):
        log.info("mask        %.1f %% of the image, estimated IoU %.3f", 100 * mask.mean(), score)
    log.info("written     %s", out)

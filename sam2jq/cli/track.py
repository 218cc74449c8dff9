"""`sam2jq track`: one object through a video, from clicks, a box or a mask on one frame."""

import argparse
import logging
from pathlib import Path

from PIL import Image

from sam2jq.cli.arguments import add_prompts, check_inside, prompt_labels
from sam2jq.cli.loading import load_video_predictor
from sam2jq.cli.run_folder import stage
from sam2jq.config import loader
from sam2jq.config.run import SegmentConfig
from sam2jq.data.sav import read_mask
from sam2jq.data.sources import scene_video
from sam2jq.data.video import open_video
from sam2jq.errors import UserError
from sam2jq.files import atomic_write, check_target
from sam2jq.report import figures

SCHEMA = SegmentConfig
GIF_FRAME_MS = 42  # milliseconds: 24 frames a second, as SA-V
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clip", help="a video, a folder of frames, or scenes:<seed>/0000 for a synthetic one")
    add_prompts(parser)
    parser.add_argument("--mask", metavar="FILE", help="a PNG in place of clicks and box, not 0 where the object is")
    parser.add_argument("--frame", type=int, default=0, help="index of the frame with the prompt (0)")
    parser.add_argument("--out", default="tracked.gif", help=".gif, or .png for a strip of frames (tracked.gif)")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes the frames from the prompt on, with the object's mask on each, as a GIF or a strip to `args.out`."""
    if args.mask is not None and (args.points or args.labels or args.box):
        raise UserError("--mask: a mask is the whole prompt: leave --points, --labels and --box out")
    labels, out = [] if args.mask is not None else prompt_labels(args), check_target(args.out, args.clip, args.mask)
    if out.suffix.lower() not in (".gif", ".png"):
        raise UserError(f"--out {out}: give a name that ends in .gif or, for a strip of frames, in .png")
    video = scene_video(args.clip) if args.clip.startswith("scenes:") else open_video(args.clip)
    mask = read_mask(args.mask, video.size) if args.mask is not None else None
    check_inside(args, video.size)
    config = loader.load(None, flags, SegmentConfig)
    predictor, random = load_video_predictor(config)
    state = predictor.init_state(video)
    if mask is not None:
        predictor.add_new_mask(state, args.frame, 1, mask)
    else:
        points = {"points": args.points, "labels": labels} if args.points else {}
        predictor.add_new_points_or_box(state, args.frame, 1, **points, box=args.box)
    pictures = []
    with stage("track", f"{len(video)} frames of {args.clip}"):
        for frame, _, logits in predictor.propagate_in_video(state):
            pictures.append(figures.overlay(video[frame], logits[:, 0] > 0))
            if frame == args.frame:
                figures.draw_prompts(pictures[-1], args.points, labels, args.box)
            if random:
                figures.write(pictures[-1], "random weights")
    save_pictures(pictures, out)
    log.info("written     %s", args.out)


def save_pictures(pictures: list[Image.Image], out: Path) -> None:
    """Writes an animated GIF or, to a name that ends in .png, a strip of some of the pictures."""
    with atomic_write(out) as temporary:
        if out.suffix.lower() == ".gif":
            animation = {"save_all": True, "append_images": pictures[1:], "duration": GIF_FRAME_MS, "loop": 0}
            pictures[0].save(temporary, format="GIF", **animation)
        else:
            figures.strip(pictures).save(temporary, format="PNG")

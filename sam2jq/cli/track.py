"""`sam2jq track`: objects through a video, from clicks, boxes or masks on some of its frames."""

import argparse
import io
import logging
from collections.abc import Iterable, Iterator

import numpy as np

from sam2jq.cli.clip_files import check_clip_file, clip_file, frame_rate
from sam2jq.cli.loading import load_video_predictor
from sam2jq.cli.mask_files import FrameMasks, add_mask_files, check_mask_files, clip_masks, labels_of
from sam2jq.cli.prompts import Prompt, add_prompts, check_inside, prompts_of
from sam2jq.cli.run_folder import stage
from sam2jq.config import loader
from sam2jq.config.run import TrackConfig
from sam2jq.data.sav import read_mask
from sam2jq.data.sources import scene_video
from sam2jq.data.video import Video, open_video
from sam2jq.errors import UserError
from sam2jq.files import ScratchFile
from sam2jq.predictors.prompted_video import PromptedVideo
from sam2jq.predictors.video_state import VideoState
from sam2jq.report import figures

SCHEMA = TrackConfig
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clip", help="a video, a folder of frames, or scenes:<seed>/0000 for a synthetic one")
    add_prompts(parser)
    parser.add_argument("--mask", metavar="FILE", help="a PNG in place of clicks and box, not 0 where the object is")
    parser.add_argument("--frame", type=int, default=0, help="index of the frame with the prompt (0)")
    parser.add_argument("--reverse", action="store_true", help="track from the last prompt back to frame 0")
    parser.add_argument("--out", default="tracked.gif", help=".mp4, .gif, or .png for a strip of frames (tracked.gif)")
    add_mask_files(parser, palette="DIR")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes the tracked frames, with the objects' masks on each, to `args.out`, and the masks to the named files."""
    prompts = prompts_of(args, args.frame, args.mask)
    inputs = [args.clip, args.prompts, *(prompt.mask for prompt in prompts)]
    out = check_clip_file(args.out, *inputs)
    check_mask_files(args, True, *inputs)
    video = scene_video(args.clip) if args.clip.startswith("scenes:") else open_video(args.clip)
    check_inside(prompts, video.size, len(video))
    if args.reverse and max(prompt.frame for prompt in prompts) == 0:
        raise UserError("--reverse: the last prompt is on frame 0, before which there is no frame")
    masks = [read_mask(prompt.mask, video.size) if prompt.mask else None for prompt in prompts]
    config = loader.load(None, flags, TrackConfig)
    predictor, random = load_video_predictor(config)
    state = predictor.init_state(video, keep_outputs=False)
    for prompt, mask in zip(prompts, masks):
        add_prompt(predictor, state, prompt, mask)
    frames = [prompt.frame for prompt in prompts]
    start = max(frames) if args.reverse else min(frames)
    with (
        stage("track", f"{len(video)} frames of {args.clip}"),
        clip_file(out, frame_rate(args.clip), start + 1 if args.reverse else len(video) - start) as add_picture,
        clip_masks(args, args.clip, video.names, state.obj_ids) as add_masks,
    ):
        for frame, tracked in track(predictor, state, start, args.reverse):
            picture = figures.overlay(video[frame], tracked.masks)
            draw_frame_prompts(picture, [prompt for prompt in prompts if prompt.frame == frame])
            if random:
                figures.write(picture, "random weights")
            add_picture(picture)
            add_masks(tracked)
    log.info("written     %s", args.out)


def add_prompt(predictor: PromptedVideo, state: VideoState, prompt: Prompt, mask: np.ndarray | None) -> None:
    """Prompts an object in the clip; mask: of the prompt's file, if it has one."""
    if mask is not None:
        predictor.add_new_mask(state, prompt.frame, prompt.object, mask)
    else:
        predictor.add_new_points_or_box(state, prompt.frame, prompt.object, **prompt.clicks(), box=prompt.box)


def draw_frame_prompts(picture, prompts: list[Prompt]) -> None:
    """Draws the prompts of one frame onto its picture."""
    for prompt in prompts:
        figures.draw_prompts(picture, prompt.points, prompt.labels, prompt.box)


def track(predictor: PromptedVideo, state: VideoState, start: int, reverse: bool) -> Iterator[tuple[int, FrameMasks]]:
    """Yields the number and the masks of each frame tracked from `start` on, in the order of the clip.

    In reverse they wait in a temporary file until the first one is found.
    """
    found = (
        (frame, frame_masks(state.video, frame, objects, logits[:, 0]))
        for frame, objects, logits in predictor.propagate_in_video(state, start, reverse=reverse)
    )
    return from_the_last(found) if reverse else found


def from_the_last(found: Iterable[tuple[int, FrameMasks]]) -> Iterator[tuple[int, FrameMasks]]:
    """`found` in reverse order, through a temporary file."""
    file, end = ScratchFile("masks"), 0
    places = []
    for frame, (name, masks, labels) in found:
        content = io.BytesIO()
        np.savez_compressed(content, masks=masks, labels=labels)
        file.write(end, content.getvalue())
        places.append((frame, name, end, content.tell()))
        end += content.tell()
    for frame, name, place, size in reversed(places):
        arrays = np.load(io.BytesIO(file.read(place, size)))
        yield frame, FrameMasks(name, arrays["masks"], arrays["labels"])


def frame_masks(video: Video, frame: int, objects: list[int], logits: np.ndarray) -> FrameMasks:
    """The masks of logits [M, H, W] in a frame; each pixel is labeled with the object of the highest logit."""
    return FrameMasks(video.names[frame], logits > 0, labels_of(objects, logits).astype(np.int16))

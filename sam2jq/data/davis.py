"""Video object segmentation data in the layouts of DAVIS, MOSE and YouTube-VOS: one label image for each frame.

ROOT/JPEGImages/480p/<video>/00000.jpg     ROOT/Annotations/480p/<video>/00000.png        DAVIS, also Full-Resolution
ROOT/<split>/JPEGImages/<video>/00000.jpg  ROOT/<split>/Annotations/<video>/00000.png     MOSE, YouTube-VOS
ROOT/ImageSets/2017/<split>.txt            the videos of a split of DAVIS, one per line; also ImageSets/<split>.txt
ROOT/ImageSets/480p/<split>.txt            the same of DAVIS 2016: a frame and its label image per line
ROOT/<split>/meta.json                     of YouTube-VOS and MOSE: the frames of each object; optional
ROOT/<split>/<split>_meta.json             of LVOS: the first and the last frame of each object
ROOT/<split>/unseen_videos.txt             of LVOS' evaluator: the videos of categories that are not in its training set
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from sam2jq.data.folders import clip_folders, subfolders
from sam2jq.data.listed import check_file_name, read_json, read_lines, read_names
from sam2jq.data.masks import VOID, check_sharp, label_colors, read_labels
from sam2jq.data.sav import find_masks
from sam2jq.data.video import find_frames
from sam2jq.errors import UserError

FRAMES, MASKS, META = "JPEGImages", "Annotations", "meta.json"
UNSEEN, LVOS_STRIDE = "unseen_videos.txt", 5  # frames from one label image of LVOS to the next
RESOLUTIONS = ("480p", "1080p", "Full-Resolution")  # folders inside of FRAMES and MASKS, of DAVIS
DEFAULT_SPLITS = ("val", "valid")


class LabeledVideo(NamedTuple):
    """frames: folder of the clip; labels: {index into find_frames(frames): label image}, sorted.

    listed: {object: the frames in which meta.json says that it is}, sorted; None if it does not say it. group: of LVOS
    "seen" or "unseen"; an object is scored in its listed frames then, else from its first one on.
    """

    name: str
    frames: str
    labels: dict[int, str]
    listed: dict[str, list[int]] | None = None
    group: str = ""


def is_davis(root: Path) -> bool:
    """Whether a folder, or a folder in it, has frames and label images."""
    return root.is_dir() and any(has_parts(folder) for folder in (root, *subfolders(root)))


def has_parts(folder: Path) -> bool:
    return (folder / FRAMES).is_dir() and (folder / MASKS).is_dir()


def davis_frame_folders(root: Path) -> list[Path]:
    """The folders that hold the folders of frames of the root's videos, of one resolution and of all splits."""
    parts = [folder / FRAMES for folder in (root, *subfolders(root)) if has_parts(folder)]
    return [part / resolution_of(part) for part in parts]


def resolution_of(part: Path) -> str:
    """The folder of one resolution in DAVIS's JPEGImages or Annotations; "" if it has none."""
    return next((name for name in RESOLUTIONS if (part / name).is_dir()), "")


def label_videos(root: str, split: str) -> list[LabeledVideo]:
    """The videos of a split; of val or valid if it is "", or of the only one. Without splits, all videos.

    Raises FileNotFoundError or UserError if there is no such split, or a video lacks frames or label images.
    """
    folder, names = find_split(Path(root), split)
    resolution = resolution_of(folder / FRAMES)
    frames, masks = (folder / part / resolution for part in (FRAMES, MASKS))
    if names is None:
        names = sorted({path.name for part in (frames, masks) if part.is_dir() for path in clip_folders(part)})
    missing = [path for name in names for path in (frames / name, masks / name) if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such folder ({len(missing)} are missing); put it there")
    if not names:
        raise UserError(f"{frames}: holds no video; each needs a folder of frames")
    if lvos := next(folder.glob("*_meta.json"), None):
        meta, unseen = read_lvos_meta(lvos), unseen_videos(folder, root)
        names = [name for name in names if name in meta]
    else:
        meta, unseen = read_meta(folder / META), None
    group = lambda name: "" if unseen is None else "unseen" if name in unseen else "seen"
    videos = [label_video(name, frames / name, masks / name, meta.get(name)) for name in names]
    return [video._replace(group=group(video.name)) for video in videos]


def label_video(name: str, frames: Path, masks: Path, meta: dict[str, list[str]] | None = None) -> LabeledVideo:
    """A video and its label images; meta: {object: names of its frames}, of which some may not be there."""
    index = {Path(frame).stem: index for index, frame in enumerate(find_frames(str(frames)))}
    known = lambda names: sorted(index[name] for name in names if name in index)
    listed = None if meta is None else {obj: known(names) for obj, names in meta.items()}
    return LabeledVideo(name, str(frames), find_masks(masks, index), listed)


def read_meta(path: Path) -> dict[str, dict[str, list[str]]]:
    """{video: {object: names of its frames}} of a meta.json; {} without the file, or if it holds something else."""
    match read_json(path) if path.is_file() else None:
        case {"videos": dict(videos)}:
            return {name: frames for name, video in videos.items() if (frames := frames_by_object(video)) is not None}
    return {}


def read_lvos_meta(path: Path) -> dict[str, dict[str, list[str]]]:
    """{video: {object: names of its annotated frames}} of LVOS' json: every 5th from "start", below "end".

    Raises UserError if the file has another form.
    """
    frames = lambda span: [f"{i:08d}" for i in range(int(span["start"]), int(span["end"]), LVOS_STRIDE)]
    try:
        return {
            name: {obj: frames(each["frame_range"]) for obj, each in video["objects"].items()}
            for name, video in read_json(path)["videos"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not in LVOS' format, videos with the frame_range of each object ({error!r})"
        ) from error


def unseen_videos(folder: Path, root: str) -> set[str]:
    """The videos in LVOS' list of unseen categories, in the folder of the split or in `root`."""
    found = next((path for place in (folder, Path(root)) if (path := place / UNSEEN).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder / UNSEEN}: no such file; the scores of LVOS are means over seen and unseen categories: put "
            "the file of that name of LVOS' evaluator there"
        )
    return set(read_names(found))


def frames_by_object(video) -> dict[str, list[str]] | None:
    """{object: names of its frames} of an entry of meta.json; None if it does not list them.

    The test set of YouTube-VOS has a list for each object, the others have a dictionary with that list as "frames".
    """
    objects = video.get("objects") if isinstance(video, dict) else None
    if not isinstance(objects, dict):
        return None
    frames = {name: each.get("frames") if isinstance(each, dict) else each for name, each in objects.items()}
    listed = lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names)
    return frames if all(map(listed, frames.values())) else None


def find_split(root: Path, split: str) -> tuple[Path, list[str] | None]:
    """The folder with the frames of a split, and the videos in its list; None without a list."""
    lists = find_lists(root)
    folders = {path.name: path for path in subfolders(root) if has_parts(path)}
    if not has_parts(root) and len(folders) == 1 and find_lists(only := next(iter(folders.values()))):
        return find_split(only, split)  # an archive that was unpacked into a folder of its own
    known = sorted({*lists, *folders})
    wanted = [split] if split else [*DEFAULT_SPLITS, *(known if len(known) == 1 else [])]
    for name in wanted:
        if name in folders:
            return folders[name], None
        if name in lists:
            return root, listed_videos(lists[name])
    if has_parts(root) and not split:
        return root, None
    raise FileNotFoundError(f"{root}: has no split {split or 'val'}; give split, one of {', '.join(known) or 'none'}")


def find_lists(root: Path) -> dict[str, Path]:
    """{split: its list of videos}; of several years the last one. Lists of frames count only without another list."""
    paths = [*root.glob("ImageSets/[!.]*.txt"), *root.glob("ImageSets/*/[!.]*.txt")]
    return {path.stem: path for path in sorted(paths, key=lambda p: (p.parent.name not in RESOLUTIONS, p.parent.name))}


def listed_videos(path: Path) -> list[str]:
    """The videos in a list: their names or, in DAVIS 2016, lines "/JPEGImages/480p/bear/00000.jpg /Annotations/..."."""
    if path.parent.name not in RESOLUTIONS:
        return read_names(path)
    frames = [line.split()[0] for line in read_lines(path) if line.strip()]
    return list(dict.fromkeys(check_file_name(PurePosixPath(frame).parent.name, path) for frame in frames))


def label_masks(
    video: LabeledVideo, size: tuple[int, int], bad: Callable | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """{object: {frame: bool [H, W]}} of a video's label images, each object from the first frame on that shows it.

    Objects are named after their labels. 255 marks pixels of no object, unless it is the only label of the clip. An
    object that meta.json lists starts in its first listed frame.
    bad: called with each object that has no ground truth, see `fault_of`, and the error; it is left out.
    Raises that error without `bad`, and UserError if each object is shown only once.
    """
    images = {frame: read_labels(path, size) for frame, path in video.labels.items()}
    for frame, image in images.items():
        check_sharp(video.labels[frame], image)
    labels = {frame: set(np.unique(image).tolist()) for frame, image in images.items()}
    check_colors({video.labels[frame]: shown for frame, shown in labels.items()})
    found = set().union(*labels.values()) - {0}
    objects = sorted(found - {VOID} or found)
    shown = {str(label): [frame for frame in images if label in labels[frame]] for label in objects}
    if shown and len(images) > 1 and all(len(frames) == 1 for frames in shown.values()):
        raise UserError(
            f"{video.name}: no two of its label images show the same object: they mark first appearances and are no "
            "ground truth; give label images of all objects, or leave the clip out"
        )
    masks = {}
    for obj in {**shown, **(video.listed or {})}:
        start = min((video.listed or {}).get(obj, []), default=0)
        visible = [frame for frame in shown.get(obj, []) if frame >= start]
        if fault := fault_of(video, obj, visible):
            error = UserError(f"{video.name}/{obj}: {fault}")
            if bad is None:
                raise error
            bad(obj, error)
        else:
            scored = video.listed[obj] if video.group else [frame for frame in images if frame >= visible[0]]
            masks[obj] = {frame: images[frame] == int(obj) for frame in scored if frame in images}
    return masks


def check_colors(labels: dict[str, set[int]]) -> None:
    """Raises UserError if a label has two colors in the palettes of a clip; labels: {label image: its labels}.

    A program that chose a palette for each image numbered the objects of each image anew.
    """
    known: dict[int, tuple[tuple[int, ...], str]] = {}
    for path, shown in labels.items():
        for label, color in label_colors(path).items():
            first, other = known.setdefault(label, (color, path)) if label in shown else (color, path)
            if color != first:
                raise UserError(
                    f"{path}: label {label} has the color {color}, but {first} in {other}: the labels of one of them "
                    "are of other objects, or its palette is; save the label images of a clip with one palette"
                )


def fault_of(video: LabeledVideo, obj: str, visible: list[int]) -> str:
    """Why an object of a video with meta.json has no ground truth, "" if it has; visible: the frames that show it."""
    if video.listed is None:
        return ""
    if obj not in video.listed:
        return f"the label images show it, but {META} does not list it; add it, or remove the label"
    if not visible:
        return f"{META} lists it, but no label image shows it from its first frame on; give its label images"
    later = [frame for frame in video.listed[obj] if frame > visible[0] and frame in video.labels]
    if len(visible) == 1 and later:
        return (
            f"one label image shows it, but {META} lists it in {len(later)} more of them: it marks the first "
            "appearance and is no ground truth of later frames"
        )
    return ""

"""A check of metrics.json: every part that pages and tables read has the type that a run writes.

A form describes a JSON value: a type; a dict of forms by key, "?" after a key if it may be absent; [form] for a list
of such values; (form, form) for a list of exactly these; Each(form) for a dict of such values, whatever its keys;
OrNull(form); or a pattern that a text matches.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sam2jq.quant.field_types import describe, has_type


@dataclass(frozen=True)
class Each:
    """A dict whose values have a form."""

    form: object


@dataclass(frozen=True)
class OrNull:
    """A value of a form, or null."""

    form: object


NUMBER, POINTS = float | None, [(float, float)]
SCORES = Each({"box": float, "1 click": float, "3 clicks": float})
LAYER = {
    "name": str,
    "part": str,
    "dtype": str,
    "bits": int,
    "group": str,
    "weights": int,
    "bytes": int,
    "rank": int,
    "around": list[str],
    "inputs": OrNull(re.compile(".*[0-9]")),
    "relative_error": float,
    "output_error": NUMBER,
    "sqnr": NUMBER,
    "alpha": float | str | None,
    "beta": float | str | None,
}
FEATURES = {"stride4": float, "stride8": float, "stride16": float}
STAGE = {"name": str, "what": str, "seconds": float, "feature_error?": FEATURES, "mask_iou?": float}
WEIGHTS = {"dtype": str, "group_shapes": ((int, int),), "kernel_gptq": dict | None, "low_rank": OrNull({"rank": int})}
DECISION = {"epoch": int, "layer": str, "from": int, "to": int, "impact": NUMBER, "accepted": bool, "reason": str}
EVERYTHING = {"recall": float, "miou": float} | dict.fromkeys(
    ("count_mismatch", "masks", "reference_masks", "images"), int
)
EVERYTHING |= {"shown?": {"image": str, "files": {"before": str, "after": str}}}
METRICS = {
    "model": {"name": str, "version": str, "checkpoint": str, "image_size": int},
    "checkpoint": str,
    "images_id": str,
    "truth_id": str,
    "command": str,
    "asked": dict,
    "versions": dict,
    "random_weights": bool,
    "stage_images": int,
    "unquantized": list[str],
    "effective_bits": NUMBER,
    "bytes_float32": int,
    "bytes_quantized": int,
    "bytes_unquantized": int,
    "config": {"seed": int, "quant": {"wgts": WEIGHTS}},
    "layers": [LAYER],
    "stages": [STAGE],
    "results": {
        "kinds": (str, str),
        "images": int,
        "prompts_per_image": int,
        "held_out?": bool,
        "mask_iou?": float,
        "mask_iou_worst_image?": float,
        "nunchaku?": {"mask_iou": float},
        "miou?": SCORES,
        "miou_images?": int,
        "miou_objects?": int,
        "miou_data?": str,
        "everything?": EVERYTHING,
        "cost?": Each({"seconds": float, "peak_gb": float, "megabytes?": float}),
        "video?": Each({"j&f": float}),
        "video_clips?": int,
        "video_objects?": int,
        "video_data?": str,
    },
    "history?": {
        "loss?": POINTS,
        "val_loss?": POINTS,
        "bits?": {"steps": list[float], "layers": dict[str, list[float]]},
        "decisions?": [DECISION],
    },
}
TOGETHER = {  # the results that are read where the first one is there
    "miou": ("miou_images", "miou_objects", "miou_data", "held_out"),
    "video": ("video_clips", "video_objects", "video_data"),
}


def problems(value: object, form: object, path: str = "") -> Iterator[str]:
    """One text for each part of a JSON value that has another form, such as "layers[3].bits is 'x', not a number"."""
    match form:
        case OrNull(inner):
            yield from problems(value, inner, path) if value is not None else ()
        case Each(inner) if isinstance(value, dict):
            yield from (text for key, part in value.items() for text in problems(part, inner, f"{path}.{key}"))
        case [inner] if isinstance(form, list) and isinstance(value, list):
            yield from (text for i, part in enumerate(value) for text in problems(part, inner, f"{path}[{i}]"))
        case tuple() if isinstance(value, list) and len(value) == len(form):
            yield from (text for i, pair in enumerate(zip(value, form)) for text in problems(*pair, f"{path}[{i}]"))
        case dict() if isinstance(value, dict):
            yield from key_problems(value, form, path)
        case re.Pattern() if isinstance(value, str) and form.fullmatch(value):
            return
        case Each() | list() | tuple() | dict() | re.Pattern():
            yield f"{path} is {value!r:.40}, not what a run writes"
        case _ if not has_type(value, form):
            yield f"{path} is {value!r:.40}, not {describe(form)}"


def key_problems(value: dict, form: dict, path: str) -> Iterator[str]:
    """`problems` of a dict with a form for each key."""
    for key, inner in form.items():
        name = key.removesuffix("?")
        if name in value:
            yield from problems(value[name], inner, f"{path}.{name}".removeprefix("."))
        elif name == key:
            yield f"{path}.{name} is missing".removeprefix(".")


def check_metrics(metrics: dict) -> list[str]:
    """What is wrong with the content of metrics.json, in words; [] if pages can be made from it."""
    found = list(problems(metrics, METRICS))
    if found:
        return found
    results = metrics["results"]
    if not {"miou", "mask_iou"} & set(results):
        found.append("results.miou and results.mask_iou are missing")
    for score, others in TOGETHER.items():
        if score in results:
            missing = [name for name in others if name not in results]
            missing += [f"{score}.{kind}" for kind in results["kinds"] if kind not in results[score]]
            found += [f"results.{name} is missing" for name in missing]
    bits = metrics.get("history", {}).get("bits", {"steps": [], "layers": {}})
    found += [f"stages[{i}].mask_iou is missing" for i, row in enumerate(metrics["stages"])
              if "feature_error" in row and "mask_iou" not in row]  # fmt: skip
    uneven = [layer for layer, series in bits["layers"].items() if len(series) != len(bits["steps"])]
    return found + [f"history.bits.layers.{layer} has not one value for each step" for layer in uneven]

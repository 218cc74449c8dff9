"""A run in a few words and figures."""

SMALL_IMAGES, SMALL_CLIPS = 100, 20  # fewer leave room for chance
AGREEMENT = "mask IoU with full precision"
PROMPTS = ("box", "1 click", "3 clicks")


def scheme(metrics: dict) -> str:
    """What was done to a model, as "W4A8 g128, GPTQ, smoothing"; W3-8 where layers differ in bits."""
    wgts, rows = metrics["config"]["quant"]["wgts"], metrics["layers"]
    inputs = span({int(row["inputs"][-1]) for row in rows if row["inputs"]} or {16})
    parts = [f"W{span({row['bits'] for row in rows} or {32})}A{inputs} {group(wgts['group_shapes'])}"]
    stages = [stage["name"] for stage in metrics["stages"]]
    parts += [wgts["dtype"]] * ("fp" in wgts["dtype"]) + ["GPTQ"] * (wgts["kernel_gptq"] is not None)
    parts += [name for name in ("distill", "smooth", "rotation") if name in stages]
    return ", ".join(parts + ([f"rank {wgts['low_rank']['rank']}"] if wgts["low_rank"] else []))


def span(widths: set[int]) -> str:
    """The only one, as "4", or the least and the greatest, as "3-8"."""
    return "-".join(map(str, sorted({min(widths), max(widths)})))


def group(shapes: list[list[int]]) -> str:
    """What shares a scale: "g128", "per channel" or "per tensor"."""
    [[rows, size]] = shapes
    return "per tensor" if rows == -1 else "per channel" if size == -1 else f"g{size}"


def megabytes(metrics: dict) -> tuple[float, float]:
    """The size of all tensors in float32 and quantized, in MB."""
    return metrics["bytes_float32"] / 1e6, (metrics["bytes_quantized"] + metrics["bytes_unquantized"]) / 1e6


def scores(metrics: dict) -> list[dict]:
    """[{"name", "before", "after", "change", "behind"}], in percent: mIoU by prompt, J&F, and agreement, as measured.

    results["kinds"] names the two models whose scores are before and after.
    """
    results, rows = metrics["results"], []
    of_kinds = lambda scores: [scores[kind] for kind in results["kinds"]]
    if "miou" in results:
        full, small = of_kinds(results["miou"])
        behind = sample(results, "miou", "image")
        rows += [score(f"mIoU, {name}", 100 * full[name], 100 * small[name], behind) for name in PROMPTS]
    if "video" in results:
        full, small = of_kinds(results["video"])
        rows.append(score("J&F", full["j&f"], small["j&f"], sample(results, "video", "clip")))
    if "mask_iou" in results:
        images = count(results["images"], "image")
        behind = f"{images} of calibration, {results['prompts_per_image']} clicks with 3 masks each"
        rows.append(score(AGREEMENT, 100.0, 100 * results["mask_iou"], behind))
        if "nunchaku" in results:
            after = 100 * results["nunchaku"]["mask_iou"]
            rows.append(score(f"{AGREEMENT}, as nunchaku's kernels compute", 100.0, after, behind))
    return rows


def sample(results: dict, key: str, noun: str) -> str:
    """What a score was measured on, as "16 images, 58 objects, scenes:7"."""
    numbers = count(results[f"{key}_{noun}s"], noun), count(results[f"{key}_objects"], "object")
    return ", ".join([*numbers, results[f"{key}_data"]])


def score(name: str, before: float, after: float, behind: str) -> dict:
    return {"name": name, "before": before, "after": after, "change": after - before, "behind": behind}


def warnings(metrics: dict) -> list[str]:
    """What a reader must know before believing a figure."""
    results, found = metrics["results"], []
    if metrics["random_weights"]:
        found.append("The weights are RANDOM: no figure here says anything about a trained model.")
    images = results.get("miou_images", results["images"])
    if images < SMALL_IMAGES:
        found.append(f"Small sample: {count(images, 'image')}. A point more or less may be chance.")
    if results.get("video_clips", SMALL_CLIPS) < SMALL_CLIPS:
        found.append(f"Small sample: {count(results['video_clips'], 'clip')}. Points of J&F may be chance.")
    if "miou" not in results:
        found.append("No true masks were given (measure.images), so masks are compared with full precision only.")
    elif not results["held_out"]:
        found.append("mIoU was measured on the images of calibration: give others as measure.images.")
    return found


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"

"""The summary at the top of a page: scheme, size, scores, and warnings."""

from sam2jq.deploy.engines import ENGINES
from sam2jq.errors import few

SMALL_IMAGES, SMALL_CLIPS = 100, 20  # with fewer, a page warns that scores are noisy
AGREEMENT = "mask IoU with full precision"
PROMPTS = ("box", "1 click", "3 clicks")


def scheme(metrics: dict) -> str:
    """The quantization scheme, as "W4A8 g128, GPTQ, smooth"; W3-8 where layers differ in bits."""
    wgts, rows = metrics["config"]["quant"]["wgts"], metrics["layers"]
    inputs = span({int(row["inputs"][-1]) for row in rows if row["inputs"]} or {16})
    parts = [f"W{span({row['bits'] for row in rows} or {32})}A{inputs} {group(wgts['group_shapes'])}"]
    stages = [stage["name"] for stage in metrics["stages"]]
    parts += [wgts["dtype"]] * ("fp" in wgts["dtype"]) + ["GPTQ"] * (wgts["kernel_gptq"] is not None)
    parts += [name for name in ("distill", "smooth", "rotation") if name in stages]
    return ", ".join(parts + ([f"rank {wgts['low_rank']['rank']}"] if wgts["low_rank"] else []))


def span(widths: set[int]) -> str:
    """The width as "4" if there is one, else the lowest and the highest as "3-8"."""
    return "-".join(map(str, sorted({min(widths), max(widths)})))


def group(shapes: list[list[int]]) -> str:
    """Which weights share a scale: "g128", "per channel" or "per tensor"."""
    [[rows, size]] = shapes
    return "per tensor" if rows == -1 else "per channel" if size == -1 else f"g{size}"


def megabytes(metrics: dict) -> tuple[float, float]:
    """The size of all tensors in float32 and quantized, in MB."""
    return metrics["bytes_float32"] / 1e6, (metrics["bytes_quantized"] + metrics["bytes_unquantized"]) / 1e6


def scores(metrics: dict) -> list[dict]:
    """[{"name", "before", "after", "change", "behind"}] of the measured scores, in percent: mIoU by prompt, J&F, mask
    IoU with full precision. "behind" says what the score was measured on.

    results["kinds"] names the models of "before" and "after".
    """
    results, rows = metrics["results"], []
    of_kinds = lambda scores: [scores[kind] for kind in results["kinds"]]
    if "miou" in results:
        full, small = of_kinds(results["miou"])
        behind = sample(results, "miou", "image")
        measured = {"": small} | {f", ONNX files in {k}": results["miou"][k] for k in ENGINES if k in results["miou"]}
        for where, miou in measured.items():
            rows += [score(f"mIoU, {name}{where}", 100 * full[name], 100 * miou[name], behind) for name in PROMPTS]
    if "video" in results:
        full, small = of_kinds(results["video"])
        memory = {f", {k}": results["video"][k] for k in results["video"] if k not in results["kinds"]}
        for where, video in ({"": small} | memory).items():
            rows.append(score(f"J&F{where}", full["j&f"], video["j&f"], sample(results, "video", "clip")))
    if "everything" in results:
        every = results["everything"]
        behind = (
            f"{count(every['images'], 'image')}, {every['reference_masks']} masks before and {every['masks']} after, "
            f"another number in {count(every['count_mismatch'], 'image')}"
        )
        rows.append(score("everything: mIoU with full precision", 100.0, 100 * every["miou"], behind))
        rows.append(score("everything: masks found again, at IoU 0.5", 100.0, 100 * every["recall"], behind))
    if "mask_iou" in results:
        images = count(results["images"], "image")
        behind = f"{images} of calibration, {results['prompts_per_image']} clicks with 3 masks each"
        rows.append(score(AGREEMENT, 100.0, 100 * results["mask_iou"], behind))
        if "nunchaku" in results:
            after = 100 * results["nunchaku"]["mask_iou"]
            rows.append(score(f"{AGREEMENT}, as nunchaku's kernels compute", 100.0, after, behind))
    return rows


def sample(results: dict, key: str, noun: str) -> str:
    """The data that a score was measured on, as "16 images, 58 objects, scenes:7"."""
    numbers = count(results[f"{key}_{noun}s"], noun), count(results[f"{key}_objects"], "object")
    return ", ".join([*numbers, results[f"{key}_data"]])


def score(name: str, before: float, after: float, behind: str) -> dict:
    return {"name": name, "before": before, "after": after, "change": after - before, "behind": behind}


def warnings(metrics: dict) -> list[str]:
    """Sentences on what makes the scores of a run unreliable; [] if nothing does."""
    results, texts = metrics["results"], []
    if metrics["random_weights"]:
        texts.append("The weights are RANDOM: no result here says anything about a trained model.")
    images = results.get("miou_images", results["images"])
    if images < SMALL_IMAGES:
        texts.append(f"Small sample: {count(images, 'image')}. A difference of a point may be noise.")
    if results.get("video_clips", SMALL_CLIPS) < SMALL_CLIPS:
        texts.append(
            f"Small sample: {count(results['video_clips'], 'clip')}. Differences of a few points of J&F may be noise."
        )
    if "miou" not in results:
        texts.append("No ground-truth masks were given (measure.images): masks are only compared with full precision.")
    elif not results["held_out"]:
        texts.append("mIoU was measured on the calibration images: set measure.images to others.")
    return texts + left_out(results)


def left_out(results: dict) -> list[str]:
    """One sentence with the images, clips and objects that have no score, and why; none if all have one."""
    names = results.get("miou_left_out", {}) | results.get("video_left_out", {})
    shown = few([why if name in why else f"{name}: {why}" for name, why in names.items()], 3)
    return [f"Without a score: {shown}."] if names else []


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"

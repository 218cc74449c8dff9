"""Summaries of a package or a run as aligned text for the terminal."""

MB = 1e6  # bytes


WORST = 5  # layers


def layer_table(rows: list[dict]) -> str:
    """One line per layer: dtype, group, bytes, relative errors, and the leaves around the quantized weight.

    The error of the output is left out where no row has one: a package does not, metrics.json may.
    """
    width = max([len(row["name"]) for row in rows], default=0)
    outputs = any(row.get("output_error") is not None for row in rows)
    head = f"{'layer':{width}}  {'dtype':>6} {'group':>8} {'weights':>10} {'bytes':>9} {'rel. error':>10}"
    head += f" {'of output':>10}" * outputs
    return "\n".join([head, *(layer_line(row, width, outputs) for row in rows)])


def layer_line(row: dict, width: int, outputs: bool) -> str:
    """The line of one layer in `layer_table`."""
    sizes = f"{row['name']:{width}}  {row['dtype']:>6} {row['group']:>8} {row['weights']:>10} {row['bytes']:>9}"
    output_error = row.get("output_error")
    of_output = ("-" if output_error is None else f"{output_error:.5f}").rjust(11) if outputs else ""
    return f"{sizes} {row['relative_error']:>10.5f}{of_output}  {' > '.join(row['around'])}".rstrip()


def worst_layers(rows: list[dict]) -> str:
    """The layers with the largest relative error of their output, worst first, under a line that says so.

    The output of a layer is what reaches the masks. Where it was not measured, the error of the weight decides.
    """
    measured = [row for row in rows if row["output_error"] is not None]
    key, what = ("output_error", "output") if measured else ("relative_error", "weight, as outputs were not measured")
    worst = sorted(measured or rows, key=lambda row: -row[key])[:WORST]
    return f"worst layers, by relative error of their {what}\n{layer_table(worst)}"


def scores(results: dict) -> str:
    """The scores that `evaluate` measured, one per line."""
    if "recall" in results:
        lines = everything(results)
    elif "ap" in results:
        lines = [(name, "-" if value is None else f"{value:.4f}") for name, value in results["ap"].items()]
        lines.append(("boxes", f"{results['boxes']} in {results['images']} images"))
    elif "miou" in results:
        lines = [(name, f"mIoU {value:.4f}") for name, value in results["miou"].items()]
        lines.append(("instances", f"{results['instances']} in {results['images']} images"))
    else:
        lines = [(name.upper(), f"{results[name]:.2f}") for name in ("j", "f", "j&f", "v") if name in results]
        for group, means in results.get("groups", {}).items():
            lines.append((group, ", ".join(f"{name.upper()} {value:.2f}" for name, value in means.items())))
        lines.append(("objects", f"{results['objects']} in {results['clips']} clips"))
    return aligned(lines + left_out(results["left_out"]))


def everything(results: dict) -> list[tuple[str, str]]:
    """The lines of all masks of images, compared with those of a reference."""
    return [
        ("everything", f"mIoU {results['miou']:.4f}, recall {results['recall']:.4f} at IoU 0.5"),
        ("masks", f"{results['masks']}, of the reference {results['reference_masks']}"),
        ("mismatch", f"another number of masks in {results['count_mismatch']} of {results['images']} images"),
    ]


def left_out(names: dict[str, str]) -> list[tuple[str, str]]:
    """The line with the number of images, clips or objects without a score; none if all have one."""
    return [("left out", f"{len(names)}, such as {next(iter(names))}; metrics.json says why")] if names else []


def aligned(lines: list[tuple[str, str]]) -> str:
    """One line for each (name, text), with all texts in one column."""
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def totals(summary: dict) -> str:
    """Sizes and scores of the whole model, one per line. summary: of a package, or metrics.json."""
    size = summary["bytes_quantized"] + summary["bytes_unquantized"]
    lines = [
        ("model", f"{summary['model']['name']} {summary['model']['version']} from {summary['model']['checkpoint']}"),
        ("tensors", f"{summary['bytes_float32'] / MB:.2f} MB in float32 -> {size / MB:.2f} MB"),
        ("quantized", f"{len(summary['layers'])} layers, {summary['quantized_weights'] / 1e6:.2f} M weights"),
    ]
    if summary["effective_bits"]:
        lines.append(("bits/weight", f"{summary['effective_bits']:.3f} with scales and zeros"))
    results = summary.get("results")
    if results:
        errors = ", ".join(f"{level} {error:.5f}" for level, error in results["feature_error"].items())
        sample = f"{results['images']} images x {results['prompts_per_image']} clicks x 3 masks"
        lines += [
            ("features", f"relative error {errors}"),
            ("mask IoU", f"{results['mask_iou']:.4f} against full precision ({sample})"),
            ("worst image", f"mask IoU {results['mask_iou_worst_image']:.4f}"),
        ]
        if "nunchaku" in results:
            lines.append(("nunchaku", f"mask IoU {results['nunchaku']['mask_iou']:.4f} as its kernels compute it"))
        for kind, miou in results.get("miou", {}).items():
            lines.append(("mIoU", ", ".join(f"{name} {value:.4f}" for name, value in miou.items()) + f" ({kind})"))
        for kind, scores in results.get("video", {}).items():
            lines.append(("J&F", f"{scores['j&f']:.2f} ({kind})"))
        lines += everything(results["everything"]) if "everything" in results else []
        for program, cost in results.get("cost", {}).items():
            lines.append(
                ("cost", f"{cost['seconds']:.3f} s an image and a click, {cost['peak_gb']:.2f} GB at most ({program})")
            )
        lines += left_out(results.get("miou_left_out", {})) + left_out(results.get("video_left_out", {}))
    if summary["random_weights"]:
        lines.append(("warning", "the weights are RANDOM: no result here says anything about a trained model"))
    return aligned(lines)

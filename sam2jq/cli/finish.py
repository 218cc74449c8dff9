"""The end of `quantize` and `distill`: everything that a measured run writes, in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from sam2jq import __version__
from sam2jq.eval.fidelity import STAGE_IMAGES
from sam2jq.eval.gallery import Gallery
from sam2jq.ptq.recipe import layers as all_layers
from sam2jq.report.run import layer_rows, merged, save_run
from sam2jq.report.schema import RunMetadata, RunMetrics
from sam2jq.tree import fingerprint

LIBRARIES = ("jax", "flax", "torch")
TOTALS = ("parameters", "quantized_weights", "effective_bits", "bytes_quantized", "bytes_unquantized", "bytes_float32")


@dataclass(frozen=True)
class MeasuredRun:
    """A quantized model and what was measured of it, before anything is written."""

    metadata: RunMetadata  # of the package
    params: dict  # the quantized params tree
    full: dict  # the full-precision params tree
    layers: Mapping[str, dict]  # errors by layer, as `eval.fidelity.layer_errors` returns them
    errors: Mapping[str, dict]  # errors by stage, as `eval.fidelity.measure` returns them
    gallery: Gallery  # masks to show
    record: list[dict]  # the finished stages, as `run_folder.stage` records them; grows while files are written
    images: list[str]  # names of the images without masks that were measured on
    images_id: str  # hash that tells these images from others
    truth_id: str  # hash of the images and clips with known masks
    asked: dict  # settings as they were given
    command: str  # the command line
    alphas: Mapping[str, tuple | None] = field(default_factory=dict)  # (alpha, beta) of smoothed layers


def run_metadata(model: dict, image_size: int, checkpoint, full: dict, config: dict, results: dict, **optional):
    """The RunMetadata of a package. model: ModelConfig as a dict; checkpoint: the source of the full-precision params
    `full`; optional: input_ranges or history."""
    return RunMetadata(
        model=model | {"image_size": image_size},
        names=checkpoint.names,
        checkpoint=fingerprint(full),
        random_weights=checkpoint.random,
        config=config,
        results=results,
        versions={"sam2jq": __version__} | {name: version(name) for name in LIBRARIES},
        **optional,
    )


def finish_run(
    folder: Path, run: MeasuredRun, exports: Mapping[str, Callable[[Path], None]], on_stage: Callable
) -> RunMetrics:
    """Writes package.pt, `exports`, metrics.json, gallery/ and report.html into `folder`; returns the metrics.

    exports: {file name for the log: a function that writes it into a folder}.
    """
    from converters.exports.package import load_package, save_package

    with on_stage("write", ", ".join(["package.pt", *exports])):
        errors = {layer: row["relative_error"] for layer, row in run.layers.items()}
        save_package(folder / "package.pt", run.params, errors, run.metadata.to_dict())
        for write in exports.values():
            write(folder)
        summary = load_package(folder / "package.pt").summary()
    metrics = RunMetrics(
        **vars(run.metadata),
        **{name: summary[name] for name in TOTALS},
        layers=layer_rows(summary["layers"], run.layers, run.alphas),
        unquantized=[layer for layer in all_layers(run.full) if layer not in run.layers],
        stages=[row | run.errors.get(row["name"], {}) for row in merged(run.record)],
        stage_images=min(STAGE_IMAGES, len(run.images)),
        images_id=run.images_id,
        truth_id=run.truth_id,
        asked=run.asked,
        command=run.command,
    )
    return save_run(folder, metrics, run.gallery)

"""`sam2jq quantize`: post-training quantization of a checkpoint, and what it lost."""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from sam2jq.api import replay_bits
from sam2jq.cli.arguments import add_config, command_line
from sam2jq.cli.cost import engine_dtype, measure_costs
from sam2jq.cli.finish import MeasuredRun, finish_run, run_metadata
from sam2jq.cli.loading import load_model, require_memory, resolved
from sam2jq.cli.processes import joined_processes, shared_job_folder
from sam2jq.cli.run_folder import job_path, stage
from sam2jq.config import loader
from sam2jq.config.run import Config
from sam2jq.deploy import OnnxImagePredictor
from sam2jq.deploy.engines import installed_engines
from sam2jq.errors import section
from sam2jq.eval.fidelity import find_ground_truth, ground_truth_id, layer_errors, measure
from sam2jq.models.sam2 import SAM2, TRUNK_LINEAR
from sam2jq.predictors.prompted_image import PromptedImage
from sam2jq.ptq.pipeline import FOLDED, UNROUNDED, Quantized, smoothing_exponents
from sam2jq.ptq.recipe import gptq_onto, rounding_name, weight_specs
from sam2jq.ptq.run import CalibrationImages, find_calibration, run_ptq
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.leaves import materialize_params
from sam2jq.report import text
from sam2jq.tree import fingerprint, flatten, kernels, layer_name, unflatten

SCHEMA = Config
MEASURED_STAGES = ("weights", "inputs", "outputs", "reconstruct")  # after which scores with known masks are taken
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, ", such as --quant.calib.path DIR")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Quantizes a checkpoint and writes <output.root>/<job>/."""
    config = load_config(args.config, flags)
    final = job_path(config.output, args.config, "quantize")
    with (
        joined_processes(config.distributed, config.model.device),
        shared_job_folder(final, loader.dump(config)) as folder,
    ):
        quantize(config, folder, command_line(args, flags))
    log.info("\nwritten     %s (all layers: sam2jq inspect %s)\nreport      %s", final, final, final / "report.html")


def load_config(path: str | None, flags: list[str]) -> Config:
    """The settings of a run. Raises UserError as `loader.load`, and for an unknown rounding algorithm."""
    config = loader.load(path, flags)
    with section("quant"):
        rounding_name(config.quant.wgts)
    return config


def quantize(config: Config, folder: Path, command: str) -> None:
    """Calibrates, quantizes, measures, and in process 0 writes the files of a run into `folder`."""
    if config.convert_onnx:
        import converters.exports.onnx.write  # noqa: F401  # where onnx is missing, this is found out before the work
    record = []
    timed = partial(stage, record=record)
    with timed("images", config.quant.calib.path):
        images = find_calibration(config.quant.calib, config.seed)
        ground_truth = find_ground_truth(config, partial(log.warning, "note        %s"))
    asked = replace(config, quant=replay_bits(config.quant))
    model, checkpoint = load_model(config.model, config.cache, config.quant.calib.image_size)
    require_memory(checkpoint, "quantize, which also tracks objects to calibrate and to measure")
    full = materialize_params(checkpoint.params)
    done = calibrate_and_quantize(model, full, asked, images, timed)
    config = replace(asked, quant=done.config, model=resolved(asked.model, model))
    if jax.process_index() == 0:  # again, with the model and the bits that were chosen
        (folder / "config.yaml").write_text(loader.dump(config))

    layers = layer_errors(done.params_by_stage.get(FOLDED, full), done.params, done.stats)
    variants = {"full precision": full} | {
        name: materialize_weights(done.params_by_stage[name])
        for name in MEASURED_STAGES
        if name in done.params_by_stage
    }
    if config.convert_nunchaku:
        variants["nunchaku"] = convert_nunchaku(config, model, checkpoint, full, done, folder)
    deployed = convert_onnx(config, model, checkpoint.random, done.params, folder) if config.convert_onnx else {}
    names = [item.frames[0] for item in images.items]
    results, errors, gallery = measure(
        model, variants, done.params_by_stage, names, ground_truth, config, timed, deployed
    )
    if config.convert_onnx:
        with timed("cost", "an image and a click, each program in a process of its own"):
            results["cost"] = measure_costs(config, folder / "onnx", deployed)
    if jax.process_index():
        return
    ranges = {layer: [float(s.low.min()), float(s.high.max())] for layer, s in done.stats.items()}
    about, size = loader.to_dict(config.model), model.variant.image_size
    measured = MeasuredRun(
        run_metadata(about, size, checkpoint, full, loader.to_dict(config), results, input_ranges=ranges),
        done.params,
        full,
        layers,
        errors,
        gallery,
        record,
        names,
        images_id=fingerprint({}, images.ids),
        truth_id=ground_truth_id(ground_truth),
        asked=loader.to_dict(asked),
        command=command,
        alphas=smoothing_exponents(done, full),
    )
    metrics = finish_run(folder, measured, exports(config, done, checkpoint), timed).to_dict()
    log.info("\n%s\n\n%s", text.totals(metrics), text.worst_layers(metrics["layers"]))


def calibrate_and_quantize(model: SAM2, full: dict, config: Config, images: CalibrationImages, on_stage) -> Quantized:
    """`run_ptq` with the settings of `config`; nunchaku's kernels round on a grid of their own, from Gram matrices."""
    needs = {"gram"} if config.convert_nunchaku else ()
    where = {"seed": config.seed, "cache_root": config.cache.root}
    return run_ptq(model, full, config.quant, images, **where, on_stage=on_stage, needs=needs)


def exports(config: Config, done: Quantized, checkpoint) -> dict:
    """{file name: function that writes it into a folder}, of the files beside the package."""
    from converters.exports.deepcompressor import save_deepcompressor
    from converters.exports.vanilla import save_vanilla

    if not config.save_model:
        return {}
    about = loader.to_dict(config.model)
    return {
        "vanilla.pt": lambda folder: save_vanilla(folder / "vanilla.pt", done.params, checkpoint.random, about),
        "cache": lambda folder: save_deepcompressor(folder / "cache", done.params, checkpoint.names),
    }


def convert_nunchaku(config: Config, model: SAM2, checkpoint, full: dict, done: Quantized, folder: Path) -> dict:
    """Writes nunchaku/ and returns the params tree that its kernels compute with.

    The trunk's linears are rounded, with GPTQ, from the tree before rounding onto nunchaku's grid, signed int4 in
    groups of 64, whatever the grid of the config. All other layers are those of `full`.
    """
    from converters.exports.nunchaku_model import GRID, round_factors, save_nunchaku, simulate_nunchaku

    flat = flatten(done.params_by_stage[UNROUNDED])
    layers = [k for k in weight_specs(config.quant.wgts, map(layer_name, kernels(flat))) if TRUNK_LINEAR.fullmatch(k)]
    with stage("nunchaku", f"{len(layers)} linears onto {GRID.dtype} [[1, {GRID.group}]] with GPTQ"):
        chosen = {path: round_factors(leaf) for path, leaf in kernels(flat).items() if layer_name(path) in layers}
        rounded = flatten(gptq_onto(GRID, config.quant.wgts, layers).apply(unflatten(flat | chosen), done.stats))
        tree = flatten(full) | {path: leaf for path, leaf in rounded.items() if layer_name(path) in layers}
        save_nunchaku(folder / "nunchaku", unflatten(tree), loader.to_dict(config.model), checkpoint.names)
        return simulate_nunchaku(full, folder / "nunchaku")


def convert_onnx(config: Config, model: SAM2, random: bool, params: dict, folder: Path) -> dict[str, PromptedImage]:
    """Writes onnx/ and returns {engine: predictor of its files} of the engines that are installed."""
    from converters.exports.onnx.write import save_onnx

    (folder / "onnx").mkdir(exist_ok=True)
    with stage("onnx", "float32 and integer operators of ONNX"):
        save_onnx(folder / "onnx", model, params, {"model": loader.to_dict(config.model), "random_weights": random})
    own = lambda engine: OnnxImagePredictor(folder / "onnx", engine, dtype=engine_dtype(engine, config.model.dtype))
    return {engine: own(engine) for engine in installed_engines()}

"""The `sam2jq` command: one sub-command, one function."""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
from PIL import Image
from tqdm import tqdm

from sam2jq import __version__
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.quant import CalibConfig, QuantConfig
from sam2jq.config.run import Config, EvaluateConfig, ModelConfig, SegmentConfig
from sam2jq.data import read_image
from sam2jq.data.loader import Item, find_items, read_item
from sam2jq.data.sav import write_mask
from sam2jq.data.sources import drawn_video, find_clips, find_samples
from sam2jq.data.video import open_video
from sam2jq.errors import UserError, section
from sam2jq.eval.fidelity import STAGE_IMAGES, find_ground_truth, ground_truth_id, layer_figures, measure
from sam2jq.eval.image_benchmark import evaluate_images
from sam2jq.eval.vos_benchmark import evaluate_clips
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import SAM2, TRUNK_LINEAR, build
from sam2jq.predictors.image import ImagePredictor
from sam2jq.predictors.video import VideoPredictor
from sam2jq.ptq.pipeline import FOLDED, UNROUNDED, Quantized, quantize_params, smoothing_exponents
from sam2jq.ptq.recipe import gptq_onto, weight_specs
from sam2jq.ptq.recipe import layers as all_layers
from sam2jq.quant.algorithms.activations import materialize_weights
from sam2jq.quant.leaves import materialize_params
from sam2jq.report import figures, text
from sam2jq.report.comparison import runs_csv, runs_page, settings_of
from sam2jq.report.page import run_page
from sam2jq.report.run import layer_rows, merged, read_metrics, read_runs, save_run
from sam2jq.tree import fingerprint, flatten, kernels, layer_name, unflatten

FORMATS = {
    "vanilla": "vanilla.pt for build_sam2",
    "safetensors": "model.safetensors with Hugging Face's names",
    "deepcompressor": "model.pt, scale.pt, smooth.pt and branch.pt",
    "nunchaku": "hiera_blocks.safetensors and unquantized_layers.safetensors",
}
log = logging.getLogger("sam2jq")


def command_parser() -> argparse.ArgumentParser:
    """Every sub-command with the arguments of its own; settings are left to config.load."""
    parser = argparse.ArgumentParser(prog="sam2jq", description="Quantize SAM 2 checkpoints, in JAX.")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = add_command(commands, "quantize", "quantize a checkpoint and measure what it cost", Config)
    command.add_argument("--config", help="YAML file; every key of it is also a flag, --quant.calib.path DIR")
    command = add_command(commands, "distill", "lower a student's bits while it learns from a teacher", DistillConfig)
    command.add_argument("--config", help="YAML file; every key of it is also a flag, --train.epochs 5")
    command = add_command(commands, "segment", "segment an image from clicks or a box", SegmentConfig)
    command.add_argument("image", help="an image file, or scenes:<seed>/0000 for a drawn one")
    add_prompts(command)
    command.add_argument("--multimask", action="store_true", help="three masks for an ambiguous prompt")
    command.add_argument("--out", default="mask.png", help="the overlay to write (mask.png)")
    command = add_command(commands, "track", "follow an object through a clip", SegmentConfig)
    command.add_argument("clip", help="a video, a folder of frames, or scenes:<seed>/0000 for a drawn one")
    add_prompts(command)
    command.add_argument("--frame", type=int, default=0, help="the frame that is prompted (0)")
    command.add_argument("--out", default="tracked.gif", help=".gif, or .png for a strip of frames (tracked.gif)")
    measures = "measure how well a checkpoint segments images or follows objects"
    command = add_command(commands, "evaluate", measures, EvaluateConfig)
    command.add_argument("--config", help="YAML file; every key of it is also a flag")
    command = add_command(commands, "export", "write what is in a package in another format")
    command.add_argument("--package", required=True, help="package.pt of a run, or the run's folder")
    command.add_argument(
        "--to", required=True, choices=FORMATS, help="; ".join(f"{k}: {v}" for k, v in FORMATS.items())
    )
    command.add_argument("--out", required=True, help="the folder to write into")
    command = add_command(commands, "report", "one page of a finished run, or to compare several")
    command.add_argument("runs", nargs="+", metavar="RUN", help="the folder that a run left")
    command.add_argument("--out", default="report.html", help="the page to write (report.html)")
    command = add_command(commands, "sweep", "quantize with every combination of settings, and compare", Config)
    command.add_argument("--config", help="YAML file; every key of it is also a flag")
    command.add_argument("--over", action="append", required=True, metavar="KEY=V,V", help="values to try, repeatable")
    command = add_command(commands, "inspect", "print what is in a package")
    command.add_argument("package", help="package.pt of a run, or the run's folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code of one command; an error of the user's is one line, and the code is 2."""
    args, flags = command_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    try:
        run = (quantize, distill, segment, track, evaluate, export, report, sweep, inspect)
        next(one for one in run if one.__name__ == args.command)(args, flags)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors"):
            raise
        return _fail(f"this command needs {error.name}: pip install 'sam2jq[torch]'")
    except (UserError, OSError) as error:
        log.debug("", exc_info=True)  # --verbose shows where it came from
        return _fail(" ".join(str(error).split()))
    return 0


def quantize(args: argparse.Namespace, flags: list[str]) -> None:
    """Checkpoint + images -> <output.root>/<job>/ with package, vanilla checkpoint and figures."""
    from converters.exports.deepcompressor import save_deepcompressor
    from converters.exports.package import load_package, save_package
    from converters.exports.vanilla import save_vanilla

    config = loader.load(args.config, flags)
    job = config.output.job or Path(args.config or "quantize").stem
    with job_folder(Path(config.output.root) / job) as folder:
        (folder / "config.yaml").write_text(loader.dump(config))
        record = []
        timed = partial(stage, record=record)
        calib = config.quant.calib
        with timed("images", calib.path):
            items, images = find_calibration(calib, config.seed)
            ground_truth = find_ground_truth(config)
        config = replace(config, quant=replay(config.quant))
        model, checkpoint = load_model(config.model, config.cache.root, calib.image_size)

        full = materialize_params(checkpoint.params)
        names = [item.frames[0] for item in items]
        needs = {"gram"} if config.convert_nunchaku else ()
        done = run_ptq(model, full, config.quant, (items, images), config, timed, needs)
        asked, config = config, replace(config, quant=done.config)
        (folder / "config.yaml").write_text(loader.dump(config))  # with the bits that were chosen for a target
        variants = {"full precision": full}
        measured = [name for name in ("weights", "inputs", "outputs") if name in done.params_by_stage]
        variants |= {name: materialize_weights(done.params_by_stage[name]) for name in measured}
        *_, quantized = done.params_by_stage.values()
        layers = layer_figures(done.params_by_stage.get(FOLDED, full), quantized, done.stats)
        if config.convert_nunchaku:
            variants["nunchaku"] = convert_nunchaku(config, model, checkpoint, full, done, folder)
        results, errors, gallery = measure(model, variants, done.params_by_stage, names, ground_truth, config, timed)
        with timed("write", "package.pt" + ", vanilla.pt, cache" * config.save_model):
            metadata = {
                "model": loader.to_dict(config.model) | {"image_size": model.variant.image_size},
                "names": checkpoint.names,
                "checkpoint": fingerprint(full),
                "input_ranges": {k: [float(s.low.min()), float(s.high.max())] for k, s in done.stats.items()},
                "random_weights": checkpoint.random,
                "config": loader.to_dict(config),
                "results": results,
                "versions": {"sam2jq": __version__} | {name: version(name) for name in ("jax", "flax", "torch")},
            }
            weight_errors = {layer: row["relative_error"] for layer, row in layers.items()}
            save_package(folder / "package.pt", quantized, weight_errors, metadata)
            if config.save_model:
                save_vanilla(folder / "vanilla.pt", quantized, checkpoint.random)
                if "rotation" not in done.params_by_stage:  # these files have no place for it
                    save_deepcompressor(folder / "cache", quantized, checkpoint.names)
            summary = load_package(folder / "package.pt").summary()
        metrics = summary | {
            "layers": layer_rows(summary["layers"], layers, smoothing_exponents(done, full)),
            "unquantized": [layer for layer in all_layers(full) if layer not in layers],
            "stages": [row | errors.get(row["name"], {}) for row in merged(record)],
            "stage_images": min(STAGE_IMAGES, len(names)),
            "images_id": fingerprint({}, images),
            "truth_id": ground_truth_id(ground_truth),
            "asked": loader.to_dict(asked),
            "command": command_line(args, flags),
        }
        save_run(folder, metrics, gallery)
        rows = sorted(metrics["layers"], key=lambda row: -row["relative_error"])
        log.info("\n%s\n\nworst layers\n%s", text.totals(summary), text.layer_table(rows[:5]))
    final = Path(config.output.root) / job
    log.info("\nwritten     %s (all layers: sam2jq inspect %s)\nreport      %s", final, final, final / "report.html")


def distill(args: argparse.Namespace, flags: list[str]) -> None:
    """Teacher + student + frames -> <output.root>/<job>/ with package, vanilla checkpoint and curves."""
    from sam2jq.cli import distill as cli_distill

    config = loader.load(args.config, flags, DistillConfig)
    cli_distill.run(config, Path(args.config or "distill").stem, command_line(args, flags))


def segment(args: argparse.Namespace, flags: list[str]) -> None:
    """An image and a prompt -> an overlay in `args.out`."""
    labels = prompt_labels(args)
    image = read_image(args.image)
    config = loader.load(None, flags, SegmentConfig)
    model, checkpoint = load_model(config.model, config.cache.root)
    predictor = ImagePredictor(model, materialize_weights(checkpoint.params), dtype=config.model.dtype)
    predictor.set_image(image)
    points = {"point_coords": args.points, "point_labels": labels} if args.points else {}
    masks, scores, _ = predictor.predict(**points, box=args.box, multimask_output=args.multimask)
    picture = figures.overlay(image, masks > 0)
    figures.draw_prompts(picture, args.points, labels, args.box)
    if checkpoint.random:
        figures.write(picture, "random weights")
    with atomic_write(args.out) as temporary:
        picture.save(temporary, format=Image.registered_extensions().get(Path(args.out).suffix.lower(), "PNG"))
    for mask, score in zip(masks, scores):
        log.info("mask        %.1f %% of the image, estimated IoU %.3f", 100 * mask.mean(), score)
    log.info("written     %s", args.out)


def track(args: argparse.Namespace, flags: list[str]) -> None:
    """A clip and a prompt on one of its frames -> the object in all frames after it, moving or on a strip."""
    labels, out = prompt_labels(args), Path(args.out)
    if out.suffix.lower() not in (".gif", ".png"):
        raise UserError(f"--out {out}: give a name that ends in .gif or, for a strip of frames, in .png")
    video = drawn_video(args.clip) if args.clip.startswith("scenes:") else open_video(args.clip)
    config = loader.load(None, flags, SegmentConfig)
    model, checkpoint = load_model(config.model, config.cache.root)
    predictor = VideoPredictor(model, materialize_weights(checkpoint.params), dtype=config.model.dtype)
    state = predictor.init_state(video)
    points = {"points": args.points, "labels": labels} if args.points else {}
    predictor.add_new_points_or_box(state, args.frame, 1, **points, box=args.box)
    pictures = []
    with stage("track", f"{len(video)} frames of {args.clip}"):
        for frame, _, logits in predictor.propagate_in_video(state):
            pictures.append(figures.overlay(video[frame], logits[:, 0] > 0))
            if frame == args.frame:
                figures.draw_prompts(pictures[-1], args.points, labels, args.box)
            if checkpoint.random:
                figures.write(pictures[-1], "random weights")
    with atomic_write(args.out) as temporary:
        if out.suffix.lower() == ".gif":
            pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=42, loop=0)
        else:
            figures.strip(pictures).save(temporary, format="PNG")
    log.info("written     %s", args.out)


def evaluate(args: argparse.Namespace, flags: list[str]) -> None:
    """Checkpoint + annotated images or clips -> mIoU, or J and F with all masks, in <output.root>/<job>/."""
    config = loader.load(args.config, flags, EvaluateConfig)
    job = config.output.job or (Path(args.config).stem if args.config else f"evaluate_{config.task}")
    with job_folder(Path(config.output.root) / job) as folder:
        (folder / "config.yaml").write_text(loader.dump(config))
        with stage("data", config.data):
            if config.task == "image":
                samples = find_samples(config.data, config.num_samples)
            else:
                samples = find_clips(config.data, config.split, config.num_samples)
        model, checkpoint = load_model(config.model, config.cache.root)
        params, progress = materialize_weights(checkpoint.params), tqdm(samples, leave=False, disable=None)
        with stage("evaluate", f"{len(samples)} {'images' if config.task == 'image' else 'clips'}"):
            if config.task == "image":
                results = evaluate_images(model, params, progress, config.model.dtype)
            else:
                predictor = VideoPredictor(model, params, dtype=config.model.dtype)
                results = evaluate_clips(predictor, progress, mask_writer(folder) if config.masks else None)
        (folder / "metrics.json").write_text(json.dumps(results, indent=1))
        log.info("\n%s", text.scores(results))
    log.info("\nwritten     %s", Path(config.output.root) / job)


def mask_writer(folder: Path):
    """write(clip, object, frame name, mask): PNGs below `folder` as the SA-V evaluator reads them, one an object."""

    def write(clip: str, name: str, frame: str, mask) -> None:
        write_mask(folder / "masks" / clip.replace(":", "_") / name / f"{frame}.png", mask)

    return write


def add_command(commands, name: str, what: str, schema: type | None = None) -> argparse.ArgumentParser:
    """The parser of one command, whose help lists the settings in `schema`."""
    listed = schema and "settings and their defaults:\n  " + "\n  ".join(loader.keys(schema))
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=what, epilog=listed, allow_abbrev=False, formatter_class=raw)
    command.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return command


def add_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--points", nargs="+", type=_numbers(2), default=[], metavar="X,Y", help="clicks, in pixels")
    command.add_argument("--labels", nargs="+", type=int, metavar="L", help="1 foreground (default), 0 background")
    command.add_argument("--box", type=_numbers(4), metavar="X0,Y0,X1,Y1", help="a box, in pixels")


def prompt_labels(args: argparse.Namespace) -> list[int]:
    """One label for each of args.points."""
    if not args.points and args.box is None:
        raise UserError("no prompt: give --points X,Y [X,Y ...] or --box X0,Y0,X1,Y1")
    labels = args.labels or [1] * len(args.points)
    if len(labels) != len(args.points):
        raise UserError(f"{len(args.points)} points but {len(labels)} labels: give one label each")
    return labels


def inspect(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints what a package holds, layer by layer, what was measured, and how the original code loads it."""
    from converters.exports.package import load_package
    from converters.exports.vanilla import hydra_config

    if flags:
        raise UserError(f"inspect takes no {flags[0]}")
    path = Path(args.package)
    summary = load_package(path / "package.pt" if path.is_dir() else path).summary()
    model = summary["model"]
    name, overrides = hydra_config(model["name"], model["version"], model["image_size"])
    log.info("%s\n\n%s", text.layer_table(summary["layers"]), text.totals(summary))
    log.info("vanilla.pt  build_sam2(%r, 'vanilla.pt', hydra_overrides_extra=%r)", name, overrides)


def export(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes a package in another format into `args.out`."""
    from converters.checkpoint import load_checkpoint, save_checkpoint
    from converters.exports import deepcompressor, nunchaku_model, vanilla
    from converters.exports.package import load_package

    if flags:
        raise UserError(f"export takes no {flags[0]}")
    path, out = Path(args.package), Path(args.out)
    path = path / "package.pt" if path.is_dir() else path
    metadata = load_package(path).metadata
    about = metadata["model"]
    model = build(about["name"], about["version"], about["image_size"])
    params = load_checkpoint(str(path), model).params
    match args.to:
        case "vanilla":
            vanilla.save_vanilla(out / "vanilla.pt", params, metadata["random_weights"])
        case "safetensors":
            save_checkpoint(out / "model.safetensors", materialize_params(params))
        case "deepcompressor":
            deepcompressor.save_deepcompressor(out, params, metadata["names"])
        case "nunchaku":
            params, again = nunchaku_model.onto_grid(params)
            if again:
                log.warning(
                    "nunchaku    %d linears stood on another grid and were rounded a second time, to nearest: "
                    "quantize --convert-nunchaku rounds them once, with GPTQ",
                    len(again),
                )
            nunchaku_model.save_nunchaku(out, params, about, metadata["names"])
    log.info("written     %s", out)


def report(args: argparse.Namespace, flags: list[str]) -> None:
    """The page of a run, or that of several side by side, in `args.out`."""
    if flags:
        raise UserError(f"report takes no {flags[0]}")
    runs = read_runs(args.runs)
    page = runs_page(runs) if len(runs) > 1 else run_page(*next(iter(runs.items())))
    with atomic_write(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    log.info("written     %s", args.out)


def sweep(args: argparse.Namespace, flags: list[str]) -> None:
    """A run for every combination of `args.over`, those that are finished kept; their page and a table as CSV."""
    root, job = sweep_folder(args, flags)
    jobs = {}
    for values in loader.sweep_combinations(args.over):  # all are read before the first one runs
        name = job_name(values)
        places = {"output.root": str(root / job), "output.job": name}
        own = [*flags, *(part for key, value in (values | places).items() for part in (f"--{key}", json.dumps(value)))]
        jobs[root / job / name] = own, loader.load(args.config, own)
    begin, made = time.perf_counter(), 0
    for i, (folder, (own, config)) in enumerate(jobs.items(), 1):
        if folder.exists():
            check_same(folder, config)
            log.info("job %2d/%-4d %s is finished", i, len(jobs), folder.name)
            continue
        quantize(argparse.Namespace(command="quantize", config=args.config), own)
        jax.clear_caches()  # the programs of a hundred models do not fit into one process
        made += 1
        left = (time.perf_counter() - begin) / made * (len(jobs) - i)
        log.info("job %2d/%-4d %s done, about %.0f s to go\n", i, len(jobs), folder.name, left)
    runs = read_runs(jobs)
    for name, content in {"runs.csv": runs_csv(runs), "report.html": runs_page(runs)}.items():
        with atomic_write(root / job / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="replace")
    log.info("written     %s\nreport      %s", root / job / "runs.csv", root / job / "report.html")


def job_name(values: dict[str, object]) -> str:
    """A folder's name that says which settings a job of a sweep has."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.,=+{}\[\]-]+", "_", ",".join(f"{key}={text(value)}" for key, value in values.items()))


def sweep_folder(args: argparse.Namespace, flags: list[str]) -> tuple[Path, str]:
    """The root and the name of the folder that holds a sweep's runs."""
    output = loader.load(args.config, flags).output
    return Path(output.root), output.job or f"{Path(args.config or 'quantize').stem}_sweep"


def check_same(folder: Path, config: Config) -> None:
    """ValueError unless the finished run in `folder` was made with the settings of `config`."""
    asked = [settings_of(of) for of in (read_metrics(folder)["asked"], loader.to_dict(config))]
    changed = [key for key in asked[0] | asked[1] if asked[0].get(key) != asked[1].get(key)]
    if changed:
        raise UserError(f"{folder} was made with another {', '.join(changed)}: remove it, or give --output.job a name")


def load_model(wanted: ModelConfig, cache: str, image_size: int | None = None):
    """The model of a config and its checkpoint, after jax was told where to run it."""
    from converters.checkpoint import load_checkpoint

    if wanted.device != "auto":
        try:
            jax.config.update("jax_default_device", jax.devices(wanted.device)[0])
        except RuntimeError as error:
            raise UserError(f"model.device {wanted.device}: no such device here; use auto") from error
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on GPU and TPU too
    jax.config.update("jax_compilation_cache_dir", str(Path(cache).absolute() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a layer's programs are small but many
    model = build(wanted.name, wanted.version, image_size)
    with stage("load", f"{wanted.name} {wanted.version} from {wanted.checkpoint}"):
        checkpoint = load_checkpoint(wanted.checkpoint, model)
    if checkpoint.random:
        log.warning("warning     the weights are RANDOM: what follows says nothing about a trained model")
    return model, checkpoint


def find_calibration(calib: CalibConfig, seed: int) -> tuple[list[Item], list[str]]:
    """The clips to calibrate on, and what tells their images from others. Each is read once, so that a broken one is
    found before the work."""
    items = find_items(calib.path, calib.num_samples, seed, calib.frames, calib.stride)
    files = [frame for item in items for frame in item.frames]
    for name in files:
        read_image(name)
    return items, [name if name.startswith("scenes:") else fingerprint({}, Path(name).read_bytes()) for name in files]


def run_ptq(
    model: SAM2,
    params: dict,
    quant: QuantConfig,
    found: tuple[list[Item], list[str]],
    config: Config | DistillConfig,
    on_stage: Callable,
    needs: Iterable[str] = (),
) -> Quantized:
    """`quantize_params` on what `find_calibration` found, with progress, and statistics kept in cache.root."""
    (items, images), size = found, model.variant.image_size
    clips = lambda n: (read_item(item, size) for item in tqdm(items[n:], leave=False, disable=None))
    cache = Path(config.cache.root) / "calibration", (images, quant.calib.frames, quant.calib.stride)
    with section("quant" if isinstance(config, Config) else "ptq"):
        return quantize_params(
            model, params, quant, clips, seed=config.seed, needs=needs, cache=cache, on_stage=on_stage
        )


def replay(quant: QuantConfig) -> QuantConfig:
    """`quant` with the bits of every layer, and of its inputs if they are rounded, in the package that its bits_from
    names, if it names one."""
    from converters.exports.package import load_package

    if not quant.bits_from:
        return quant
    path = Path(quant.bits_from)
    rows = load_package(path / "package.pt" if path.is_dir() else path).summary()["layers"]
    wgts = replace(quant.wgts, bits={row["name"]: row["bits"] for row in rows})
    rounded = (row for row in rows if quant.ipts.dtype and "int" in (row["inputs"] or ""))
    ipts = replace(quant.ipts, bits={row["name"]: int(row["inputs"][4:]) for row in rounded})  # of sintN, uintN
    return replace(quant, wgts=wgts, ipts=ipts, bits_from="")


def command_line(args: argparse.Namespace, flags: list[str]) -> str:
    """The command that was given, as a shell takes it."""
    config = ["--config", args.config] if args.config else []
    return shlex.join(["sam2jq", args.command, *config, *flags])


def convert_nunchaku(config: Config, model: SAM2, checkpoint, full: dict, done: Quantized, folder: Path) -> dict:
    """Writes nunchaku/ of what was smoothed but not rounded; the params tree of what its kernels will compute.

    Their grid is signed int4 in groups of 64, whatever that of the config; all but the trunk's linears is as in `full`.
    """
    from converters.exports.nunchaku_model import GRID, computed_by_kernels, in_file_precision, save_nunchaku

    flat = flatten(done.params_by_stage[UNROUNDED])
    layers = [k for k in weight_specs(config.quant.wgts, map(layer_name, kernels(flat))) if TRUNK_LINEAR.fullmatch(k)]
    with stage("nunchaku", f"{len(layers)} linears onto {GRID.dtype} [[1, {GRID.group}]] with GPTQ"):
        chosen = {path: in_file_precision(leaf) for path, leaf in kernels(flat).items() if layer_name(path) in layers}
        rounded = flatten(gptq_onto(GRID, config.quant.wgts, layers).apply(unflatten(flat | chosen), done.stats))
        tree = flatten(full) | {path: leaf for path, leaf in rounded.items() if layer_name(path) in layers}
        about = loader.to_dict(config.model) | {"image_size": model.variant.image_size}
        save_nunchaku(folder / "nunchaku", unflatten(tree), about, checkpoint.names)
        return computed_by_kernels(full, folder / "nunchaku")


@contextmanager
def stage(name: str, what: str, record: list | None = None) -> Iterator[None]:
    """Logs one aligned line with the seconds that the block took, and adds them to `record`."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    log.info("%-11s %-60s %6.1f s", name, what, seconds)
    if record is not None:
        record.append({"name": name, "what": what, "seconds": seconds})


@contextmanager
def job_folder(final: Path, resumes: str = "") -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not.

    What a killed run left there is cleared away, no stage of it being worth keeping; a finished job is never touched.
    resumes: the settings under which checkpoints/ can be gone on from; once it holds any, the folder is kept, whatever
    ends the block.
    """
    if final.exists():
        raise FileExistsError(f"{final} already holds a finished job: remove it, or give --output.job another name")
    partial = final.with_name(f".{final.name}.partial")
    worth_keeping = lambda: resumes and any((partial / "checkpoints").glob("*"))
    if worth_keeping():
        if (partial / "config.yaml").read_text() != resumes:
            raise FileExistsError(
                f"{partial} holds an unfinished job with other settings: go on with its config.yaml, remove it, or "
                "give --output.job another name"
            )
        log.info("resume      %s was not finished: going on", final)
    else:
        if partial.exists():
            log.info("restart     %s was not finished and holds nothing to resume from: starting over", final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if resumes:
            (partial / "config.yaml").write_text(resumes)
    handler = logging.FileHandler(partial / "run.log")
    log.addHandler(handler)
    try:
        yield partial
        os.replace(partial, final)
    finally:
        log.removeHandler(handler)
        handler.close()
        if not worth_keeping():
            shutil.rmtree(partial, ignore_errors=True)


def _numbers(count: int):
    def parse(argument: str) -> list[float]:
        numbers = [float(part) for part in argument.split(",")]
        if len(numbers) != count:
            raise argparse.ArgumentTypeError(f"{argument!r} is not {count} numbers with commas between")
        return numbers

    return parse


def _fail(message: str) -> int:
    print(f"sam2jq: error: {message}", file=sys.stderr)
    return 2

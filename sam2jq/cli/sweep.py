"""`sam2jq sweep`: `quantize` with every combination of some settings, and a comparison of the runs."""

import argparse
import json
import logging
import re
import time
from pathlib import Path

import jax

from sam2jq.cli import quantize
from sam2jq.cli.arguments import add_config
from sam2jq.config import loader
from sam2jq.config.flags import sweep_combinations, without_section
from sam2jq.config.run import Config
from sam2jq.errors import UserError
from sam2jq.files import atomic_write
from sam2jq.report.comparison import runs_csv, runs_page, settings_of
from sam2jq.report.run import read_metrics, read_runs

SCHEMA = Config
Jobs = dict[Path, tuple[list[str], Config]]  # {folder: flags, settings}
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--over", action="append", required=True, metavar="KEY=V,V", help="values to try, repeatable")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Runs what is not finished yet of all combinations of `args.over`; writes runs.csv and report.html beside them."""
    folder = sweep_folder(args, flags)
    jobs = find_jobs(args, flags, folder)
    run_jobs(args, jobs)
    runs = read_runs(jobs)
    for name, content in {"runs.csv": runs_csv(runs), "report.html": runs_page(runs)}.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="replace")
    log.info("written     %s\nreport      %s", folder / "runs.csv", folder / "report.html")


def find_jobs(args: argparse.Namespace, flags: list[str], folder: Path) -> Jobs:
    """Every combination, with its settings checked, so that a wrong one is an error before the first run."""
    jobs, combinations = {}, sweep_combinations(args.over, SCHEMA)
    rest = without_section(flags, "output")
    if named := [key for key in combinations[0] if key.partition(".")[0] == "output"]:
        raise UserError(f"--over {named[0]}: a sweep names its runs after their settings: sweep over other keys")
    for values in combinations:
        name = job_name(values)
        if folder / name in jobs:
            raise UserError(f"--over: two runs would be called {name}: give values that differ in more than signs")
        given = values | {"output.root": str(folder), "output.job": name}
        own = [*rest, *(part for key, value in given.items() for part in (f"--{key}", as_flag(value)))]
        jobs[folder / name] = own, quantize.load_config(args.config, own)
        if jobs[folder / name][1].distributed.coordinator:
            raise UserError("distributed.coordinator: a sweep runs in one process, on all of its devices: leave it out")
    return jobs


def run_jobs(args: argparse.Namespace, jobs: Jobs) -> None:
    """Quantizes for each of `jobs` that has no folder yet, and logs the time left."""
    begin, made = time.perf_counter(), 0
    for i, (folder, (own, config)) in enumerate(jobs.items(), 1):
        if folder.exists():
            check_same(folder, config)
            log.info("job %2d/%-4d %s is finished", i, len(jobs), folder.name)
            continue
        quantize.run(argparse.Namespace(command="quantize", config=args.config), own)
        jax.clear_caches()  # the compiled programs of a hundred runs do not fit into memory
        made += 1
        left = (time.perf_counter() - begin) / made * (len(jobs) - i)
        log.info("job %2d/%-4d %s done, about %.0f s left\n", i, len(jobs), folder.name, left)


def as_flag(value: object) -> str:
    """A value of YAML, which may hold dates, as the text of a flag."""
    return json.dumps(value, default=str, ensure_ascii=False)


def job_name(values: dict[str, object]) -> str:
    """The folder name of a job: its settings, as "quant.wgts.dtype=sint4,seed=1"."""
    text = lambda value: value if isinstance(value, str) else as_flag(value)
    return re.sub(r"[^\w.,=+{}\[\]-]+", "_", ",".join(f"{key}={text(value)}" for key, value in values.items()))


def sweep_folder(args: argparse.Namespace, flags: list[str]) -> Path:
    """The folder that holds the runs of a sweep."""
    output = loader.load(args.config, flags).output
    return Path(output.root) / (output.job or f"{Path(args.config or 'quantize').stem}_sweep")


def check_same(folder: Path, config: Config) -> None:
    """Raises UserError unless the finished run in `folder` was made with the settings of `config`."""
    before, now = (settings_of(settings) for settings in (read_metrics(folder)["asked"], loader.to_dict(config)))
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{folder} was made with another {', '.join(changed)}: remove it, or give --output.job a name")

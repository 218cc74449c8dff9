"""`sam2jq report`: the page of one run, or one that compares several."""

import argparse
import logging
from pathlib import Path

from sam2jq.cli.arguments import refuse_flags
from sam2jq.errors import UserError
from sam2jq.files import atomic_write

SCHEMA = None
log = logging.getLogger("sam2jq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", default="report.html", help="the page to write (report.html)")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Writes the page of one run, or of several side by side, to `args.out`."""
    from sam2jq.report.comparison import runs_page
    from sam2jq.report.page import run_page
    from sam2jq.report.run import read_runs

    refuse_flags(args, flags)
    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: give a name that ends in .html")
    runs = read_runs(args.runs)
    page = runs_page(runs) if len(runs) > 1 else run_page(*next(iter(runs.items())))
    with atomic_write(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    log.info("written     %s", args.out)

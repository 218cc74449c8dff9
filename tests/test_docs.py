"""What README.md and docs/ tell users to type is what the program takes; `make docs-check` runs what can be run."""

import re
import subprocess
from pathlib import Path

import pytest

from sam2jq import config
from sam2jq.cli import command_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUBS = "sam2jq() { printf '%s\\x1f' \"$@\"; echo; }; make() { :; }; python() { :; }; ls() { :; };"  # say, don't do
SCHEMAS = {
    "distill": config.DistillConfig,
    "evaluate": config.EvaluateConfig,
    "segment": config.SegmentConfig,
    "track": config.SegmentConfig,
}


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `sam2jq` in the page's shell blocks, loops and variables spelled out."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    shell = ["bash", "-euc", STUBS + "\n".join(blocks)]
    printed = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [line.split("\x1f")[:-1] for line in printed.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        args, flags = command_parser().parse_known_args(command)
        if args.command == "sweep":
            flags = [*flags, *(part for k, v in config.grid(args.over)[0].items() for part in (f"--{k}", str(v)))]
        if args.command in ("quantize", "sweep", *SCHEMAS):
            config.load(getattr(args, "config", None), flags, SCHEMAS.get(args.command, config.Config))
        else:
            assert not flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]

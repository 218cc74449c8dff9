"""What README.md and docs/ tell users to type is what the program takes; `make docs-check` runs what can be run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from sam2jq.cli.main import command_parser
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.run import Config, EvaluateConfig, SegmentConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUBS = "sam2jq() { printf '%s\\x1f' \"$@\"; echo; }; make() { :; }; python() { :; }; ls() { :; };"  # say, don't do
SCHEMAS = {
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "segment": SegmentConfig,
    "track": SegmentConfig,
}


def spelled(lines: str) -> list[list[str]]:
    """The arguments of every `sam2jq` in lines of shell, loops and variables spelled out."""
    shell = ["bash", "-euc", STUBS + lines]
    printed = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [line.split("\x1f")[:-1] for line in printed.splitlines()]


def check(command: list[str]) -> None:
    """An error unless `sam2jq` takes these arguments."""
    args, flags = command_parser().parse_known_args(command)
    if args.command == "sweep":
        flags = [
            *flags,
            *(part for k, v in loader.sweep_combinations(args.over)[0].items() for part in (f"--{k}", str(v))),
        ]
    if args.command in ("quantize", "sweep", *SCHEMAS):
        loader.load(getattr(args, "config", None), flags, SCHEMAS.get(args.command, Config))
    else:
        assert not flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for command in spelled("\n".join(blocks)):
        check(command)


@pytest.mark.parametrize(
    "target", ["quantize", "sweep", "report", "distill", "segment", "track", "evaluate", "inspect", "export"]
)
def test_every_command_of_the_makefile_is_taken(target, monkeypatch):
    monkeypatch.chdir(ROOT)
    dry = ["make", "--dry-run", "--old-file=setup", "SAM2JQ=sam2jq", target]
    alone = {"PATH": os.environ["PATH"]}  # not as a part of the `make test` that runs this, nor with its ARGS
    found = spelled(subprocess.run(dry, capture_output=True, text=True, check=True, cwd=ROOT, env=alone).stdout)
    assert {command[0] for command in found} == {target}
    for command in found:
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]

"""The pages for users: their commands are accepted, their links lead somewhere, their lines are short.

`make docs-check` runs what can be run.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sam2jq
from sam2jq.cli.main import command_parser
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.flags import sweep_combinations
from sam2jq.config.run import Config, EvaluateConfig, SegmentConfig, TrackConfig

ROOT = Path(__file__).parents[1]
GUIDE = re.findall(r"^\d+\. \[.*?\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# prints the arguments of `sam2jq`, and runs nothing
STUBS = "sam2jq() { printf '%s\\x1f' \"$@\"; echo; }; make() { :; }; python() { :; }; source() { :; };"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCHEMAS = {
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "segment": SegmentConfig,
    "track": TrackConfig,
}


pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}"
)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in any of `languages`."""
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def parse_commands(lines: str) -> list[list[str]]:
    """The arguments of every `sam2jq` that lines of shell would run, with loops and variables expanded."""
    lines = re.sub(r"(?<=\s)>+\s*\S+", "", lines)  # a redirection would empty the file that it names
    shell = ["bash", "-euc", STUBS + lines]
    printed = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [line.split("\x1f")[:-1] for line in printed.splitlines()]


def check(command: list[str]) -> None:
    """Fails unless `sam2jq` accepts these arguments."""
    args, flags = command_parser().parse_known_args(command)
    if args.command == "sweep":
        flags = [
            *flags,
            *(part for k, v in sweep_combinations(args.over, Config)[0].items() for part in (f"--{k}", str(v))),
        ]
    if args.command in ("quantize", "sweep", *SCHEMAS):
        loader.load(getattr(args, "config", None), flags, SCHEMAS.get(args.command, Config))
    else:
        assert not flags


@pages
def test_every_command_is_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in parse_commands("\n".join(blocks(page, "sh", "console"))):
        check(command)


@pytest.mark.parametrize(
    "target", ["quantize", "sweep", "report", "distill", "segment", "track", "evaluate", "inspect", "export"]
)
def test_every_command_of_the_makefile_is_accepted(target, monkeypatch):
    monkeypatch.chdir(ROOT)
    dry = ["make", "--dry-run", "--old-file=setup", "SAM2JQ=sam2jq", target]
    alone = {"PATH": os.environ["PATH"]}  # not as a part of the `make test` that runs this, nor with its ARGS
    commands = parse_commands(
        subprocess.run(dry, capture_output=True, text=True, check=True, cwd=ROOT, env=alone).stdout
    )
    assert {command[0] for command in commands} == {target}
    for command in commands:
        check(command)


@pages
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pages
def test_every_path_of_the_project_exists(page):
    named = re.findall(r"`((?:sam2jq|converters|tests|experiments|docs)/[\w./]+)`", page.read_text())
    examples = ("percentile", "output_scaled", "npz")  # files that CONTRIBUTING.md adds
    assert not [path for path in named if not (ROOT / path).exists() and not any(name in path for name in examples)]


@pages
def test_no_line_is_over_120_characters(page):
    lines = enumerate(page.read_text().splitlines(), 1)
    assert not [number for number, line in lines if len(line) > 120]


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(text.splitlines()) <= 120
    assert len(rows) - 2 <= 12  # without the head of the table and its rule


@pages
def test_every_program_compiles(page):
    for code in blocks(page, "python"):
        ast.parse(code)


def test_the_guide_reads_in_order():
    assert sorted([*GUIDE, "README.md"]) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    for before, name, after in zip([None, *GUIDE], GUIDE, [*GUIDE[1:], None]):
        text = (ROOT / "docs" / name).read_text()
        assert text.startswith(f"# {GUIDE.index(name) + 1}. ")
        way = re.findall(r"(previous|next): \[[^]]+\]\((\w+\.md)\)", text)
        expected = [(word, page) for word, page in (("previous", before), ("next", after)) if page]
        assert way == 2 * expected  # at the top and at the end


def test_the_reference_has_every_public_name(tmp_path):
    command = [sys.executable, "docs/reference.py", str(tmp_path)]
    subprocess.run(
        command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    )
    page = (tmp_path / "sam2jq.html").read_text()
    assert not [name for name in sam2jq.__all__ if f'id="{name}"' not in page]


def test_reading_the_commands_of_the_docs_writes_no_file():
    lines = "sam2jq inspect x > written_by_a_test.md\nmake bench >> written_by_a_test.md\n"
    assert parse_commands(lines) == [["inspect", "x"]]
    assert not (ROOT / "written_by_a_test.md").exists()
    assert all(path.read_text().strip() for path in (ROOT / "experiments").glob("*/*.md"))

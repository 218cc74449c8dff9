"""The import rules of the architecture."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# each package may import those after it
ORDER = [
    "cli",
    "api",
    "report",
    "converters",
    "deploy",
    "eval",
    "distillation",
    "ptq",
    "predictors",
    "training",
    "config",
]
ORDER += ["models", "quant", "io", "file_kinds", "data", "files", "tree", "errors"]
FILES = sorted([*(ROOT / "sam2jq").rglob("*.py"), *(ROOT / "converters").rglob("*.py")])


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def package(module: str) -> str | None:
    """ "sam2jq.models.layers" -> "models"; None for other packages, `sam2jq/__init__.py` and `sam2jq/api.py`, which tie
    the packages together: `from_pretrained` imports the API when it is called."""
    names = module.split(".")
    if names[0] == "converters":
        return "converters"
    if names[0] != "sam2jq" or len(names) == 1 or names[1] in ("__main__", "__init__", "api"):
        return None
    return names[1]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = package(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for other in filter(None, map(package, imported(path))):
        if own is not None and other != own:
            assert ORDER.index(other) > ORDER.index(own), f"{own} imports {other}"


def loaded(path: Path) -> set[str]:
    """The modules of the project that a file imports when it is imported: not those inside functions or for types."""
    statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def test_no_two_files_import_each_other():
    graph = {name: loaded(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 300
    TopologicalSorter(graph).prepare()  # raises CycleError with the files of a cycle


def test_no_file_is_longer_than_350_lines():
    assert {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 350} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_in_converters(path):
    if "converters" not in path.parts:
        assert "torch" not in {module.split(".")[0] for module in imported(path)}


def test_sam2jq_works_where_torch_cannot_be_imported(tmp_path):
    program = """
import sys
sys.modules["torch"] = None
import sam2jq, sam2jq.cli.main, jax
model = sam2jq.build("nano")
sam2jq.save(sys.argv[1] + "/p.safetensors", model, sam2jq.init_params(model, 0))
assert sam2jq.cli.main.main(["inspect", sys.argv[1] + "/p.safetensors"]) == 0
assert sam2jq.cli.main.main(["inspect", sys.argv[1] + "/p.pt"]) == 2
"""
    (tmp_path / "p.pt").write_text("")
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "sam2.1_hiera_t.yaml" in done.stdout
    assert "pip install 'sam2jq[torch]'" in done.stderr

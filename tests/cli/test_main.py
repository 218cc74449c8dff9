"""The parser, the table of commands, and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sam2jq.cli import main as cli
from sam2jq.cli.main import COMMANDS, command_module, command_parser, main
from sam2jq.config import loader
from sam2jq.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def raises(monkeypatch):
    """raises(error): `inspect x` then ends with it."""
    return lambda error: monkeypatch.setattr(command_module("inspect"), "run", lambda *_: throw(error))


def throw(error: BaseException):
    raise error


@pytest.mark.parametrize("error", [UserError("wrong\n  so"), FileNotFoundError("wrong so")])
def test_an_error_of_the_user_is_one_line_and_code_2(raises, capsys, error):
    raises(error)
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "sam2jq: error: wrong so\n"


@pytest.mark.parametrize("arguments", [["-v", "inspect", "x"], ["inspect", "x", "-v"]])
def test_verbose_shows_where_an_error_of_the_user_came_from(raises, capsys, arguments):
    raises(UserError("wrong"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("sam2jq: error: wrong\n")


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyError("layer"), ModuleNotFoundError("x", name="flax")])
def test_any_other_error_is_a_program_fault_with_its_traceback_and_code_1(raises, capsys, error):
    raises(error)
    assert main(["inspect", "x"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    last = printed.splitlines()[-1]
    assert last.startswith(f"sam2jq: program fault: {type(error).__name__}: ")
    assert last.endswith("please report it with the traceback above")


def test_an_interrupt_is_one_line_and_code_130(raises, capsys):
    raises(KeyboardInterrupt())
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "sam2jq: interrupted\n"


def test_a_missing_torch_is_one_line_that_says_how_to_install_it(raises, capsys):
    raises(ModuleNotFoundError("no", name="torch"))
    assert main(["inspect", "x"]) == 2
    assert "this command needs torch: pip install 'sam2jq[torch]'" in capsys.readouterr().err


def test_version_and_help_load_no_command():
    """So that they start fast."""
    program = """
import sys
from sam2jq.cli.main import main
try:
    main(sys.argv[1:])
finally:
    loaded = {name for name in sys.modules if name.startswith(("sam2jq.cli.", "sam2jq.report", "matplotlib", "torch"))}
    assert loaded == {"sam2jq.cli.main"}, loaded
"""
    for flag, text in (("--version", "sam2jq "), ("--help", "quantize")):
        done = subprocess.run(
            [sys.executable, "-c", program, flag], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert text in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_every_setting(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    schema = command_module(name).SCHEMA
    assert all(line in printed for line in (loader.keys(schema) if schema else ()))


def test_only_the_named_command_gets_its_arguments(monkeypatch):
    """Else `sam2jq inspect` would wait for the imports of all."""
    loaded = []
    monkeypatch.setattr(cli, "command_module", lambda name: loaded.append(name) or command_module(name))
    assert command_parser(["inspect", "x"]).parse_args(["inspect", "x"]).package == "x"
    assert loaded == ["inspect"]

"""The parser, the table of commands, and exit codes."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam2jq.cli import main as cli
from sam2jq.cli.failures import CLOSED_PIPE
from sam2jq.cli.main import COMMANDS, command_module, command_parser, main
from sam2jq.config import loader
from sam2jq.errors import UserError

from .conftest import failure, run

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
@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_any_other_error_is_a_program_fault_in_one_line_and_code_1(raises, capsys, error, verbose):
    raises(error)
    assert main(["inspect", "x", *verbose]) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"sam2jq: program fault: {type(error).__name__}: .* \(test_main.py:\d+\); please report.*", last
    )
    assert trace[:1] == (["Traceback (most recent call last):"] if verbose else [])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating 9 GB")])
def test_no_memory_is_an_error_of_the_user(raises, capsys, error):
    raises(error)
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err.startswith("sam2jq: error: out of memory: use a smaller batch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "required: package; see sam2jq inspect --help"),
        (["inspekt", "x"], "invalid choice: 'inspekt'"),
        ([], "required: COMMAND"),
        (["export", "--package", "x", "--to", "gguf", "--out", "y"], "invalid choice: 'gguf'"),
        (["segment", "~nobody.known/x.png"], "~nobody.known/x.png: ~nobody.known is no user's folder; write ./~nobody"),
        (["segment", "x", "--box", "1,2,3"], "argument --box: '1,2,3' is not 4 finite numbers separated by commas"),
        (["segment", "x", "--points", "1,nan"], "'1,nan' is not 2 finite numbers"),
        (["segment", "x", "--points", "1,left"], "'1,left' is not 2 finite numbers"),
        (["segment", "x", "--points", "-1e999,1"], "is not 2 finite numbers"),
        (["segment", "x", "--points", "-inf,3"], "argument --points: '-inf,3' is not 2 finite numbers"),
        (["segment", "x", "--points", "-NaN,3"], "argument --points: '-NaN,3' is not 2 finite numbers"),
        (["segment", "x", "--mask", "y.png"], "--mask: a mask prompts an object of a clip, for sam2jq track; give"),
        (["segment", "x", "--points", "1,1", "--labels", "5"], "--labels 5: allowed are -1, 0, 1, 2, 3"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(capsys, arguments, message):
    assert message in failure(capsys, *arguments)


NUMBERS = {
    "points": (["-5,10"], [[-5.0, 10.0]]),
    "points of several": (["3,4", "-5.5,-1e1", "-.5,0"], [[3.0, 4.0], [-5.5, -10.0], [-0.5, 0.0]]),
    "box": (["-5,-6,10,20"], [-5.0, -6.0, 10.0, 20.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_begin_with_a_minus(monkeypatch, name):
    given, expected = NUMBERS[name]
    flag = name.split()[0]
    seen = []
    monkeypatch.setattr(command_module("segment"), "run", lambda *args: seen.append(args))
    assert main(["segment", "x.jpg", f"--{flag}", *given, "--frames", "-3"]) == 0
    assert main(["segment", "x.jpg", f"--{flag}={given[0]}"]) == 0
    (args, flags), (joined, _) = seen
    assert getattr(args, flag) == expected
    assert (args.image, flags) == ("x.jpg", ["--frames", "-3"])
    assert getattr(joined, flag) == (expected[:1] if flag == "points" else expected)


def test_settings_of_jax_for_other_programs_do_not_count(raises, monkeypatch, capsys):
    raises(UserError("wrong"))
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "strict")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION", raising=False)
    failure(capsys, "inspect", "x")
    assert (os.environ["JAX_NUMPY_DTYPE_PROMOTION"], os.environ["JAX_ENABLE_X64"]) == ("standard", "0")
    assert "JAX_NUMPY_RANK_PROMOTION" not in os.environ


ENVIRONMENTS = {
    "JAX_PLATFORMS=cuda": "jax cannot start with JAX_PLATFORMS=cuda",
    "JAX_PLATFORMS=nonsense": "jax cannot start with JAX_PLATFORMS=nonsense",
    "JAX_DEBUG_NANS=maybe": "jax cannot be imported: invalid truth value 'maybe'",
}


@pytest.mark.parametrize("setting", ENVIRONMENTS)
def test_a_jax_that_cannot_start_is_one_line(setting):
    if setting.endswith("cuda") and shutil.which("nvidia-smi"):
        pytest.skip("jax may find a GPU here")
    name, value = setting.split("=")
    done = run("segment", "scenes:0/0000", "--points", "7,6", "--model.name", "nano", env=os.environ | {name: value})
    assert done.stderr.startswith(f"sam2jq: error: {ENVIRONMENTS[setting]}")
    assert (done.stderr.count("\n"), done.stdout, done.returncode) == (1, "", 2)


def test_a_closed_pipe_ends_a_command_that_logs_quietly(closed_pipe, monkeypatch, capfd):
    monkeypatch.setattr(command_module("inspect"), "run", lambda *_: logging.getLogger("sam2jq").info("x" * 70_000))
    with open(closed_pipe, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect", "x"]) == CLOSED_PIPE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_the_output_cannot_hold_are_printed_as_escapes(monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(cli, "run_command", lambda argv: print(argv[0]) or 0)
    assert main(["\u5199\udc80.png"]) == 0
    assert output.buffer.getvalue() == b"\\u5199\\udc80.png\n"


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
    assert loaded == {"sam2jq.cli.main", "sam2jq.cli.failures"}, loaded
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

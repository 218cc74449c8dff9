"""The `sam2jq` command: its parser, the table of commands, and exit codes."""

import argparse
import gc
import importlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from sam2jq import __version__
from sam2jq.cli.failures import CLOSED_PIPE, discard_output, explain, raising
from sam2jq.errors import UserError
from sam2jq.files import home

# {name: help}; the file cli/<name>.py has SCHEMA (a settings dataclass or None), add_arguments(parser) and
# run(args, flags). It is imported when the command is called, so that `sam2jq --help` starts fast.
COMMANDS = {
    "quantize": "quantize a checkpoint and measure the loss of accuracy",
    "distill": "train a quantized student to match a teacher while its bits are lowered",
    "segment": "segment an image from clicks or boxes, or everything in it",
    "track": "track objects through a video",
    "evaluate": "measure mIoU on images or J&F on videos",
    "export": "convert a package to another format",
    "report": "write the report page of a finished run, or one that compares several runs",
    "sweep": "quantize with every combination of settings, and compare the runs",
    "inspect": "print the layers and sizes of a package",
}
# jax's defaults, in place of what a shell exports for other programs: with other values this program's code is refused
JAX_DEFAULTS = {
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
}
NEGATIVE = re.compile(r"-(?:[\d.]|inf|nan)[-+\d.,a-zE]*", re.IGNORECASE)  # numbers separated by commas
log = logging.getLogger("sam2jq")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: it ended well; 2: an error that the user can mend; 1: a fault of the program; both are printed in one line, and
    with -v the traceback before it. 130: interrupted. 141: nobody reads the output any more, which prints nothing.
    """
    print_every_character()
    # Tracing makes millions of objects that stay: with Python's own threshold of 700 new ones a tenth of a short run
    # goes into searching them for cycles
    gc.set_threshold(100_000)
    try:
        try:
            return run_command(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:  # None: closed by the shell
                sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return CLOSED_PIPE


def print_every_character() -> None:
    """Makes stdout write escapes such as \\u5199 for characters that its encoding lacks, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(argv: list[str]) -> int:
    """Runs one command; prints the error that ends it, except of a closed pipe, which is raised."""
    verbose = not {"-v", "--verbose"}.isdisjoint(argv)
    os.environ.update({name: value for name, value in JAX_DEFAULTS.items() if name in os.environ})
    try:
        argv = [home(argument) for argument in argv]
        args, flags = command_parser(argv).parse_known_args(protect_numbers(argv))
        with logged_to_stdout(logging.DEBUG if args.verbose else logging.INFO):
            command_module(args.command).run(args, unprotect_numbers(flags))
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # the outermost handler: what is not understood is a program fault
        code, message = explain(error)
        if verbose:
            traceback.print_exc()
        print(f"sam2jq: {message}", file=sys.stderr)
        return code
    return 0


@contextmanager
def logged_to_stdout(level: int) -> Iterator[None]:
    """Prints what the project logs from `level` on, and the warnings of all others, during the block."""
    handler = raising(logging.StreamHandler(sys.stdout))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    log.setLevel(level)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def protect_numbers(argv: list[str]) -> list[str]:
    """`argv` with a space before each argument such as "-5,10", which argparse takes for an option without it."""
    return [f" {part}" if NEGATIVE.fullmatch(part) else part for part in argv]


def unprotect_numbers(argv: list[str]) -> list[str]:
    """`argv` before `protect_numbers`."""
    return [part[1:] if part.startswith(" ") and NEGATIVE.fullmatch(part[1:]) else part for part in argv]


class Once(argparse.Action):
    """Stores a flag's value. A second value is an error: argparse would forget the first without a word."""

    given = False

    def __call__(self, parser, namespace, values, option_string=None):
        """Raises ArgumentError if the flag was given before."""
        if self.given:
            raise argparse.ArgumentError(self, "given twice: give it once, with all of its values")
        self.given = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserError, as those of the commands, and whose flags with a value are given once."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register("action", None, Once)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def command_parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; settings such as --quant.calib.path are left over, for `config.loader.load`.

    Only the arguments of commands that are named in `argv` are added; those of all commands if it is None.
    """
    parser = Parser(prog="sam2jq", description="Quantize SAM 2 checkpoints, in JAX.")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the traceback of an error, too")
    parser.add_argument("--version", action="version", version=f"sam2jq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False, formatter_class=raw
        )
        command.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if argv is None or name in argv:
            module = command_module(name)
            module.add_arguments(command)
            command.epilog = settings_help(module.SCHEMA)
    return parser


def command_module(name: str) -> ModuleType:
    return importlib.import_module(f"sam2jq.cli.{name}")


def settings_help(schema: type | None) -> str | None:
    """The settings of a command with their defaults and comments, one a line."""
    if schema is None:
        return None
    from sam2jq.config import loader

    return "settings and their defaults:\n  " + "\n  ".join(loader.keys(schema))

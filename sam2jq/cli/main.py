"""The `sam2jq` command: its parser, the table of commands, and exit codes."""

import argparse
import importlib
import logging
import sys
import traceback
from types import ModuleType

from sam2jq import __version__
from sam2jq.errors import UserError
from sam2jq.files import home

# {name: help}; the file cli/<name>.py has SCHEMA (a settings dataclass or None), add_arguments(parser) and
# run(args, flags). It is imported when the command is called, so that `sam2jq --help` starts fast.
COMMANDS = {
    "quantize": "quantize a checkpoint and measure the loss of accuracy",
    "distill": "train a quantized student to match a teacher while its bits are lowered",
    "segment": "segment an image from clicks or a box",
    "track": "track an object through a video",
    "evaluate": "measure mIoU on images or J&F on videos",
    "export": "convert a package to another format",
    "report": "write the report page of a finished run, or one that compares several runs",
    "sweep": "quantize with every combination of settings, and compare the runs",
    "inspect": "print the layers and sizes of a package",
}
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
log = logging.getLogger("sam2jq")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: it ended well; 2: an error that the user can mend, printed in one line; 130: interrupted; 1: a fault of the
    program, with a traceback.
    """
    argv = [home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    args, flags = command_parser(argv).parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    try:
        command_module(args.command).run(args, flags)
    except (UserError, OSError) as error:
        return end(BAD_INPUT, f"error: {one_line(error)}", trace=args.verbose)
    except KeyboardInterrupt:
        return end(INTERRUPTED, "interrupted", trace=args.verbose)
    except Exception as error:  # the outermost handler: nothing is hidden, the traceback is printed
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            message = "error: this command needs torch: pip install 'sam2jq[torch]'"
            return end(BAD_INPUT, message, trace=args.verbose)
        message = f"program fault: {type(error).__name__}: {one_line(error)}; please report it with the traceback above"
        return end(FAILED, message, trace=True)
    return 0


def command_parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; settings such as --quant.calib.path are left over, for `config.loader.load`.

    Only the arguments of commands that are named in `argv` are added; those of all commands if it is None.
    """
    parser = argparse.ArgumentParser(prog="sam2jq", description="Quantize SAM 2 checkpoints, in JAX.")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the traceback of an error")
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


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def end(code: int, message: str, trace: bool) -> int:
    """Prints `message`, after the traceback if `trace` is true, to stderr, and returns `code`."""
    if trace:
        traceback.print_exc()
    print(f"sam2jq: {message}", file=sys.stderr)
    return code

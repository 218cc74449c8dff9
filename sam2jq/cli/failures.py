"""How the errors that end a command are printed: exit codes, and one line for each."""

import logging
import os
import sys
import traceback
from typing import TypeVar

from sam2jq.errors import UserError

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141  # exit codes; a shell gives the last two to such signals
Handler = TypeVar("Handler", bound=logging.Handler)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, line to print) of the error that ended a command."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case UserError() | OSError():
            return BAD_INPUT, f"error: {one_line(error)}"
        case ModuleNotFoundError(name="torch" | "onnx" as name):
            return BAD_INPUT, f"error: this command needs {name}: pip install 'sam2jq[{name}]'"
    if is_out_of_memory(error):
        hint = "use a smaller batch or image size, or another device"
        return BAD_INPUT, f"error: out of memory: {hint} ({one_line(error)[:200]})"
    if problem := jax_start_problem(error):
        return BAD_INPUT, f"error: {problem}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(at.filename)}:{at.lineno}"
    return FAILED, (f"program fault: {type(error).__name__}: {one_line(error)} ({where}); please report it with the "
                    "traceback that -v prints")  # fmt: skip


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or, in a RuntimeError of jax, of a device ran out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def jax_start_problem(error: BaseException) -> str | None:
    """Why jax cannot start in this environment, or None if it can. error: what ended the command.

    It is imported, by a ValueError if a variable such as JAX_ENABLE_X64 has a wrong value, and starts where the first
    array is made, anywhere in a command: by a RuntimeError, or an AssertionError if the platform's plugin is missing.
    So it is started here once more.
    """
    try:
        import jax
    except Exception:  # the second import ends by another error, which says less
        return f"jax cannot be imported: {one_line(error)}"
    try:
        jax.devices()
    except Exception as problem:
        reason = one_line(problem) or "there is no such device, or its plugin is not installed"
        asked = f" with JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if "JAX_PLATFORMS" in os.environ else ""
        return f"jax cannot start{asked}: {reason}; JAX_PLATFORMS=cpu works everywhere"
    return None


def raising(handler: Handler) -> Handler:
    """`handler`, changed to raise errors of writing, such as of a closed pipe or a full disk, which logging prints."""

    def raise_again(record: logging.LogRecord) -> None:
        raise

    handler.handleError = raise_again
    return handler


def discard_output() -> None:
    """Sends what is still written to stdout nowhere: Python flushes it at its end, and would print the error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Errors that a user can mend. Every other exception is a fault of the program."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Input that cannot be used. The message is one line that names the thing and the way out."""


class ConfigError(UserError):
    """A setting that cannot be used. The message starts with the setting's key, relative to the section at hand."""


@contextmanager
def section(path: str) -> Iterator[None]:
    """A block in which a `ConfigError` gets the key of the section at `path` put before its message."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from error

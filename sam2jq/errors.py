"""Errors that a user can mend. Every other exception is a fault of the program."""

import difflib
from collections.abc import Iterable, Iterator
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


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ConfigError unless `value`, the setting called `key`, is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{key} {value!r}: allowed are {', '.join(allowed)}{suggest(value, allowed)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message, "; did you mean ...?", with the closest of `known`; "" if none is close."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.endswith(f".{name}")][:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def few(names: Iterable[str], shown: int = 10, separator: str = ", ") -> str:
    """ "a, b, c" for an error message; after `shown` names only their count: "a, b and 7 more"; "" for no names."""
    names = list(map(str, names))
    rest = len(names) - shown
    return separator.join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")

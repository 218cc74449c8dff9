"""A check of the types of a settings class's fields, before its other checks compare them."""

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from sam2jq.errors import ConfigError

type_hints = cache(get_type_hints)
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def check_types(config) -> None:
    """Raises ConfigError that names the first field of a dataclass whose value is not of its type, or is NaN."""
    for field in fields(config):
        value, hint = getattr(config, field.name), type_hints(type(config))[field.name]
        if not has_type(value, hint) or (isinstance(value, float) and math.isnan(value)):
            shown = repr(value) if len(repr(value)) < 100 else type(value).__name__
            raise ConfigError(f"{field.name} must be {describe(hint)}, got {shown}")


def has_type(value: object, hint) -> bool:
    """Whether `value` is of the type `hint`. Tuples are lists, whole numbers are numbers, and true is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(has_type(value, part) for part in inner)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(has_type(part, inner[0]) for part in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, Mapping) else None
        return pairs is not None and all(has_type(k, inner[0]) and has_type(v, inner[1]) for k, v in pairs)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint) -> str:
    """A type in words: "a whole number or null"."""
    parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return " or ".join(WORDS.get(part) or (str(part) if get_origin(part) else f"a {part.__name__}") for part in parts)

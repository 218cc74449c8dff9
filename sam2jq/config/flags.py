"""Settings as flags, and the values that a sweep tries, read by the types of their fields."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from types import UnionType
from typing import NamedTuple, get_args, get_origin, get_type_hints

from sam2jq.config.strict_yaml import parse_yaml
from sam2jq.errors import UserError

QUOTED = r"""(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")"""
ITEM = re.compile(rf"\s*{QUOTED}\s*(?=,|$)|[^,]+", re.DOTALL)  # of a list of texts


class Flag(NamedTuple):
    """One setting on the command line. name: as it was written; value: None if there is none; parts: its arguments."""

    key: str
    name: str
    value: str | None
    parts: list[str]


def section_type(kind) -> type | None:
    """The dataclass in a type such as GptqConfig or GptqConfig | None; None if there is none."""
    return next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)


def field_type(schema: type, key: str) -> object:
    """The type of the field `key`, such as "quant.wgts.dtype", of a schema; None if there is no such field."""
    *sections, last = key.split(".")
    for section in sections:
        schema = section_type(get_type_hints(schema).get(section))
        if schema is None:
            return None
    return get_type_hints(schema).get(last)


def is_text(hint: object) -> bool:
    """Whether a type is str or, for example, str | None."""
    return str in (hint, *get_args(hint)) and get_origin(hint) in (None, UnionType)


def parse_flags(flags: list[str], schema: type) -> dict[str, object]:
    """{"model.name": "tiny", "seed": 1} of ["--model.name", "tiny", "--seed=1"]; a flag without a value is true.

    Raises UserError if a setting is given twice, of which one would be lost.
    """
    parsed = {}
    for flag in split_flags(flags):
        hint = field_type(schema, flag.key)
        if flag.key in parsed:
            raise UserError(f"{flag.name} is given twice: give --{flag.key} once")
        if flag.value is None and is_text(hint):
            raise UserError(f"{flag.name} has no value: write {flag.name} VALUE")
        value = "true" if flag.value is None else flag.value
        parsed[flag.key] = parse_value(value, hint, f"{flag.name} {value!r}")
    for section, key in itertools.permutations(parsed, 2):
        if key.startswith(f"{section}.") and holds(parsed[section], key.removeprefix(f"{section}.")):
            raise UserError(f"--{key} is given twice, also in --{section}: remove one")
    return parsed


def split_flags(flags: list[str]) -> Iterator[Flag]:
    """Yields each setting in ["--model.name", "tiny", "--seed=1", "--save-model"]."""
    rest = list(flags)
    while rest:
        parts = [rest.pop(0)]
        name, equals, value = parts[0].partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {name!r}: settings are given as --key value")
        if not equals and rest and not rest[0].startswith("--"):
            parts.append(value := rest.pop(0))
        given = equals or len(parts) == 2
        yield Flag(name[2:].replace("-", "_"), name, value if given else None, parts)


def without_section(flags: list[str], section: str) -> list[str]:
    """`flags` without the settings of one section."""
    return [part for flag in split_flags(flags) if flag.key.partition(".")[0] != section for part in flag.parts]


def holds(settings: object, key: str) -> bool:
    """Whether nested dicts have the dotted `key`."""
    first, _, rest = key.partition(".")
    return isinstance(settings, dict) and first in settings and (not rest or holds(settings[first], rest))


def parse_value(text: str, hint: object, name: str) -> object:
    """The value of a field of type `hint` that `text` describes; `name` begins an error.

    Text is taken as it is, but null is no text where None is allowed, and quotes around it are YAML's. Other values
    are YAML.
    """
    if not is_text(hint) or re.fullmatch(QUOTED, text, re.DOTALL):
        return parse_yaml(text, name)
    return None if text == "null" and hint is not str else text


def sweep_combinations(overs: list[str], schema: type) -> list[dict[str, object]]:
    """Every combination of ["quant.wgts.dtype=sint8,sint4", "seed=1,2"] as {key: value}."""
    axes = {}
    for over in overs:
        key, _, values = over.partition("=")
        key = key.replace("-", "_")
        axes[key] = parse_list(values, field_type(schema, key), f"--over {over}: the list of values")
        if not (key and axes[key]):
            raise UserError(f"--over {over}: write key=value,value such as quant.wgts.dtype=sint8,sint4")
    if len(axes) < len(overs):
        raise UserError(f"--over {' --over '.join(overs)}: give all values of a key in one --over")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def parse_list(values: str, hint: object, name: str) -> list:
    """The values of a field of type `hint` in a list such as "sint8,sint4"; [] if one of them is empty."""
    if not is_text(hint):
        return parse_yaml(f"[{values}]", name)
    texts = [item.strip() for item in ITEM.findall(values)]
    complete = all(texts) and ",".join(ITEM.findall(values)) == values
    return [parse_value(text, hint, name) for text in texts] if complete else []

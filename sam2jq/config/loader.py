"""Settings from YAML and flags, checked before any model is loaded."""

import codecs
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import draccus
from draccus.wrappers.docstring import get_attribute_docstring

from sam2jq.config.flags import is_text, parse_flags, section_type
from sam2jq.config.run import Config
from sam2jq.config.strict_yaml import parse_yaml
from sam2jq.errors import ConfigError, UserError, suggest
from sam2jq.files import home
from sam2jq.quant.field_types import describe

RENAMED = {"settle_epochs": "cooldown_epochs"}  # keys of older versions


def keys(schema: type, prefix: str = "") -> list[str]:
    """The help lines of a schema: every flag with its default, and below it the field's comment."""
    lines = []
    for field in dataclasses.fields(schema):
        if kind := section_type(get_type_hints(schema)[field.name]):
            lines += keys(kind, f"{prefix}{field.name}.")
        else:
            has_factory = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if has_factory else field.default
            lines += [f"--{prefix}{field.name} {as_yaml(default)}", f"      {comment(schema, field.name)}"]
    return lines


def as_yaml(value: object) -> str:
    """A default as it is written in YAML and after a flag, on one line."""
    return (value or "''") if isinstance(value, str) else json.dumps(value)


def comment(schema: type, name: str) -> str:
    """The comment beside or above a field, in its class or the base class that defines it; "" without one."""
    for cls in schema.__mro__:
        if name in inspect.get_annotations(cls):
            found = get_attribute_docstring(cls, name)
            return " ".join((found.comment_inline or found.comment_above).split())
    return ""


def load(path: str | None, flags: list[str], schema: type = Config):
    """The `schema` in a YAML file, overridden by flags such as ["--model.name", "tiny", "--seed=1"].

    Raises UserError or FileNotFoundError with one line that names the key and what is allowed.
    """
    settings = {} if path is None else read_yaml(path, schema)
    given = parse_flags(flags, schema)
    for key, value in sorted(given.items(), key=lambda item: item[0].count(".")):  # sections before keys in them
        *sections, last = key.split(".")
        node = settings
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"--{key}: {section} is not a section")
        node[last] = value
    check_keys(settings, schema)
    try:
        return decode(settings, schema)
    except ConfigError as error:
        if path is None or any(str(error).startswith(key) for key in given):
            raise
        raise ConfigError(f"{path}: {error}") from error


def decode(settings: dict, schema: type, path: str = ""):
    """The `schema` with the values of nested dicts; missing sections get their defaults.

    Raises ConfigError with the full key: checks name a key of their own section, and `path` is put before it.
    """
    values = {}
    for field in dataclasses.fields(schema):
        hint = get_type_hints(schema)[field.name]
        kind, value = section_type(hint), settings.get(field.name)
        if kind and (isinstance(value, dict) or (field.name not in settings and kind is hint)):
            values[field.name] = decode(value or {}, kind, f"{path}{field.name}.")
        elif field.name in settings:
            values[field.name] = decode_value(value, hint, f"{path}{field.name}")
    try:
        return schema(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from error


def decode_value(value: object, hint: object, key: str) -> object:
    """`value` as the type `hint`. Raises ConfigError that names `key`."""
    if value is None and hint is str:
        return ""  # as in --model.checkpoint ""
    if isinstance(value, str):
        try:
            value = home(value)
        except UserError as error:
            raise ConfigError(f"{key}: {error}") from error
    if value is None and type(None) not in get_args(hint):
        raise ConfigError(f"{key}: null is not allowed: give a value, or leave the key out for its default")
    if get_origin(hint) is dict and not isinstance(value, dict):
        raise ConfigError(f"{key} must be a mapping such as {{a: 4}}, got {value}")
    if isinstance(value, dict) and hint in (int, float, bool):
        raise ConfigError(f"{key} must be {describe(hint)}, not a section with {', '.join(map(str, value))}")
    if isinstance(value, dict | list) and is_text(hint):
        raise ConfigError(f"{key} must be text, got {value}: quote it if it holds a colon, a comma or brackets")
    for part, kind in scalars(value, hint):
        misread = type(part) in (bool, bytes, datetime) and type(part) not in (kind, *get_args(kind))
        if misread or (is_text(kind) and isinstance(part, float) and not math.isfinite(part)):
            raise ConfigError(f"{key} must be {describe(hint)}, got {part}: quote it if it is text")
    try:
        return draccus.decode(hint, value)
    except Exception as error:  # draccus raises plain Exceptions too
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def scalars(value: object, hint: object) -> Iterator[tuple[object, object]]:
    """Yields (value, its type) of `value`, or of everything in it if it is a list or a mapping of the type `hint`."""
    if isinstance(value, dict) and get_origin(hint) is dict:
        for pair in value.items():
            for part, kind in zip(pair, get_args(hint)):
                yield from scalars(part, kind)
    elif isinstance(value, list) and get_origin(hint) is list:
        for part in value:
            yield from scalars(part, get_args(hint)[0])
    else:
        yield value, hint


def read_yaml(path: str, schema: type | None = None) -> dict:
    """The mapping in a YAML file. Raises UserError, which names the file, if it is none or has keys not in `schema`."""
    if not Path(path).is_file():
        near = suggest(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")])
        raise FileNotFoundError(f"no config at {path}{near}")
    settings = parse_yaml(read_text(path), path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: it must be a mapping such as model: {{name: tiny}}")
    if schema is not None:
        try:
            check_keys(settings, schema)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return settings


def read_text(path: str) -> str:
    """The text of a file in UTF-8. Raises UserError, which names the file, if it has another encoding."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise UserError(f"{path} is in UTF-16: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not in UTF-8 (line {line}): save it as UTF-8") from error


def check_keys(settings: dict, schema: type, prefix: str = "") -> None:
    """Raises UserError that names the first key that `schema` does not have, with the closest one that it has."""
    known = get_type_hints(schema)
    for key, value in settings.items():
        if key not in known:
            if RENAMED.get(key) in known:
                raise UserError(f"unknown key {prefix}{key}: it is called {RENAMED[key]} now")
            allowed = f"{prefix or 'top level '}allows {', '.join(known)}"
            raise UserError(f"unknown key {prefix}{key}{suggest(str(key), known)}; {allowed}")
        kind = section_type(known[key])
        if kind and not (value is None and kind is not known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} must be a section such as {key}: {{...}}, got {value!r}")
            check_keys(value, kind, f"{prefix}{key}.")


def to_dict(config) -> dict:
    """`config` as nested dicts of plain values."""
    return draccus.encode(config)


def dump(config) -> str:
    """The YAML text that `load` reads back as `config`."""
    return draccus.dump(config)

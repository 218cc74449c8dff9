"""Settings from YAML and flags, checked before any model is loaded."""

import dataclasses
import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

from sam2jq.config.run import Config
from sam2jq.errors import UserError
from sam2jq.tree import suggest


def keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema with its default: what can follow `--`."""
    found = []
    for entry in dataclasses.fields(schema):
        if kind := section(get_type_hints(schema)[entry.name]):
            found += keys(kind, f"{prefix}{entry.name}.")
        else:
            made = entry.default_factory is not dataclasses.MISSING
            found.append(f"--{prefix}{entry.name} {entry.default_factory() if made else entry.default!r}")
    return found


def section(kind) -> type | None:
    """The dataclass in a type such as GptqConfig or GptqConfig | None; None where there is none."""
    return next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)


def load(path: str | None, flags: list[str], schema: type = Config):
    """The `schema` in a YAML file, overridden by flags such as ["--model.name", "tiny", "--seed=1"].

    ValueError, FileNotFoundError: one line naming the key and what is allowed.
    """
    settings = {} if path is None else read_yaml(path)
    for key, value in parse_flags(flags).items():
        *sections, last = key.split(".")
        node = settings
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"--{key}: {section} is not a section")
        node[last] = value
    check_keys(settings, schema)
    try:
        return draccus.decode(schema, settings)
    except DraccusException as error:
        within, last = str(error).startswith("`ptq`"), error
        while isinstance(last.__cause__, DraccusException):  # of a section that may be null, the first says nothing
            last = last.__cause__
        unmet = str(last).startswith("Couldn't instantiate")  # a __post_init__ above said why
        why = " ".join(str(last.__cause__ if unmet else last).split())
        raise UserError(rename_quant_to_ptq(why) if within else why) from error


def rename_quant_to_ptq(message: str) -> str:
    """An error of quantize's section `quant`, for the same that stands under `ptq`."""
    return message.replace("quant.", "ptq.")


def sweep_combinations(overs: list[str]) -> list[dict[str, object]]:
    """Every combination of ["quant.wgts.dtype=sint8,sint4", "seed=1,2"] as {key: value}; values are YAML."""
    axes = {}
    for over in overs:
        key, equals, values = over.partition("=")
        try:
            axes[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise UserError(f"--over {over}: the values are not YAML, with commas between") from error
        if not (key and equals and axes[key]):
            raise UserError(f"--over {over}: write key=value,value such as quant.wgts.dtype=sint8,sint4")
    if len(axes) < len(overs):
        raise UserError(f"--over {' --over '.join(overs)}: give all values of a key in one --over")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        near = suggest(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")])
        raise FileNotFoundError(f"no config at {path}{near}")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: it must be a mapping such as model: {{name: tiny}}")
    return settings


def parse_flags(flags: list[str]) -> dict[str, object]:
    """{"model.name": "tiny", "seed": 1} of ["--model.name", "tiny", "--seed=1"]; a flag without a value is true."""
    parsed, rest = {}, list(flags)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}: settings are given as --key value")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            parsed[flag[2:].replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{flag} {value!r} is not a YAML value") from error
    return parsed


def check_keys(settings: dict, schema: type, prefix: str = "") -> None:
    """ValueError naming the first key that `schema` does not have, with the one that may have been meant."""
    known = get_type_hints(schema)
    for key, value in settings.items():
        if key not in known:
            allowed = f"{prefix or 'top level '}allows {', '.join(known)}"
            raise UserError(f"unknown key {prefix}{key}{suggest(str(key), known)}; {allowed}")
        kind = section(known[key])
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

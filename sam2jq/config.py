"""Every setting of a run: frozen dataclasses, read from YAML and flags, checked before any model is loaded."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

from sam2jq.tree import suggest

DTYPE = re.compile(r"([su])int(\d+)")
DEVICES = ("auto", "cpu", "gpu", "cuda", "tpu")
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """checkpoint: a file, a Hugging Face Hub id, random:<seed>, or demo, the trained nano that comes with the package
    and is nano's default; dtype: of the activations while measuring."""

    name: str = "tiny"
    version: str = "2.1"
    checkpoint: str = ""
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        if not self.checkpoint and self.name == "nano":
            object.__setattr__(self, "checkpoint", "demo")
        if not self.checkpoint:
            raise ValueError("model.checkpoint is not set: give a file, a Hub id, or random:0; only nano has a default")
        one_of("model.device", self.device, DEVICES)
        one_of("model.dtype", self.dtype, FLOATS)


@dataclass(frozen=True)
class CalibConfig:
    """path: a folder of images (plain, COCO, SA-1B or SA-V), one image, or scenes:<seed>; image_size in pixels,
    the model's own when null."""

    path: str = ""
    num_samples: int = 128
    batch_size: int = 1
    image_size: int | None = None

    def __post_init__(self):
        if not self.path:
            raise ValueError("quant.calib.path is not set: give a folder of images, or scenes:0 for drawn ones")
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"quant.calib.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class WeightsConfig:
    """dtype: sintN or uintN, N in 2..8; group_shapes: [[1, g]] one scale per output and g inputs, [[1, -1]] per
    output, [[-1, -1]] per tensor; skips: dotted prefixes left unquantized; bits: {dotted prefix: bits}, longest wins.
    """

    dtype: str = "sint8"
    group_shapes: list[list[int]] = field(default_factory=lambda: [[1, -1]])
    skips: list[str] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        match = DTYPE.fullmatch(self.dtype)
        if not match or not 2 <= int(match[2]) <= 8:
            raise ValueError(f"quant.wgts.dtype {self.dtype!r}: allowed are sintN and uintN with N (bits) in 2..8")
        wrong = {prefix: bits for prefix, bits in self.bits.items() if not 2 <= bits <= 8}
        if wrong:
            raise ValueError(f"quant.wgts.bits: bits must be in 2..8, got {wrong}")
        match self.group_shapes:
            case [[1, size]] if size == -1 or size > 0:
                pass
            case [[-1, -1]]:
                pass
            case _:
                allowed = "[[1, g]], [[1, -1]], [[-1, -1]]"
                raise ValueError(f"quant.wgts.group_shapes {self.group_shapes}: allowed are {allowed}")


@dataclass(frozen=True)
class QuantConfig:
    calib: CalibConfig = field(default_factory=CalibConfig)
    wgts: WeightsConfig = field(default_factory=WeightsConfig)


@dataclass(frozen=True)
class CacheConfig:
    """root: where compiled programs are kept for the next run."""

    root: str = "./cache/sam2"


@dataclass(frozen=True)
class OutputConfig:
    """A run writes the folder <root>/<job>; job is the config file's name when not set."""

    root: str = "./outputs/sam2"
    job: str = ""


@dataclass(frozen=True)
class Config:
    """save_model: write the vanilla checkpoint beside the package."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    save_model: bool = True
    seed: int = 42


@dataclass(frozen=True)
class SegmentConfig:
    """What `sam2jq segment` takes beside the image and its prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


TASKS = ("image", "vos")


@dataclass(frozen=True)
class EvaluateConfig:
    """data: scenes:<seed> or, for the task image, a COCO folder; for vos, an SA-V folder, of which `split` is taken.

    num_samples: images or clips, all when null; masks: also write every mask of vos, a PNG an object and frame.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    task: str = "image"
    data: str = ""
    split: str = "sav_val"
    num_samples: int | None = None
    masks: bool = True
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        one_of("task", self.task, TASKS)
        if not self.data:
            raise ValueError("data is not set: give a COCO or SA-V folder, or scenes:0 for drawn ones")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")


def keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema with its default: what can follow `--`."""
    found = []
    for entry in dataclasses.fields(schema):
        kind = get_type_hints(schema)[entry.name]
        if dataclasses.is_dataclass(kind):
            found += keys(kind, f"{prefix}{entry.name}.")
        else:
            made = entry.default_factory is not dataclasses.MISSING
            found.append(f"--{prefix}{entry.name} {entry.default_factory() if made else entry.default!r}")
    return found


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key} {value!r}: allowed are {', '.join(allowed)}{suggest(value, allowed)}")


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
                raise ValueError(f"--{key}: {section} is not a section")
        node[last] = value
    check_keys(settings, schema)
    try:
        return draccus.decode(schema, settings)
    except DraccusException as error:
        unmet = str(error).startswith("Couldn't instantiate")  # a __post_init__ above said why
        raise ValueError(" ".join(str(error.__cause__ if unmet else error).split())) from error


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        near = suggest(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")])
        raise FileNotFoundError(f"no config at {path}{near}")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: it must be a mapping such as model: {{name: tiny}}")
    return settings


def parse_flags(flags: list[str]) -> dict[str, object]:
    """{"model.name": "tiny", "seed": 1} of ["--model.name", "tiny", "--seed=1"]; a flag without a value is true."""
    parsed, rest = {}, list(flags)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}: settings are given as --key value")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            parsed[flag[2:].replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag} {value!r} is not a YAML value") from error
    return parsed


def check_keys(settings: dict, schema: type, prefix: str = "") -> None:
    """ValueError naming the first key that `schema` does not have, with the one that may have been meant."""
    known = get_type_hints(schema)
    for key, value in settings.items():
        if key not in known:
            allowed = f"{prefix or 'top level '}allows {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key}{suggest(str(key), known)}; {allowed}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} must be a section such as {key}: {{...}}, got {value!r}")
            check_keys(value, known[key], f"{prefix}{key}.")


def to_dict(config) -> dict:
    """`config` as nested dicts of plain values."""
    return draccus.encode(config)


def dump(config) -> str:
    """The YAML text that `load` reads back as `config`."""
    return draccus.dump(config)

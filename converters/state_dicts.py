"""State dicts as training programs save them: in wrappers, with prefixes, or several in one file."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from converters.inert import Inert, contains
from sam2jq.errors import UserError, few

Tensors = dict[str, Any]  # name: tensor or numpy array

# modules of torch that put another module inside: DataParallel, compile, FullyShardedDataParallel, checkpoint_wrapper
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# the modules that hold the first kernel of every SAM 2, by original name and by Hugging Face's
ANCHORS = (
    ("image_encoder", "trunk", "patch_embed", "proj", "weight"),
    ("vision_encoder", "backbone", "patch_embed", "projection", "weight"),
)
_WRAPPER = rf"(?:(?:{'|'.join(WRAPPERS)})\.)*"
_ANCHOR = re.compile(rf"(|.*\.)(?:{'|'.join(rf'[.]{_WRAPPER}'.join(names) for names in ANCHORS)})")
# in the name of a tensor; the last two are those of LoRA for SAM
ADAPTER = re.compile(r"(?<![a-z])(lora|dora|loha|lokr|adapters?|w_[ab]s|linear_[ab])(?![a-z])", re.IGNORECASE)
PLACES = ("model", "state_dict", "model_state_dict")  # where to look for a state dict that is not one of SAM 2
DEPTH = 4  # of nested dicts


def select(content: Mapping, part: str | None, path: object, is_tensor) -> Tensors:
    """The one state dict in the content of a file, without wrapping prefixes; {} if there is no tensor.

    part: its name, where the file holds several models, such as "ema" beside "model". is_tensor(value): whether a
    value is a tensor. path: for errors.
    Raises UserError if there are several and `part` names none, or an object with tensors that may be another one, and
    if there are weights of adapters beside a model.
    """
    found = find(content, is_tensor)
    every = (".".join([*where, key]) for where, tensors in nested(content, is_tensor) for key in tensors)
    if adapters := list(filter(ADAPTER.search, every)):
        raise UserError(
            f"{path} holds adapters, which change the weights, such as {few(adapters, 3)}: merge them into the model, "
            "and save its state dict alone"
        )
    if part is not None:
        if part not in found:
            raise UserError(f"{path} holds no {part!r}; it holds {few(sorted(found)) or 'no model of SAM 2'}")
        return found[part]
    if found and (objects := [".".join(name) for name in objects_with_tensors(content, is_tensor)]):
        raise UserError(f"{path} holds objects with tensors of their own beside the model, {few(objects, 3)}: "
                        f"say which model is meant, as in {path}#{min(found)}")  # fmt: skip
    if len(found) > 1:
        names = sorted(found)
        raise UserError(f"{path} holds {len(names)} models: {few(names)}; say which, as in {path}#{names[0]}")
    return next(iter(found.values())) if found else any_tensors(content, is_tensor)


def find(content: Mapping, is_tensor) -> dict[str, Tensors]:
    """{name: state dict} of every SAM 2 in `content`. A name is the path of keys and prefixes to it, such as "ema".

    Raises UserError if a tensor is there twice, with a wrapper's prefix and without.
    """
    found = {}
    for where, tensors in nested(content, is_tensor):
        for prefix in prefixes(tensors):
            name = ".".join(part for part in [*where, *prefix.split(".")] if part and part not in WRAPPERS)
            name = name or "model"
            if name in found:
                raise UserError(f"two state dicts are called {name!r}: one has a wrapper's prefix, the other has not")
            found[name] = below(tensors, prefix)
    return found


def nested(content: Mapping, is_tensor, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Yields (keys that lead to it, its tensors) for `content` and every dict inside but those of optimizers."""
    yield where, {str(key): value for key, value in content.items() if is_tensor(value)}
    if len(where) < DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping) and "optim" not in str(key):
                yield from nested(value, is_tensor, (*where, str(key)))


def objects_with_tensors(content: Mapping, is_tensor, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the keys that lead to each object, of no class known here and no optimizer, that holds tensors."""
    for key, value in content.items():
        name = (*where, str(key))
        if re.search("optim|sched", name[-1], re.IGNORECASE):
            continue
        if isinstance(value, Inert) and contains(value, is_tensor):
            yield name
        elif isinstance(value, Mapping) and len(name) < DEPTH:
            yield from objects_with_tensors(value, is_tensor, name)


def prefixes(tensors: Tensors) -> list[str]:
    """What comes before the names of SAM 2 in each copy of it: "" or, for example, "module." or "teacher."."""
    return [match[1] for match in map(_ANCHOR.fullmatch, tensors) if match]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with `prefix`, by the name after it, without wrappers and without other copies.

    What else a training program keeps there, such as a counter or the weights of its loss, is left out with a prefix
    only: without one it cannot be told from a tensor of the model.
    """
    others = tuple(other for other in prefixes(tensors) if other != prefix and other.startswith(prefix))
    own = {key: x for key, x in tensors.items() if key.startswith(prefix) and not (others and key.startswith(others))}
    return {without_wrappers(key.removeprefix(prefix)): x for key, x in own.items()}


def without_wrappers(key: str) -> str:
    """A torch key without the names of wrapping modules: "image_encoder.module.neck.x" -> "image_encoder.neck.x"."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def any_tensors(content: Mapping, is_tensor) -> Tensors:
    """The tensors of the first place that has some, for an error about them."""
    places = [content.get(key) for key in PLACES]
    dicts = [*(place for place in places if isinstance(place, Mapping)), content]
    found = [{str(k): x for k, x in place.items() if is_tensor(x)} for place in dicts]
    return {without_wrappers(k): x for k, x in next(filter(None, found), {}).items()}


def split_part(source: str) -> tuple[str, str | None]:
    """("file.pt", "ema") of "file.pt#ema"; the part is None without "#"."""
    file, mark, part = source.rpartition("#")
    return (file, part) if mark and file else (source, None)

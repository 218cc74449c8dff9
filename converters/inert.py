"""Stand-ins for the Python objects that training programs save beside the weights, so that no class of theirs runs."""

import builtins
from collections import OrderedDict
from collections.abc import Mapping


class Inert:
    """An object of a torch file as what it was saved from, and nothing that its class does with it."""

    def __init__(self, *args):
        self.saved = list(args)

    def __setstate__(self, state) -> None:
        self.__dict__.setdefault("saved", []).append(state)


class InertDict(Inert):
    """The stand-in for classes of dicts: its objects are plain `OrderedDict`, in which torch stores the items."""

    def __new__(cls, *args):
        return OrderedDict()


def inert_classes(names: list[str]) -> list[type]:
    """A class for each of `names`, such as "numpy.dtype", as `torch.serialization.safe_globals` takes them.

    Functions in builtins have none: torch refuses them, as it refuses os and sys.
    """
    parts = [name.rpartition(".") for name in names]
    return [make(module, name) for module, _, name in parts
            if module != "builtins" or isinstance(getattr(builtins, name, None), type)]  # fmt: skip


def make(module: str, name: str) -> type:
    return type(name, (InertDict if "dict" in name.lower() else Inert,), {"__module__": module, "__qualname__": name})


def contains(value: object, is_tensor) -> bool:
    """Whether a tensor is somewhere in `value`, in containers and objects, which may refer to each other."""
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        if is_tensor(part):
            return True
        if id(part) not in seen:
            seen.add(id(part))
            inner = part.__dict__.get("saved", []) if isinstance(part, Inert) else part
            left += inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list | tuple) else []
    return False


def class_name(value: object) -> str:
    """The name of the class of an object, also of one that `value` stands in for."""
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")

"""Params trees by name: flat views, dotted prefixes, and the pytree dataclass that weight leaves are made of."""

import dataclasses
import difflib
from collections.abc import Iterable

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: dict) -> dict[str, object]:
    """{"trunk/blocks.0/attn/qkv/kernel": leaf}; weight leaves such as QTensor stay whole."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, object]) -> dict:
    """The nested tree; inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def kernels(flat: dict[str, object]) -> dict[str, object]:
    """The entries of a flat tree that can be quantized: the kernels of Dense, Conv and ConvTranspose."""
    return {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}


def layer_name(path: str) -> str:
    """The torch module that holds a parameter: "trunk/blocks.0/attn/qkv/kernel" -> "trunk.blocks.0.attn.qkv"."""
    return path.rpartition("/")[0].replace("/", ".")


def bias_path(path: str) -> str:
    """The path of the bias beside a kernel: "trunk/blocks.0/attn/qkv/kernel" -> "trunk/blocks.0/attn/qkv/bias"."""
    return path.removesuffix("kernel") + "bias"


def under(layer: str, prefix: str) -> bool:
    """Whether a dotted prefix names `layer`, a module around it, or its parameter; `blocks.1` is not `blocks.10`."""
    return f"{layer}.weight.".startswith(f"{prefix}.")


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an error: did you mean the known name closest to `name`, or the one that ends in it? Else ""."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.endswith(f".{name}")][:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def pytree(static: Iterable[str] = ()):
    """Class decorator: a frozen dataclass whose fields are pytree children, but for those named in `static`.

    `jax.tree_util.register_dataclass` will not do: to jax 0.10 the structures of two such classes are equal if they
    have as many fields, and when their hashes meet, jit runs for one class what it compiled for the other.
    """
    static = tuple(static)

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = tuple(field.name for field in dataclasses.fields(cls) if field.name not in static)
        keys = tuple(map(jax.tree_util.GetAttrKey, data))
        values = lambda node, names: tuple(getattr(node, name) for name in names)
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda node: (tuple(zip(keys, values(node, data))), values(node, static)),
            lambda fixed, children: cls(**dict(zip(data, children)), **dict(zip(static, fixed))),
            lambda node: (values(node, data), values(node, static)),
        )
        return cls

    return wrap

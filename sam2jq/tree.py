"""Params trees by name: flat views, dotted prefixes, and the decorator for pytree dataclasses such as weight leaves."""

import dataclasses
import hashlib
from collections.abc import Iterable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: dict) -> dict[str, object]:
    """{"trunk/blocks.0/attn/qkv/kernel": leaf}; weight leaves such as QTensor are not flattened."""
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
    """Whether a dotted prefix names `layer`, a parent module, or its weight; `blocks.1` is no prefix of `blocks.10`."""
    return f"{layer}.weight.".startswith(f"{prefix}.")


def fingerprint(params: dict, *parts: object) -> str:
    """A hexadecimal hash of params and parts, 32 characters; parts are bytes, or are hashed by their repr."""
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:32]


def pytree(static: Iterable[str] = ()):
    """A class decorator that makes a frozen dataclass, a pytree node with all fields but those in `static` as children.

    It replaces `jax.tree_util.register_dataclass`: in jax 0.10 the tree structures of two classes registered by that
    compare equal if they have equally many fields. When their hashes collide, jit runs the wrong class's program.
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

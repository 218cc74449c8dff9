"""The check that a params tree is the one of a model."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

import jax
import numpy as np

from sam2jq.errors import UserError, few
from sam2jq.models.sam2 import SAM2, abstract_params, image_params, is_image_only
from sam2jq.quant.package import full_shape, mismatches
from sam2jq.tree import flatten


def check_params(where: str | Path, model: SAM2, params: dict) -> None:
    """Raises UserError, which begins with `where`, unless the params are those of the model, by name and shape."""
    if not isinstance(model, SAM2):
        raise UserError(f"{where}: the model must be the one that sam2jq.load returns, got {type(model).__name__}")
    if not isinstance(params, Mapping) or not params:
        raise UserError(f"{where}: params must be the tree that sam2jq.load returns, got {type(params).__name__}")
    flat = flatten(dict(params))
    if wrong := [f"{path} ({kind_of(leaf)})" for path, leaf in flat.items() if not is_weight(leaf)]:
        raise UserError(f"{where}: params must be arrays of floats, of numpy or jax, or weight leaves: {few(wrong, 3)}")
    like = image_params(model) if is_image_only(params) else abstract_params(model)
    got = {layer: full_shape(leaf) for layer, leaf in flat.items()}
    if problems := mismatches(got, {layer: full_shape(leaf) for layer, leaf in flatten(like).items()}):
        raise UserError(
            f"{where}: the params are not those of the model: {len(problems)} do not fit: "
            f"{few(problems, separator='; ')}"
        )


def is_weight(leaf) -> bool:
    """Whether a leaf of a params tree is a weight leaf, or an array of floats, or stands for one."""
    if isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        return jax.dtypes.issubdtype(leaf.dtype, np.floating)
    return is_dataclass(leaf)


def kind_of(leaf) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))

"""Which size and version of SAM 2 the tensors of a checkpoint are, and what does not fit."""

from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np

from converters.names import count_mismatches, mismatches, shapes, to_layout, torch_key
from sam2jq.errors import UserError, few
from sam2jq.models.sam2 import SAM2, VARIANTS, VERSIONS, abstract_params, build, image_params, variant_name
from sam2jq.quant.package import full_shape

Shapes = Mapping[str, tuple[int, ...]]
NEWEST_FIRST = VERSIONS[::-1]
NEEDED = ("image_encoder", "sam_prompt_encoder", "sam_mask_decoder")  # parts without which no model works
WIDTH = "image_encoder.trunk.patch_embed.proj.weight"  # its first dimension is the width of the trunk


def leaf_shapes(leaves: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """{torch key: torch shape} of the kernels that the weight leaves represent."""
    return {torch_key(p): to_layout(p, np.broadcast_to(0, full_shape(leaf))).shape for p, leaf in leaves.items()}


def params_like(model: SAM2, got: Shapes) -> dict:
    """The params tree of `model`, as `abstract_params`, that a checkpoint with tensors of these shapes should hold.

    It lacks the memory if `got`, by original name, has the image's parts and nothing of the memory, as the files of
    Hugging Face's `Sam2Model`.
    """
    like, image = abstract_params(model), image_params(model)
    image_keys = shapes(image).keys()
    memory_keys = shapes(like).keys() - image_keys
    return image if image_keys & got.keys() and not memory_keys & got.keys() else like


def closest(
    got: Shapes, names: Iterable[str] = VARIANTS, versions: Iterable[str] = NEWEST_FIRST
) -> tuple[str, str, list[str]] | None:
    """(name, version, mismatches) of the model of the same width that has the fewest mismatches; None if none has.

    names, versions: of the models to try, in this order. The versions differ in the memory only, so a checkpoint
    without it has version 2.1.
    """
    width = got.get(WIDTH, (0,))[0]
    candidates = []
    for name, version in product([name for name in names if VARIANTS[name].embed_dim == width], versions):
        problems = mismatches(got, shapes(params_like(build(name, version), got)))
        if not problems:
            return name, version, []
        candidates.append((name, version, problems))
    return min(candidates, key=lambda candidate: len(candidate[2]), default=None)


def describe_mismatches(source: str, got: Shapes, problems: list[str] | None = None) -> str:
    """The error for a checkpoint with tensors of shapes `got`, of which `problems` do not fit the model asked for.

    problems: None if no size was asked for, and the tensors fit none of the versions asked for.
    """
    known = got.keys() & shapes(abstract_params(build("tiny"))).keys()
    if not known:
        return (
            f"checkpoint {source} is not of SAM 2: none of its tensors has a name such as "
            f"image_encoder.trunk.pos_embed; it holds {few(sorted(got), 5)}"
        )
    present = {key.partition(".")[0] for key in known}
    if absent := [part for part in NEEDED if part not in present]:
        return (
            f"checkpoint {source} is only a part of SAM 2, {few(sorted(present))}, without {' and '.join(absent)}: "
            "give the whole checkpoint"
        )
    near = closest(got)
    model = near and f"{near[0]} {near[1]}"
    if near and not near[2]:
        return (
            f"checkpoint {source} does not fit the model; it is {model}: give --model.name {near[0]} "
            f"--model.version {near[1]}"
        )
    if problems is None:
        begin = f"the tensors of {source} fit no size of SAM 2 exactly (sizes: {', '.join(VARIANTS)})"
        if near is None:
            return f"{begin}: {WIDTH} is {list(got.get(WIDTH, []))}, of another width than that of every size"
        return f"{begin}; {model} is closest: {count_mismatches(near[2])}"
    begin = f"checkpoint {source} does not fit the model"
    if near and near[2] != problems:
        return f"{begin}; {model} is closest: {count_mismatches(near[2])}"
    return f"{begin}: {count_mismatches(problems)}"


def choose_model(
    got: Shapes, about: Mapping | None, source: str, name: str | None, version: str | None, image_size: int | None
) -> SAM2:
    """The model of a checkpoint with tensors of shapes `got`.

    about: what the file says: any of name, version and image_size. name, version, image_size: as in `sam2jq.load`.
    Raises UserError if the name or version is neither given nor known, or if what is given contradicts the file.
    """
    given = {"name": name and variant_name(name), "version": version, "image_size": image_size}
    known = {key: value for key, value in (about or {}).items() if key in given and value}
    if "name" in known:
        known["name"] = variant_name(known["name"])
    if wrong := contradictions(known, given):
        raise UserError(f"{source} holds a model of {' and '.join(wrong)}: leave out what the file knows")
    settled = {key: value for key, value in given.items() if value is not None} | known
    if not settled.keys() >= {"name", "version"}:
        settled |= recognize_as(got, source, settled)
    return build(**settled)


def contradictions(known: Mapping, given: Mapping) -> list[str]:
    """One entry, such as "name 'nano', not 'tiny'", per setting that is given but known to be another."""
    return [f"{key} {known[key]!r}, not {value!r}" for key, value in given.items()
            if value is not None and value != known.get(key, value)]  # fmt: skip


def recognize_as(got: Shapes, source: str, given: Mapping) -> dict[str, str]:
    """{"name", "version"} as `given` or, where they are not, of the model that the tensors fit.

    Raises UserError if no name is given and they fit none.
    """
    names, versions = ([given[key]] if key in given else every
                       for key, every in (("name", VARIANTS), ("version", NEWEST_FIRST)))  # fmt: skip
    near = closest(got, names, versions)
    if "name" not in given and (near is None or near[2]):
        raise UserError(describe_mismatches(source, got))
    name, version, _ = near or (None, VERSIONS[-1], [])
    return {"name": given.get("name", name), "version": given.get("version", version)}

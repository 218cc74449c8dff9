"""Linear layers in codes as the `compressed-tensors` package stores them, in a folder for transformers.

transformers reads `quantization_config` of config.json, and the package turns the codes into weights, and rounds the
inputs, when the model first runs. It quantizes linear layers alone, so convolutions are written in float32.

Letters: K inputs, N outputs, G groups of inputs that share a scale.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from converters.exports.nearest import bare, without
from converters.exports.nunchaku_model import module_name
from converters.hf import to_hf
from converters.hf_config import write_config
from converters.names import array, to_torch
from converters.safetensors_files import write_tensors
from sam2jq.errors import UserError, few
from sam2jq.models.sam2 import SAM2, is_image_only
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.leaves import materialize_params, unwrap
from sam2jq.quant.package import full_shape
from sam2jq.quant.qtensor import QTensor
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, layer_name

INT8, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"  # the package's names of its formats


def save_compressed_tensors(folder: Path, model: SAM2, params: dict, metadata: Mapping) -> None:
    """Writes model.safetensors, config.json with `quantization_config`, and processor_config.json.

    Raises UserError that names layers whose leaves the package cannot represent, or if no linear layer is in codes.
    """
    leaves = kernels(flatten(params))
    refused = {layer_name(path): why_refused(leaf) for path, leaf in leaves.items()}
    if layers := [layer for layer, why in refused.items() if why]:
        raise UserError(f"{few(layers, 3)}: {refused[layers[0]]}; or round them again with --nearest")
    names = {path: module_name(path, "huggingface") for path, leaf in leaves.items() if is_linear_in_codes(leaf)}
    if not names:
        raise UserError("no linear layer has a weight in codes: export to safetensors")
    tensors = {key: array(x) for key, x in to_hf(to_torch(materialize_params(params))).items()}
    schemes: dict[str, list[str]] = {}
    for path, name in names.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": x for part, x in layer_tensors(leaves[path]).items()}
        schemes.setdefault(json.dumps(scheme(leaves[path])), []).append(name)
    write_tensors(folder / "model.safetensors", tensors, metadata["model"])
    write_config(folder, model, video=not is_image_only(params), quantization=quantization_config(schemes))


def quantization_config(schemes: Mapping[str, list[str]]) -> dict:
    """The entry of config.json for {scheme as json: names of its modules}."""
    groups = {
        f"group_{i}": json.loads(scheme) | {"targets": modules} for i, (scheme, modules) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def why_refused(leaf) -> str:
    """Why the package cannot represent a leaf, and what to do; "" if it can."""
    weight, around = unwrap(leaf)
    inputs = around.pop(ActQuantized, None)
    if OutQuantized in around:
        return "compressed-tensors is given no rounded outputs: quantize without quant.opts"
    if is_linear_in_codes(leaf) and around:
        return (
            f"compressed-tensors has no layer with a weight inside {next(iter(around)).__name__}: quantize without "
            "quant.smooth, quant.rotation and quant.wgts.low_rank"
        )
    if is_linear_in_codes(leaf) and weight.spec.codes != "int":
        return f"only whole numbers are written, and its weight is {weight.spec.dtype}: quantize to sintN or uintN"
    return "" if inputs is None else why_inputs_refused(inputs)


def why_inputs_refused(leaf: ActQuantized) -> str:
    """As `why_refused`, of rounded inputs."""
    spec, shape = leaf.spec, full_shape(leaf)
    if not is_linear_in_codes(leaf):
        kind = "a convolution" if len(shape) == 4 else "a layer without a weight in codes"
        return f"compressed-tensors rounds no inputs of {kind}: add it to quant.ipts.skips"
    if spec.codes != "int" or spec.symmetric:
        return (
            f"inputs are {spec.dtype}, and the grids of compressed-tensors are others there: quantize with "
            "quant.ipts.dtype uint8"
        )
    if shape[0] % (spec.group_size or 1):
        return f"its {shape[0]} inputs are no multiple of groups of {spec.group_size}: set quant.ipts.group_shapes"
    return ""


def is_linear_in_codes(leaf) -> bool:
    """Whether a leaf is that of a linear layer with a weight in codes."""
    return isinstance(unwrap(leaf)[0], QTensor) and len(full_shape(leaf)) == 2


def scheme(leaf) -> dict:
    """The `QuantizationScheme` of the package for a leaf that is not `why_refused`, without its targets."""
    weight, around = unwrap(leaf)
    weight, inputs = without_zero_point(weight), around.get(ActQuantized)
    plain = weight.spec.symmetric and (inputs is None or weight.spec.bits < 8)
    described = {
        "weights": describe_grid(weight.spec, shared_inputs(weight), "channel"),
        "format": PACKED if plain else INT8,
    }
    if inputs is not None:
        # one scale for each token: the package's own "token" is one for each row of an image
        size = inputs.spec.group_size or full_shape(leaf)[0]
        described["input_activations"] = describe_grid(inputs.spec, size, "group") | {"dynamic": inputs.scale is None}
    return described


def describe_grid(spec: QuantSpec, size: int | None, whole: str) -> dict:
    """The `QuantizationArgs` of the package; size: of groups, None where `whole` is the strategy."""
    strategy = "tensor" if spec.per_tensor else whole if size is None else "group"
    groups = {"group_size": size} if strategy == "group" else {}
    return {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "strategy": strategy} | groups


def without_zero_point(weight: QTensor) -> QTensor:
    """The same weight in signed codes of one bit more, where these have 8 bits at most.

    transformers 5 cannot load the zero points of packed codes: it expects the shape that they have before packing.
    """
    spec = weight.spec
    if spec.symmetric or spec.bits == 8:
        return weight
    codes = np.asarray(weight.qvalue).astype(np.int8)
    rows = np.zeros(len(codes), int) if spec.group_size is None else np.arange(len(codes)) // spec.group_size
    codes = codes - np.asarray(weight.zero_point).astype(np.int8)[rows]
    return QTensor(codes, weight.scale, None, replace(spec, bits=spec.bits + 1, symmetric=True))


def shared_inputs(weight: QTensor) -> int | None:
    """The size of equal groups in which all codes have one scale; None for one scale per output or for all.

    The package takes no incomplete last group: such a weight gets smaller groups, of which several have equal scales.
    """
    size, inputs = weight.spec.group_size, len(weight.qvalue)
    return None if size is None or size >= inputs else math.gcd(size, inputs)


def layer_tensors(leaf) -> dict[str, np.ndarray]:
    """{name within its module: tensor} of a leaf that is not `why_refused`."""
    weight, around = unwrap(leaf)
    weight, inputs = without_zero_point(weight), around.get(ActQuantized)
    spec, codes = weight.spec, np.asarray(weight.qvalue).astype(np.int16).T  # [N, K]
    shift = 2 ** (spec.bits - 1)
    groups = np.arange(0, codes.shape[1], shared_inputs(weight) or codes.shape[1])  # their first inputs
    groups //= spec.group_size or codes.shape[1]
    by_output = lambda x: np.asarray(x).reshape(-1) if spec.per_tensor else np.asarray(x)[groups].T  # [1] or [N, G]
    tensors = {"weight_scale": by_output(weight.scale)}
    if scheme(leaf)["format"] == PACKED:
        packed = to_int32(codes + shift, spec.bits)
        tensors |= {"weight_packed": packed, "weight_shape": np.array(codes.shape, np.int64)}
    elif spec.symmetric:
        tensors["weight"] = codes.astype(np.int8)
    else:
        signed = lambda x: (x.astype(np.int16) - shift).astype(np.int8)
        tensors |= {"weight": signed(codes), "weight_zero_point": signed(by_output(weight.zero_point))}
    if inputs is not None and inputs.scale is not None:
        zero_point = np.asarray(inputs.zero_point, np.int16) - 2 ** (inputs.spec.bits - 1)
        tensors["input_scale"] = np.asarray(inputs.scale, np.float32).reshape(1)
        tensors["input_zero_point"] = zero_point.astype(np.int8).reshape(1)
    return tensors


def to_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [rows, ceil(n * bits / 32)]: unsigned codes [rows, n] without gaps, the first in the lowest bits."""
    spread = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    spread = spread.reshape(len(codes), -1)
    spread = np.pad(spread, ((0, 0), (0, -spread.shape[1] % 32)))
    return np.packbits(spread, axis=1, bitorder="little").view("<i4")


def nearest_leaf(leaf):
    """A leaf that the package can represent, in place of one that is `why_refused`; see `round_again`.

    A fixed grid of inputs is left out with the leaves that change them.
    """
    _, around = unwrap(leaf)
    inputs = around.pop(ActQuantized, None)
    weight = bare(without(leaf, [ActQuantized, OutQuantized]))
    if inputs is None or (inputs.scale is not None and around.keys() - {OutQuantized}):
        return weight
    rounded = replace(inputs, inner=weight)
    return weight if why_inputs_refused(rounded) else rounded

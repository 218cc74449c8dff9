import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import safe_open

from converters.names import array
from converters.nunchaku import (
    AWQ,
    DOWN,
    E4M3,
    INT4_GROUP,
    MICRO_SCALES,
    OLD_NAMES,
    SCALES,
    UP,
    WEIGHT4,
    WEIGHT8,
    Layer,
    nearest_codes,
    pack,
    pack_awq,
    pack_codes,
    pack_layer,
    pack_vector,
    padded,
    run_layer,
    unpack,
    unpack_awq,
    unpack_codes,
    unpack_layer,
    unpack_vector,
)

BF16 = ml_dtypes.bfloat16
GOLDEN = "golden/nunchaku"


def read(path) -> tuple[str, dict, dict, dict]:
    """Kind, args, tensors in and tensors out of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    pick = lambda which: {k.removeprefix(which): t for k, t in tensors.items() if k.startswith(which)}
    return header["kind"], json.loads(header["args"]), pick("in."), pick("out.")


def golden_layer(args: dict, given: dict) -> Layer:
    """What the reference was handed, as a Layer: with the padding of inputs that the weight came with."""
    f32 = lambda name, empty: given.get(name, empty).astype(np.float32)
    outputs, inputs = given["weight"].shape
    ragged = padded(f32("lora_down", np.zeros((0, inputs))), (1, inputs)) if "lora_down" in given else None
    down = np.zeros((0, inputs), np.float32) if ragged is None else ragged
    scales, outer = given["scale"].reshape(outputs, -1) if "subscale" not in given else None, None
    if scales is None:
        scales, outer = given["subscale"].reshape(outputs, -1), given["scale"].reshape(-1)
        outer = outer[0] if len(outer) == 1 else outer
    return Layer(
        nearest_codes(given["weight"], scales, outer),
        scales,
        f32("bias", np.zeros(outputs)),
        padded(f32("smooth", np.ones(inputs)), (inputs,), fill=1),
        down,
        f32("lora_up", np.zeros((outputs, 0))),
        outer,
    )


def expected_bits(kind: str, args: dict, given: dict) -> dict[str, np.ndarray]:
    """What we make of the tensors in, under the names of the reference."""
    match kind:
        case "lowrank":
            return {"packed": pack(given["weight"], DOWN if args["down"] else UP)}
        case "w4a16_awq":
            outputs = len(given["weight"])
            scales = given["scale"].reshape(outputs, -1).astype(np.float32)
            steps = given["weight"].astype(np.float32) / scales.repeat(INT4_GROUP, axis=1)
            return pack_awq((np.rint(steps) + 7).astype(np.int8), scales, dtype=given["weight"].dtype)
        case _:
            layer, dtype = golden_layer(args, given), given["weight"].dtype
            shift = float(given["shift"][0]) if "shift" in given else 0.0
            made = pack_layer(
                # the other converter takes the factor as it is to stand in the file
                layer if kind == "layer_flux" else layer._replace(down=layer.down * layer.smooth.astype(np.float64)),
                shift=shift,
                smooth_fused=args.get("smooth_fused", False),
                dtype=dtype,
            )
            return {OLD_NAMES.get(name, name): t for name, t in made.items()}


def test_every_golden_file_is_met_to_the_bit(shared):
    paths = sorted((shared / GOLDEN).glob("*.safetensors"))
    assert paths
    for path in paths:
        kind, args, given, wanted = read(path)
        made = expected_bits(kind, args, given)
        for name, tensor in wanted.items():
            assert made[name].shape == tensor.shape, (path.name, name)
            assert made[name].tobytes() == tensor.tobytes(), (path.name, name)

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.torch import safe_open

from converters.exports.nunchaku import (
    AWQ,
    DOWN,
    INT4_GROUP,
    MICRO_SCALES,
    OLD_NAMES,
    SCALES,
    UP,
    WEIGHT4,
    WEIGHT8,
    Layer,
    check_layer,
    pack_awq,
    pack_codes,
    pack_layer,
    pack_matrix,
    pad_to_tiles,
    round_to_codes,
    unpack_awq,
    unpack_codes,
    unpack_layer,
    unpack_matrix,
)
from converters.names import array

BF16 = ml_dtypes.bfloat16
GOLDEN = "golden/nunchaku"


def read(path) -> tuple[str, dict, dict, dict]:
    """(kind, args, input tensors, output tensors) of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    pick = lambda which: {k.removeprefix(which): t for k, t in tensors.items() if k.startswith(which)}
    return header["kind"], json.loads(header["args"]), pick("in."), pick("out.")


def golden_layer(args: dict, given: dict) -> Layer:
    """The inputs of the reference packer as a `Layer`, with the padding of the weight's inputs."""
    f32 = lambda name, empty: given.get(name, empty).astype(np.float32)
    outputs, inputs = given["weight"].shape
    down = pad_to_tiles(f32("lora_down", np.zeros((0, inputs))), (1, inputs)) if "lora_down" in given else None
    down = np.zeros((0, inputs), np.float32) if down is None else down
    scales, outer = given["scale"].reshape(outputs, -1) if "subscale" not in given else None, None
    if scales is None:
        scales, outer = given["subscale"].reshape(outputs, -1), given["scale"].reshape(-1)
        outer = outer[0] if len(outer) == 1 else outer
    return Layer(
        round_to_codes(given["weight"], scales, outer),
        scales,
        f32("bias", np.zeros(outputs)),
        pad_to_tiles(f32("smooth", np.ones(inputs)), (inputs,), value=1),
        down,
        f32("lora_up", np.zeros((outputs, 0))),
        outer,
    )


def packed_tensors(kind: str, args: dict, given: dict) -> dict[str, np.ndarray]:
    """Our packed tensors of the golden inputs, under the names of the reference."""
    match kind:
        case "lowrank":
            return {"packed": pack_matrix(given["weight"], DOWN if args["down"] else UP)}
        case "w4a16_awq":
            outputs = len(given["weight"])
            scales = given["scale"].reshape(outputs, -1).astype(np.float32)
            steps = given["weight"].astype(np.float32) / scales.repeat(INT4_GROUP, axis=1)
            return pack_awq((np.rint(steps) + 7).astype(np.int8), scales, dtype=given["weight"].dtype)
        case _:
            layer, dtype = golden_layer(args, given), given["weight"].dtype
            shift = float(given["shift"][0]) if "shift" in given else 0.0
            packed = pack_layer(
                # only `layer_flux` takes `down` before the division by smooth
                layer if kind == "layer_flux" else layer._replace(down=layer.down * layer.smooth.astype(np.float64)),
                shift=shift,
                smooth_fused=args.get("smooth_fused", False),
                dtype=dtype,
            )
            return {OLD_NAMES.get(name, name): t for name, t in packed.items()}


def test_packed_tensors_equal_every_golden_file_bit_for_bit(shared):
    paths = sorted((shared / GOLDEN).glob("*.safetensors"))
    assert paths
    for path in paths:
        kind, args, given, expected = read(path)
        got = packed_tensors(kind, args, given)
        for name, tensor in expected.items():
            assert got[name].shape == tensor.shape, (path.name, name)
            assert got[name].tobytes() == tensor.tobytes(), (path.name, name)


def random_layer(outputs: int, inputs: int, rank: int, nvfp4: bool = False) -> Layer:
    rng = np.random.default_rng(0)
    h16 = lambda x: x.astype(BF16).astype(np.float32)
    group, low, high = (16, 0, 16) if nvfp4 else (INT4_GROUP, -8, 8)
    scales = rng.uniform(0.5, 1, (outputs, -(-inputs // group)))
    return Layer(
        rng.integers(low, high, (outputs, inputs), dtype=np.int8),
        scales.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if nvfp4 else h16(scales),
        h16(rng.standard_normal(outputs)),
        h16(rng.uniform(0.5, 2, inputs)),
        h16(rng.standard_normal((rank, inputs))),
        h16(rng.standard_normal((outputs, rank))),
        np.float32(0.5) if nvfp4 else None,
    )


SIZES = [(128, 128, 16), (72, 64, 16), (288, 96, 32), (96, 384, 8), (130, 200, 0)]


@pytest.mark.parametrize("nvfp4", [False, True], ids=["int4", "nvfp4"])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), SIZES)
def test_unpack_layer_is_the_inverse_of_pack_layer(outputs, inputs, rank, nvfp4):
    layer = random_layer(outputs, inputs, rank, nvfp4)
    packed = pack_layer(layer)
    assert packed["qweight"].shape == (-(-outputs // 128) * 128, -(-inputs // 128) * 64)
    back = unpack_layer(packed, inputs, outputs)
    for name in ("codes", "scales", "bias", "smooth"):
        np.testing.assert_array_equal(getattr(back, name), getattr(layer, name), err_msg=name)
    np.testing.assert_allclose(back.down[:rank], layer.down, rtol=2**-8)  # divided by smooth, rounded, multiplied
    np.testing.assert_array_equal(back.up[:, :rank], layer.up)
    for name, tensor in pack_layer(back).items():
        assert tensor.tobytes() == packed[name].tobytes(), name


@pytest.mark.parametrize("layout", [WEIGHT4, WEIGHT8, SCALES, MICRO_SCALES, DOWN, UP, AWQ])
def test_unpack_matrix_is_the_inverse_of_pack_matrix(layout):
    x = np.arange(256 * 384, dtype=np.int32).reshape(256, 384)
    np.testing.assert_array_equal(unpack_matrix(pack_matrix(x, layout), layout), x)


def test_every_pair_of_codes_is_recovered_from_its_byte():
    codes = np.stack(np.meshgrid(*[np.arange(-8, 8, dtype=np.int8)] * 2), -1).reshape(16, 32)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes))[:16, :32], codes)


def test_unpack_awq_is_the_inverse_of_pack_awq():
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (8, 128), dtype=np.int8), rng.uniform(1, 2, (8, 2)).astype(BF16)
    got, got_scales, zeros = unpack_awq(pack_awq(codes, scales))
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(got_scales, scales.astype(np.float32))
    np.testing.assert_allclose(zeros, -7 * got_scales, rtol=2**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.ones((8, 3))}, r"scales is \[8, 3\], not \[8, 2\]"),
        ({"codes": np.full((8, 128), 9)}, r"codes span 9\.\.9"),
        ({"smooth": np.zeros(128)}, "smooth must be positive"),
    ],
)
def test_a_layer_that_no_kernel_accepts_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        check_layer(random_layer(8, 128, 16)._replace(**change))


@pytest.mark.parametrize("missing", ["qweight", "wscales", "smooth_factor_orig", "proj_up"])
def test_a_layer_without_one_of_its_tensors_is_an_error(missing):
    packed = pack_layer(random_layer(128, 128, 16))
    del packed[missing]
    with pytest.raises(ValueError, match=f"missing {missing}"):
        unpack_layer(packed, 128, 128)

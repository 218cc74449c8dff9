"""4-bit linear layers in the memory layout of nunchaku's CUDA kernels: packing and unpacking.

Letters: N outputs, K inputs, R rank; Np, Kp, Rp with padding; h16 the 16-bit float of the file (bfloat16 or float16).
Sources: deepcompressor/backend/nunchaku, which writes such files, and nunchaku's kernels.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from converters.names import mismatches
from sam2jq.errors import UserError
from sam2jq.quant.spec import E2M1

Array = np.ndarray
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
INT4_GROUP, NVFP4_GROUP = 64, 16
# {name of a tensor: its name in the first version of the format}
OLD_NAMES = {"smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig"} | {
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}


class Layout(NamedTuple):
    """The memory layout of a matrix [rows, columns]: pad with `pad_value` to whole tiles, split into axes, transpose.

    rows, columns: the axes that each is split into, slowest first, with their lengths; the length of the first follows
    from the matrix. order: the order of these axes in the file, slowest first. tile: (rows, columns) of a tile.
    transposed: whether the shape in the file is [columns, rows].
    """

    rows: str
    columns: str
    order: str
    tile: tuple[int, int]
    pad_value: int = 0
    transposed: bool = False


# t: tiles of 128 outputs, s: tiles of inputs. A warp's 32 lanes are 8 rows l of 4 lanes m; a lane's four registers are
# the halves i, j of a 16-row tile, and e counts the entries of a register: 8 codes of 4 bits, 4 of 8 bits.
WEIGHT4 = Layout("t p8 i2 l8", "s j2 m4 e8", "t s p l m i j e", tile=(128, 128))
WEIGHT8 = Layout("t p8 i2 l8", "s j2 m4 e4", "t s p l m i j e", tile=(128, 64))
# the scales of the outputs that a lane m accumulates are adjacent: two neighbours b of each half i
SCALES = Layout("t p8 i2 m4 b2", "g", "t g p m i b", tile=(128, 2), pad_value=1, transposed=True)
VECTOR = SCALES._replace(tile=(128, 1))  # bias, smooth and channel scales are matrices of one column
# of nvfp4: quarters a of a tile, their 8-row parts q; the scales of four groups v form a 32-bit word
MICRO_SCALES = Layout("t a4 q4 l8", "u v4", "t u l q a v", tile=(128, 8), pad_value=1, transposed=True)
# 16 x 16 tiles, ordered by channel c, then by rank r, in both: down is [R, K], up [N, R]
DOWN = Layout("r i2 l8", "c j2 m4 b2", "c r l m i j b", tile=(16, 128), transposed=True)
UP = Layout("c i2 l8", "r j2 m4 b2", "c r l m i j b", tile=(128, 16))
# W4A16: four adjacent outputs n; the nibbles q of a 16-bit word are 8 inputs apart
AWQ = Layout("t n4", "s j2 q4 e8", "t s n j e q", tile=(4, 64))


def pad_to_tiles(x: Array, tile: tuple[int, ...], value: int = 0) -> Array:
    """`x` padded with `value` at the end of each axis to a whole number of tiles, at least one."""
    extra = [-(-max(n, 1) // step) * step - n for n, step in zip(x.shape, tile, strict=True)]
    return np.pad(x, [(0, n) for n in extra], constant_values=value)


def axis_lengths(layout: Layout, shape: tuple[int, int]) -> dict[str, int]:
    """{axis: its length} of the axes that a padded matrix of this shape is split into, slowest first."""
    lengths = {}
    for axes, total in zip((layout.rows, layout.columns), shape, strict=True):
        first, *rest = axes.split()
        inner = {axis[0]: int(axis[1:]) for axis in rest}
        lengths |= {first: total // math.prod(inner.values())} | inner
    return lengths


def pack_matrix(x: Array, layout: Layout) -> Array:
    """`x` [rows, columns] padded, in the order and shape of the file."""
    x = pad_to_tiles(x, layout.tile, layout.pad_value)
    lengths = axis_lengths(layout, x.shape)
    axes = [list(lengths).index(name) for name in layout.order.split()]
    return x.reshape(*lengths.values()).transpose(axes).reshape(x.shape[::-1] if layout.transposed else x.shape)


def unpack_matrix(packed: Array, layout: Layout) -> Array:
    """Inverse of `pack_matrix`: [rows, columns], padding included."""
    shape = packed.shape[::-1] if layout.transposed else packed.shape
    lengths, order = axis_lengths(layout, shape), layout.order.split()
    return packed.reshape([lengths[name] for name in order]).transpose(list(map(order.index, lengths))).reshape(shape)


def pack_vector(x: Array) -> Array:
    """`x` [c] in the order of the file, padded with ones to a multiple of 128."""
    return pack_matrix(x[:, None], VECTOR)[0]


def unpack_vector(packed: Array) -> Array:
    """Inverse of `pack_vector`, padding included."""
    return unpack_matrix(packed[None], VECTOR)[:, 0]


def pack_codes(codes: Array, layout: Layout = WEIGHT4) -> Array:
    """int8 [Np, Kp / 2]: the low four bits of codes [N, K], int4 or e2m1, two a byte, the first in the low half."""
    codes = pack_matrix(codes.astype(np.int8), layout) & 15
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_codes(packed: Array, layout: Layout = WEIGHT4) -> Array:
    """Inverse of `pack_codes`: signed codes -8..7, int8 [Np, Kp]; `& 15` turns them into unsigned codes."""
    pairs = np.stack([packed << 4 >> 4, packed >> 4], axis=-1)  # int8 shifts keep the sign
    return unpack_matrix(pairs.reshape(len(packed), -1), layout)


def round_to_codes(weight: Array, scales: Array, outer: Array | None = None) -> Array:
    """int8 codes [N, K] of a weight [N, K], smoothed and without its low-rank part: the nearest values on the grid.

    scales, outer: as in `Layer`. Ties of int4 go to even, those of e2m1 towards 0.
    Raises UserError if a value is NaN or outside the grid.
    """
    f32, group = np.float32, INT4_GROUP if outer is None else NVFP4_GROUP
    steps = weight.astype(f32) if outer is None else weight.astype(f32) / np.reshape(outer, (-1, 1)).astype(f32)
    steps = steps / scales.astype(f32).repeat(group, axis=1)[:, : weight.shape[1]]
    if not np.isfinite(steps).all() or (outer is None and not (steps.min() >= -8.5 and steps.max() < 7.5)):
        raise UserError("weight / scales is NaN or leaves the grid: scales must be at least absmax / 7 of their group")
    if outer is None:
        return np.rint(steps).astype(np.int8)
    magnitudes = np.array(E2M1, f32)
    codes = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, abs(steps)).astype(np.int8)
    return np.where((steps < 0) & (codes > 0), codes | 8, codes)  # -0 becomes 0


class Layer(NamedTuple):
    """A 4-bit linear layer in logical order, W = (codes * scales * outer + up @ down) / smooth.

    codes: [N, K], int4 in -8..7; with `outer` (nvfp4) the bits of e2m1, 0..15. scales: [N, ceil(K / 64)] for int4,
    [N, ceil(K / 16)] for nvfp4. bias: [N]. smooth: [K]. down: [R, K]. up: [N, R]. outer: the second scale of nvfp4,
    one for the tensor, [], or one for each output, [N]; None for int4.
    """

    codes: Array
    scales: Array
    bias: Array
    smooth: Array
    down: Array
    up: Array
    outer: Array | None = None


def pack_layer(layer: Layer, *, shift: float = 0, smooth_fused: bool = False, dtype=BF16) -> dict[str, Array]:
    """{name: tensor} of one W4A4 linear layer in the file; its scales and smooth should be h16 values already.

    shift: the constant that the fused MLP kernel adds to the inputs of fc2, 0.171875; `bias` must then be that of the
    shifted layer, b - shift * W.sum(1). smooth_fused: whether the layer before divides by smooth; then neither this
    layer nor its low-rank branch does. dtype: the h16.
    Raises UserError if the layer is invalid (`check_layer`) or a value is not finite in the dtype of the file.
    """
    check_layer(layer)
    # the kernel multiplies `down` by inputs that are not divided by smooth, so `down` is divided instead
    smooth = np.ones_like(layer.smooth) if smooth_fused else layer.smooth
    down = layer.down.astype(np.float64) / smooth.astype(np.float64)
    bias = layer.bias
    if shift:  # the low-rank branch reads inputs without the shift
        bias = bias.astype(np.float64) + layer.up.astype(np.float64) @ down.sum(1) * shift
    h16 = lambda x: np.asarray(x, np.float32).astype(dtype)  # through float32, as torch converts float64
    tensors = {
        "qweight": pack_codes(layer.codes),
        "bias": pack_vector(h16(bias)),
        "smooth_factor": pack_vector(h16(smooth)),
        "smooth_factor_orig": pack_vector(h16(layer.smooth)),
        "proj_down": pack_matrix(h16(down), DOWN),
        "proj_up": pack_matrix(h16(layer.up), UP),
    }
    if layer.outer is None:
        tensors["wscales"] = pack_matrix(h16(layer.scales), SCALES)
    else:
        tensors["wscales"] = pack_matrix(h16(layer.scales).astype(E4M3), MICRO_SCALES)
        outer = h16(layer.outer)
        tensors |= {"wtscale": outer.reshape(1)} if outer.size == 1 else {"wcscales": pack_vector(outer)}
    wrong = [name for name, t in tensors.items() if name != "qweight" and not np.isfinite(t.astype(np.float32)).all()]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: not finite in {np.dtype(dtype)}, or micro-scales above 448: scale first")
    return tensors


def check_layer(layer: Layer) -> None:
    """Raises UserError that lists every field whose shape does not match the codes or whose values are invalid."""
    outputs, inputs = layer.codes.shape
    group, low, high = (INT4_GROUP, -8, 7) if layer.outer is None else (NVFP4_GROUP, 0, 15)
    expected = {"scales": (outputs, -(-inputs // group)), "bias": (outputs,), "smooth": (inputs,)}
    expected |= {"down": (len(layer.down), inputs), "up": (outputs, len(layer.down))}
    problems = mismatches({name: getattr(layer, name).shape for name in expected}, expected)
    if layer.codes.min() < low or layer.codes.max() > high:
        problems.append(f"codes span {layer.codes.min()}..{layer.codes.max()}, not {low}..{high}")
    divisors = {"scales": layer.scales, "smooth": layer.smooth, "outer": 1 if layer.outer is None else layer.outer}
    problems += [f"{name} must be positive" for name, x in divisors.items() if not np.all(np.asarray(x) > 0)]
    if np.size(divisors["outer"]) not in (1, outputs):
        problems.append(f"outer is one scale or {outputs}, not {np.size(layer.outer)}")
    if problems:
        raise UserError(f"not a layer with one scale for {group} inputs: {'; '.join(problems)}")


def unpack_layer(tensors: Mapping[str, Array], in_features: int, out_features: int) -> Layer:
    """Inverse of `pack_layer` without `shift` and `smooth_fused`, in float32; the rank keeps its padding.

    `down` is float64 and multiplied by smooth, so that packing the result gives the same bits.
    Raises UserError if a tensor is missing, extra or of another shape.
    """
    check_tensors(tensors, in_features, out_features)
    nvfp4 = tensors["wscales"].dtype == E4M3
    outputs, inputs = slice(out_features), slice(in_features)
    groups = slice(-(-in_features // (NVFP4_GROUP if nvfp4 else INT4_GROUP)))
    vector = lambda name: unpack_vector(tensors[name].astype(np.float32))
    matrix = lambda name, layout: unpack_matrix(tensors[name], layout).astype(np.float32)
    smooth = vector("smooth_factor")[inputs]
    codes, outer = unpack_codes(tensors["qweight"])[outputs, inputs], None
    if nvfp4:
        codes &= 15
        outer = vector("wcscales")[outputs] if "wcscales" in tensors else tensors["wtscale"][0].astype(np.float32)
    return Layer(
        codes,
        scales=matrix("wscales", MICRO_SCALES if nvfp4 else SCALES)[outputs, groups],
        bias=vector("bias")[outputs],
        smooth=smooth,
        down=matrix("proj_down", DOWN)[:, inputs] * smooth.astype(np.float64),
        up=matrix("proj_up", UP)[outputs],
        outer=outer,
    )


def check_tensors(tensors: Mapping[str, Array], in_features: int, out_features: int) -> None:
    """Raises UserError that lists tensors that are missing, extra, or of the wrong shape for a layer of this size."""
    outputs, inputs = (-(-n // 128) * 128 for n in (out_features, in_features))
    rank = tensors["proj_down"].shape[-1] if "proj_down" in tensors else 16
    nvfp4 = "wscales" in tensors and tensors["wscales"].dtype == E4M3
    expected = {"qweight": (outputs, inputs // 2), "proj_down": (inputs, rank), "proj_up": (outputs, rank)}
    expected |= {"wscales": (inputs // (NVFP4_GROUP if nvfp4 else INT4_GROUP), outputs), "bias": (outputs,)}
    expected |= dict.fromkeys(["smooth_factor", "smooth_factor_orig"], (inputs,))
    if nvfp4:
        expected |= {"wcscales": (outputs,)} if "wcscales" in tensors else {"wtscale": (1,)}
    problems = mismatches({name: t.shape for name, t in tensors.items()}, expected)
    if problems:
        raise UserError(f"not the tensors of a linear {in_features} -> {out_features}: {'; '.join(problems)}")


def pack_awq(codes: Array, scales: Array, *, zero: int = 7, dtype=BF16) -> dict[str, Array]:
    """{name: tensor} of a W4A16 linear layer, W = (codes - zero) * scales, without bias.

    codes: [N, K] in 0..15; scales: [N, K / 64]. Raises UserError if a shape does not fit.
    """
    outputs, inputs = codes.shape
    if outputs % 4 or inputs % INT4_GROUP or scales.shape != (outputs, inputs // INT4_GROUP):
        raise UserError(f"W4A16 takes N % 4 == K % 64 == 0 and [N, K / 64] scales, not {codes.shape}, {scales.shape}")
    scales = scales.astype(np.float32).T
    qweight = pack_codes(codes, AWQ).reshape(outputs // 4, -1).view(np.int32)
    return {"qweight": qweight, "wscales": scales.astype(dtype), "wzeros": (-zero * scales).astype(dtype)}


def unpack_awq(tensors: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """(codes [N, K], scales [N, K / 64], zeros [N, K / 64]) of W = codes * scales + zeros."""
    packed = tensors["qweight"].view(np.int8).reshape(4 * len(tensors["qweight"]), -1)
    return unpack_codes(packed, AWQ) & 15, *(tensors[name].astype(np.float32).T for name in ("wscales", "wzeros"))

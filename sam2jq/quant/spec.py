"""How one array is rounded, and the words by which configs name it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sam2jq.errors import ConfigError, UserError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of a 4-bit float
DTYPE = re.compile(r"[su]int[2-8]|fp4|nvfp4|fp8")


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one array: its bits, its symmetry, and what shares a scale.

    A scale is shared by the whole tensor (`per_tensor`), by an output channel (`group_size=None`), or by `group_size`
    consecutive inputs of an output channel. Symmetric integers are -(2^(bits-1) - 1) .. 2^(bits-1) - 1 without a zero
    point; asymmetric ones are 0 .. 2^bits - 1 with one. Float codes are e2m1 in 4 bits or e4m3 in 8 bits (OCP formats).

    Raises UserError where fields do not go together.
    """

    bits: int  # 2..8
    symmetric: bool = True  # False: codes have a zero point
    group_size: int | None = None  # inputs that share a scale; None: all inputs of an output channel
    per_tensor: bool = False  # one scale for the whole array
    codes: str = "int"  # "int", or "float": e2m1 or e4m3
    scales: str = "float32"  # "float32", "bfloat16", or "e4m3": 8-bit floats times one number per tensor, as in nvfp4

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UserError(f"bits must be a whole number in 2..8, got {self.bits!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise UserError(f"group_size must be a whole number, at least 1, got {self.group_size!r}")
        if self.codes not in ("int", "float"):
            raise UserError(f"codes must be int or float, got {self.codes!r}")
        if self.per_tensor and self.group_size is not None:
            raise UserError("per_tensor is one scale for all: leave group_size out")
        if self.codes == "float" and not (self.bits in (4, 8) and self.symmetric):
            raise UserError(f"float codes have 4 or 8 bits and no zero point, got {self.bits} bits")
        if self.scales not in ("float32", "bfloat16", "e4m3"):
            raise UserError(f"scales must be float32, bfloat16 or e4m3, got {self.scales!r}")

    @property
    def qmin(self) -> float:
        """The smallest code."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> float:
        """The largest code."""
        if self.codes == "float":
            return 6.0 if self.bits == 4 else 448.0
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> str:
        """The name in a config: sint4, uint4, fp4, nvfp4, fp8."""
        if self.codes == "float":
            return f"{'nv' * (self.scales == 'e4m3')}fp{self.bits}"
        return f"{'sint' if self.symmetric else 'uint'}{self.bits}"

    @property
    def group(self) -> str:
        """What shares a scale, for reports: "tensor", "channel" or the group size."""
        return "tensor" if self.per_tensor else "channel" if self.group_size is None else str(self.group_size)


def parse_spec(dtype: str, group_shapes: list[list[int]], scale_dtype: str = "float32") -> QuantSpec:
    """The spec that a config writes as `dtype: sint4` and `group_shapes: [[1, 64]]`.

    Raises ConfigError if either is not one of the allowed forms.
    """
    if not DTYPE.fullmatch(dtype):
        raise ConfigError(f"dtype {dtype!r}: allowed are sintN and uintN with N (bits) in 2..8, fp4, nvfp4, fp8")
    if dtype == "nvfp4" and group_shapes != [[1, 16]]:
        raise ConfigError(f"group_shapes {group_shapes}: nvfp4 has groups of 16, [[1, 16]]")
    match group_shapes:
        case [[1, -1]]:
            group_size, per_tensor = None, False
        case [[1, int(size)]] if size > 0:
            group_size, per_tensor = size, False
        case [[-1, -1]]:
            group_size, per_tensor = None, True
        case _:
            raise ConfigError(f"group_shapes {group_shapes}: allowed are [[1, g]], [[1, -1]], [[-1, -1]]")
    bits = int(dtype[-1])
    if "fp" in dtype:
        return QuantSpec(bits, True, group_size, per_tensor, "float", "e4m3" if dtype == "nvfp4" else scale_dtype)
    return QuantSpec(bits, dtype[0] == "s", group_size, per_tensor, scales=scale_dtype)


def check_bits(bits: Mapping[str, int], target_bits: float | None) -> None:
    """Raises ConfigError unless all widths in `bits` {prefix: bits} and the mean `target_bits` are in 2..8."""
    wrong = {prefix: width for prefix, width in bits.items() if not 2 <= width <= 8}
    if wrong:
        raise ConfigError(f"bits: bits must be in 2..8, got {wrong}")
    if target_bits is not None and not 2 <= target_bits <= 8:
        raise ConfigError(f"target_bits: layers have 2 to 8 bits, so {target_bits} is out of reach")

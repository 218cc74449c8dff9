"""Checks that several sections share."""

import re

from sam2jq.errors import UserError
from sam2jq.tree import suggest

DTYPE = re.compile(r"[su]int[2-8]|fp4|nvfp4|fp8")


def check_grid(key: str, dtype: str, group_shapes: list[list[int]]) -> None:
    """ValueError unless both say how numbers are rounded; `key` is the section they stand in."""
    if not DTYPE.fullmatch(dtype):
        raise UserError(f"{key}.dtype {dtype!r}: allowed are sintN and uintN with N (bits) in 2..8, fp4, nvfp4, fp8")
    if dtype == "nvfp4" and group_shapes != [[1, 16]]:
        raise UserError(f"{key}.group_shapes {group_shapes}: nvfp4 is groups of 16, [[1, 16]]")
    match group_shapes:
        case [[1, size]] if size == -1 or size > 0:
            pass
        case [[-1, -1]]:
            pass
        case _:
            raise UserError(f"{key}.group_shapes {group_shapes}: allowed are [[1, g]], [[1, -1]], [[-1, -1]]")


def check_bits(key: str, bits: dict[str, int], target: float | None) -> None:
    """ValueError unless layers can have these bits; `key` is the section they stand in."""
    wrong = {prefix: width for prefix, width in bits.items() if not 2 <= width <= 8}
    if wrong:
        raise UserError(f"{key}.bits: bits must be in 2..8, got {wrong}")
    if target is not None and not 2 <= target <= 8:
        raise UserError(f"{key}.target_bits: layers have 2 to 8 bits, so {target} is out of reach")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{key} {value!r}: allowed are {', '.join(allowed)}{suggest(value, allowed)}")

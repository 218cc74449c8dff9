"""How one array is rounded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantSpec:
    """An integer grid: `bits` wide, with one scale per tensor, per output channel (`group_size=None`), or per
    output channel and `group_size` consecutive inputs.

    symmetric: codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1, no zero point. Otherwise 0 .. 2^bits - 1 with one.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    per_tensor: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.per_tensor and self.group_size is not None:
            raise ValueError("per_tensor leaves no room for a group_size")

    @property
    def qmin(self) -> int:
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> str:
        """What users write in `quant.wgts.dtype`: sint4, uint4."""
        return f"{'sint' if self.symmetric else 'uint'}{self.bits}"

    @property
    def group(self) -> str:
        """What shares a scale, for reports: tensor, channel or the group size."""
        return "tensor" if self.per_tensor else "channel" if self.group_size is None else str(self.group_size)

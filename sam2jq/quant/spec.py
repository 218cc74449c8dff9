"""How one array is rounded."""

from dataclasses import dataclass

from sam2jq.errors import UserError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of a 4-bit float


@dataclass(frozen=True)
class QuantSpec:
    """A grid `bits` wide, with one scale per tensor, per output channel (`group_size=None`), or per output channel and
    `group_size` consecutive inputs.

    codes "int": symmetric -(2^(bits-1) - 1) .. 2^(bits-1) - 1 without zero point, else 0 .. 2^bits - 1 with one.
    codes "float": e2m1 in 4 bits or e4m3 in 8 (OCP formats), symmetric. scales "e4m3": scales are 8-bit floats too,
    times one number per tensor, as in nvfp4 (which is 4-bit floats in groups of 16); else float32, or bfloat16.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    per_tensor: bool = False
    codes: str = "int"
    scales: str = "float32"

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must be in 2..8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"group_size must be at least 1, got {self.group_size}")
        if self.per_tensor and self.group_size is not None:
            raise UserError("per_tensor leaves no room for a group_size")
        if self.codes == "float" and not (self.bits in (4, 8) and self.symmetric):
            raise UserError(f"floats have 4 or 8 bits and no zero point, got {self.bits} bits")
        if self.scales not in ("float32", "bfloat16", "e4m3"):
            raise UserError(f"scales must be float32, bfloat16 or e4m3, got {self.scales!r}")

    @property
    def qmin(self) -> float:
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> float:
        if self.codes == "float":
            return 6.0 if self.bits == 4 else 448.0
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> str:
        """What users write in `quant.wgts.dtype`: sint4, uint4, fp4, nvfp4, fp8."""
        if self.codes == "float":
            return f"{'nv' * (self.scales == 'e4m3')}fp{self.bits}"
        return f"{'sint' if self.symmetric else 'uint'}{self.bits}"

    @property
    def group(self) -> str:
        """What shares a scale, for reports: tensor, channel or the group size."""
        return "tensor" if self.per_tensor else "channel" if self.group_size is None else str(self.group_size)

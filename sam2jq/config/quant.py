"""The section `quant`: how a model is quantized after training."""

from dataclasses import dataclass, field

from sam2jq.config.checks import check_bits, check_grid, one_of
from sam2jq.errors import UserError


@dataclass(frozen=True)
class CalibConfig:
    """path: a folder of images (plain, COCO, SA-1B or SA-V), one image, or scenes:<seed>; frames: of the clips that
    are taken instead of images, from SA-V, a folder of folders of frames, or scenes, 1 for images; stride: frames from
    one of them to the next; image_size in pixels, the model's own when null; sequential: part after part, each told of
    inputs that the parts before it, quantized, make, which takes a pass over the images for every part."""

    path: str = ""
    num_samples: int = 128
    frames: int = 1
    stride: int = 4
    batch_size: int = 1
    image_size: int | None = None
    sequential: bool = False

    def __post_init__(self):
        if not self.path:
            raise UserError("quant.calib.path is not set: give a folder of images, or scenes:0 for drawn ones")
        for name in ("num_samples", "frames", "stride", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"quant.calib.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class GptqConfig:
    """damp_percentage: of the Gram matrix' mean diagonal, added to it; block_size: inputs that are rounded before the
    rest is corrected; num_inv_tries: factorizations with growing damping before giving up; search_range: groups may
    clip their largest weights where that makes the others more exact."""

    damp_percentage: float = 0.01
    block_size: int = 128
    num_inv_tries: int = 200
    search_range: bool = False

    def __post_init__(self):
        if self.damp_percentage <= 0 or self.block_size < 1 or self.num_inv_tries < 1:
            raise UserError("quant.wgts.kernel_gptq: damp_percentage, block_size and num_inv_tries must be over 0")


@dataclass(frozen=True)
class LowRankConfig:
    """rank: of the branch beside each layer; num_iters: rounds of branch and rounding, the best is kept; early_stop:
    end at the first that is worse; objective: error of the output or of the weight; compensate: start from the error
    of plain rounding. exclusive: q, k and v each with a branch of their own; SAM 2 has them in one layer: false."""

    rank: int = 32
    exclusive: bool = False
    compensate: bool = False
    num_iters: int = 1
    early_stop: bool = False
    objective: str = "output"

    def __post_init__(self):
        if self.exclusive:
            raise UserError("quant.wgts.low_rank.exclusive: SAM 2's q, k and v are one layer and share its branch")
        if self.rank < 1 or self.num_iters < 1:
            raise UserError("quant.wgts.low_rank: rank and num_iters must be at least 1")
        one_of("quant.wgts.low_rank.objective", self.objective, ("output", "weight"))


@dataclass(frozen=True)
class WeightsConfig:
    """dtype: sintN or uintN, N in 2..8, fp4, nvfp4, fp8; group_shapes: [[1, g]] one scale per output and g inputs,
    [[1, -1]] per output, [[-1, -1]] per tensor; scale_dtype: float32 or bfloat16, of scales; skips: dotted prefixes
    left unquantized; bits: {dotted prefix: bits}, the longest wins; target_bits: bits a weight on average, target_mb:
    megabytes of the package, either of which makes each layer without `bits` take the width that its measured output
    error asks for; ridge: strength of the recalibration that shrinks what inputs never excite, 0 for none;
    bias_correction: take the mean error of outputs out of the bias.
    """

    dtype: str = "sint8"
    group_shapes: list[list[int]] = field(default_factory=lambda: [[1, -1]])
    scale_dtype: str = "float32"
    skips: list[str] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    target_bits: float | None = None
    target_mb: float | None = None
    kernel_gptq: GptqConfig | None = None
    low_rank: LowRankConfig | None = None
    ridge: float = 0.0
    bias_correction: bool = False

    def __post_init__(self):
        check_grid("quant.wgts", self.dtype, self.group_shapes)
        one_of("quant.wgts.scale_dtype", self.scale_dtype, ("float32", "bfloat16"))
        check_bits("quant.wgts", self.bits, self.target_bits)
        if self.mixed and ("int" not in self.dtype or (self.target_bits is not None and self.target_mb is not None)):
            raise UserError("quant.wgts: give one of target_bits and target_mb, and an integer dtype")
        if self.ridge < 0:
            raise UserError(f"quant.wgts.ridge must not be negative, got {self.ridge}")

    @property
    def mixed(self) -> bool:
        """Whether bits are to be assigned layer by layer."""
        return self.target_bits is not None or self.target_mb is not None


@dataclass(frozen=True)
class InputsConfig:
    """dtype: of what enters the layers whose weights are quantized; null leaves it as it is. group_shapes: [[1, -1]]
    one scale per token, [[1, g]] per token and g channels, [[-1, -1]] per tensor; static: the range is fixed by
    calibration, else measured at each call; skips: dotted prefixes whose inputs stay. allow_unsigned: where a sintN
    would spend half its codes on what hardly comes, as after ReLU and GELU, take uintN; unsigned: dotted prefixes of
    layers where that is so, found by calibration and written here. bits: {dotted prefix: bits}, the longest wins;
    target_bits: bits of an input on average over all multiplications, which makes each layer without `bits` take the
    width that its measured output error asks for."""

    dtype: str | None = None
    group_shapes: list[list[int]] = field(default_factory=lambda: [[1, -1]])
    static: bool = False
    skips: list[str] = field(default_factory=list)
    allow_unsigned: bool = False
    unsigned: list[str] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    target_bits: float | None = None

    key = "quant.ipts"

    def __post_init__(self):
        if self.dtype is not None:
            check_grid(self.key, self.dtype, self.group_shapes)
        check_bits(self.key, self.bits, self.target_bits)
        if (self.bits or self.mixed) and "int" not in (self.dtype or ""):
            raise UserError(f"{self.key}.bits and target_bits: set an integer dtype, such as uint4, not {self.dtype}")
        if (self.allow_unsigned or self.unsigned) and "int" not in (self.dtype or ""):
            raise UserError(f"{self.key}.allow_unsigned: dtype {self.dtype} has no unsigned twin; sint8 and others do")
        if self.static and self.group_shapes != [[-1, -1]]:
            raise UserError(
                f"{self.key}.static: a range fixed by calibration is per tensor: set group_shapes to [[-1, -1]], "
                f"not {self.group_shapes}"
            )

    @property
    def mixed(self) -> bool:
        """Whether bits are to be assigned layer by layer."""
        return self.target_bits is not None


@dataclass(frozen=True)
class OutputsConfig(InputsConfig):
    """As for inputs, of what leaves these layers, their bias added; but calibration sees no outputs, so that ranges are
    measured at each call."""

    key = "quant.opts"

    def __post_init__(self):
        super().__post_init__()
        if self.static or self.allow_unsigned or self.mixed:
            raise UserError(f"{self.key}: static, allow_unsigned and target_bits go by what calibration saw, and that "
                             "is inputs only")  # fmt: skip


SPANS = ("AbsMax", "RMS")


@dataclass(frozen=True)
class SmoothProjConfig:
    """scale = activation span^alpha / weight span^beta for each input channel. strategy: Manual takes alpha and beta
    (1 - alpha where beta is negative); GridSearch tries num_grids steps of the family that their signs select, and no
    smoothing, and keeps what errs least. granularity: Layer, or ChannelGroup to choose for each weight group."""

    granularity: str = "Layer"
    strategy: str = "Manual"
    alpha: float = 0.5
    beta: float = -1
    num_grids: int = 20
    spans: list[list[str]] = field(default_factory=lambda: [["AbsMax", "AbsMax"]])

    def __post_init__(self):
        one_of("quant.smooth.proj.granularity", self.granularity, ("Layer", "ChannelGroup"))
        one_of("quant.smooth.proj.strategy", self.strategy, ("Manual", "GridSearch"))
        for span in [name for pair in self.spans for name in pair]:
            one_of("quant.smooth.proj.spans", span, SPANS)


@dataclass(frozen=True)
class SmoothConfig:
    proj: SmoothProjConfig | None = None


@dataclass(frozen=True)
class RotationConfig:
    """transforms: [hadamard] turns what enters qkv, attn.proj and both MLP layers of the trunk; random: with signs;
    fold_heads: what enters attn.proj is turned head by head and for nothing, by the layer that makes the values."""

    transforms: list[str] = field(default_factory=list)
    random: bool = False
    fold_heads: bool = False

    def __post_init__(self):
        for name in self.transforms:
            one_of("quant.rotation.transforms", name, ("hadamard",))
        if self.fold_heads and not self.transforms:
            raise UserError("quant.rotation.fold_heads: set transforms to [hadamard] too")


@dataclass(frozen=True)
class QuantConfig:
    """bits_from: a package whose bits the layers take, such as one that was distilled, and, where ipts.dtype rounds
    inputs, those of their inputs; integer: layers whose weight and input are both quantized multiply codes, not what
    the codes stand for."""

    calib: CalibConfig = field(default_factory=CalibConfig)
    wgts: WeightsConfig = field(default_factory=WeightsConfig)
    ipts: InputsConfig = field(default_factory=InputsConfig)
    opts: OutputsConfig = field(default_factory=OutputsConfig)
    smooth: SmoothConfig = field(default_factory=SmoothConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    bits_from: str = ""
    integer: bool = False

    def __post_init__(self):
        if self.bits_from and any(part.mixed or part.bits for part in (self.wgts, self.ipts)):
            raise UserError("quant.bits_from: the package tells all bits: leave bits and targets of wgts and ipts out")
        if self.calib.sequential and (self.wgts.mixed or self.ipts.mixed):
            raise UserError("quant.calib.sequential: bits for a target are chosen in one pass: run that first, and "
                             "this with the bits in its config.yaml")  # fmt: skip

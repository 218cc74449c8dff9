"""The section `quant`: how a model is quantized after training. Sections of algorithms are defined in their files."""

from dataclasses import dataclass, field

from sam2jq.errors import ConfigError, one_of
from sam2jq.quant.algorithms.activations import InputsConfig, OutputsConfig
from sam2jq.quant.algorithms.gptq import GptqConfig
from sam2jq.quant.algorithms.lowrank import LowRankConfig
from sam2jq.quant.algorithms.reconstruct import ReconstructConfig
from sam2jq.quant.algorithms.rotate import RotationConfig
from sam2jq.quant.algorithms.smooth import SmoothConfig
from sam2jq.quant.field_types import check_types
from sam2jq.quant.spec import check_bits, parse_spec


@dataclass(frozen=True)
class CalibConfig:
    """The images of calibration: the section `quant.calib`."""

    # a folder of images (plain, COCO, SA-1B or SA-V), one image, or scenes:<seed> for synthetic ones
    path: str = ""
    # images or clips to use
    num_samples: int = 128
    # frames of a clip (SA-V, a folder of folders of frames, or scenes); 1: single images
    frames: int = 1
    # frames of the video from one frame of a clip to the next
    stride: int = 4
    # images that are compared at a time with full precision
    batch_size: int = 1
    # side of the model's input in pixels; null: the model's own
    image_size: int | None = None
    # calibrate and quantize part after part, each on inputs from the quantized parts before; one pass over the images
    # per part
    sequential: bool = False

    def __post_init__(self):
        check_types(self)
        for name in ("num_samples", "frames", "stride", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class WeightsConfig:
    """How weights are rounded: the section `quant.wgts`."""

    # sintN or uintN with N in 2..8, fp4, nvfp4, fp8
    dtype: str = "sint8"
    # [[1, g]] one scale per output channel and g inputs, [[1, -1]] per output channel, [[-1, -1]] per tensor
    group_shapes: list[list[int]] = field(default_factory=lambda: [[1, -1]])
    # dtype of the scales: float32 or bfloat16
    scale_dtype: str = "float32"
    # dotted prefixes of layers that are not quantized
    skips: list[str] = field(default_factory=list)
    # {dotted prefix: bits}; the longest prefix wins
    bits: dict[str, int] = field(default_factory=dict)
    # mean bits per weight; each layer without `bits` gets the width that `bits_by` asks for
    target_bits: float | None = None
    # size of the package in MB, in place of target_bits
    target_mb: float | None = None
    # what a target compares: outputs (the error of each layer's output), or masks (how much each layer changes them)
    bits_by: str = "outputs"
    # the rounding algorithm; null: gptq if kernel_gptq is set, else nearest
    rounding: str | None = None
    # settings of GPTQ; {} uses GPTQ with its defaults
    kernel_gptq: GptqConfig | None = None
    # low-rank branches beside the trunk's linear layers (SVDQuant)
    low_rank: LowRankConfig | None = None
    # strength of the ridge recalibration (Q-SAM2); 0: none
    ridge: float = 0.0
    # correct each bias by the shift of the mean output
    bias_correction: bool = False

    def __post_init__(self):
        check_types(self)
        parse_spec(self.dtype, self.group_shapes)
        one_of("scale_dtype", self.scale_dtype, ("float32", "bfloat16"))
        check_bits(self.bits, self.target_bits)
        one_of("bits_by", self.bits_by, ("outputs", "masks"))
        if self.mixed and ("int" not in self.dtype or (self.target_bits is not None and self.target_mb is not None)):
            raise ConfigError("target_bits and target_mb: give one of them, and an integer dtype")
        if self.ridge < 0:
            raise ConfigError(f"ridge must not be negative, got {self.ridge}")

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen layer by layer for a target."""
        return self.target_bits is not None or self.target_mb is not None


@dataclass(frozen=True)
class SmoothSection:
    """Smoothing of the inputs of linear layers: the section `quant.smooth`."""

    # settings of smoothing; null: no smoothing
    proj: SmoothConfig | None = None

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True)
class QuantConfig:
    """A recipe of post-training quantization: the section `quant`."""

    calib: CalibConfig = field(default_factory=CalibConfig)
    wgts: WeightsConfig = field(default_factory=WeightsConfig)
    ipts: InputsConfig = field(default_factory=InputsConfig)
    opts: OutputsConfig = field(default_factory=OutputsConfig)
    smooth: SmoothSection = field(default_factory=SmoothSection)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    # train the codes of the trunk's blocks; null: do not
    reconstruct: ReconstructConfig | None = None
    # a package or run whose bits the layers take and, where ipts.dtype is set, the bits of their inputs
    bits_from: str = ""
    # multiply integer codes in layers whose weight and input are both quantized
    integer: bool = False

    def __post_init__(self):
        check_types(self)
        if self.bits_from and any(part.mixed or part.bits for part in (self.wgts, self.ipts)):
            raise ConfigError("bits_from: the package sets all bits: leave bits and targets of wgts and ipts out")
        if self.reconstruct and "int" not in self.wgts.dtype:
            raise ConfigError(f"reconstruct: wgts.dtype must be sintN or uintN, got {self.wgts.dtype}")

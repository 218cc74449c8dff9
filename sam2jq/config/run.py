"""The settings of `quantize`, `segment`, `track` and `evaluate`."""

from dataclasses import dataclass, field

from sam2jq.config.checks import one_of
from sam2jq.config.quant import QuantConfig
from sam2jq.errors import UserError

DEVICES = ("auto", "cpu", "gpu", "cuda", "tpu")
FLOATS = ("float32", "bfloat16", "float16")
TASKS = ("image", "vos")


@dataclass(frozen=True)
class ModelConfig:
    """checkpoint: a file, a Hugging Face Hub id, random:<seed>, or demo, the trained nano that comes with the package
    and is nano's default; dtype: of the activations while measuring."""

    name: str = "tiny"
    version: str = "2.1"
    checkpoint: str = ""
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        if not self.checkpoint and self.name == "nano":
            object.__setattr__(self, "checkpoint", "demo")
        if not self.checkpoint:
            raise UserError("model.checkpoint is not set: give a file, a Hub id, or random:0; only nano has a default")
        one_of("model.device", self.device, DEVICES)
        one_of("model.dtype", self.dtype, FLOATS)


@dataclass(frozen=True)
class MeasureConfig:
    """Where true masks are known, for scores before and after. images: scenes:<seed> or a COCO folder, for mIoU, drawn
    scenes of calibration when empty; clips: scenes:<seed> or an SA-V folder, of which `split` is taken, for J&F;
    num_images, num_clips: the first so many, all when null."""

    images: str = ""
    num_images: int | None = None
    clips: str = ""
    split: str = "sav_val"
    num_clips: int | None = None

    def __post_init__(self):
        for name in ("images", "clips"):
            number = getattr(self, f"num_{name}")
            if number is None and getattr(self, name).startswith("scenes:"):
                raise UserError(f"measure.num_{name} is not set: drawn scenes have no end, give a number")
            if number is not None and number < 1:
                raise UserError(f"measure.num_{name} must be at least 1, got {number}")


@dataclass(frozen=True)
class CacheConfig:
    """root: where compiled programs and the statistics of calibration are kept for the next run."""

    root: str = "./cache/sam2"


@dataclass(frozen=True)
class OutputConfig:
    """A run writes the folder <root>/<job>; job is the config file's name when not set."""

    root: str = "./outputs/sam2"
    job: str = ""


@dataclass(frozen=True)
class Config:
    """save_model: write the vanilla checkpoint, and what deepcompressor keeps in cache/, beside the package;
    convert_nunchaku: write nunchaku/, which takes the trunk's linears in sint4, groups of 64."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    save_model: bool = True
    convert_nunchaku: bool = False
    seed: int = 42

    def __post_init__(self):
        if self.convert_nunchaku and self.quant.rotation.transforms:
            raise UserError(
                "convert_nunchaku: nunchaku's kernels do not rotate what enters a layer: leave quant.rotation out"
            )


@dataclass(frozen=True)
class SegmentConfig:
    """What `sam2jq segment` takes beside the image and its prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """data: scenes:<seed> or, for the task image, a COCO folder; for vos, an SA-V folder, of which `split` is taken.

    num_samples: images or clips, all when null; masks: also write every mask of vos, a PNG an object and frame.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    task: str = "image"
    data: str = ""
    split: str = "sav_val"
    num_samples: int | None = None
    masks: bool = True
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        one_of("task", self.task, TASKS)
        if not self.data:
            raise UserError("data is not set: give a COCO or SA-V folder, or scenes:0 for drawn ones")
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {self.num_samples}")

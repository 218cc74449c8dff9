"""Every setting of a run: frozen dataclasses, read from YAML and flags, checked before any model is loaded."""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

from sam2jq.tree import suggest

DTYPE = re.compile(r"[su]int[2-8]|fp4|nvfp4|fp8")
DEVICES = ("auto", "cpu", "gpu", "cuda", "tpu")
FLOATS = ("float32", "bfloat16", "float16")


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
            raise ValueError("model.checkpoint is not set: give a file, a Hub id, or random:0; only nano has a default")
        one_of("model.device", self.device, DEVICES)
        one_of("model.dtype", self.dtype, FLOATS)


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
            raise ValueError("quant.calib.path is not set: give a folder of images, or scenes:0 for drawn ones")
        for name in ("num_samples", "frames", "stride", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"quant.calib.{name} must be at least 1, got {getattr(self, name)}")


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
            raise ValueError("quant.wgts.kernel_gptq: damp_percentage, block_size and num_inv_tries must be over 0")


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
            raise ValueError("quant.wgts.low_rank.exclusive: SAM 2's q, k and v are one layer and share its branch")
        if self.rank < 1 or self.num_iters < 1:
            raise ValueError("quant.wgts.low_rank: rank and num_iters must be at least 1")
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
            raise ValueError("quant.wgts: give one of target_bits and target_mb, and an integer dtype")
        if self.ridge < 0:
            raise ValueError(f"quant.wgts.ridge must not be negative, got {self.ridge}")

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
            raise ValueError(f"{self.key}.bits and target_bits: set an integer dtype, such as uint4, not {self.dtype}")
        if (self.allow_unsigned or self.unsigned) and "int" not in (self.dtype or ""):
            raise ValueError(f"{self.key}.allow_unsigned: dtype {self.dtype} has no unsigned twin; sint8 and others do")
        if self.static and self.group_shapes != [[-1, -1]]:
            raise ValueError(
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
            raise ValueError(f"{self.key}: static, allow_unsigned and target_bits go by what calibration saw, and that "
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
            raise ValueError("quant.rotation.fold_heads: set transforms to [hadamard] too")


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
            raise ValueError("quant.bits_from: the package tells all bits: leave bits and targets of wgts and ipts out")
        if self.calib.sequential and (self.wgts.mixed or self.ipts.mixed):
            raise ValueError("quant.calib.sequential: bits for a target are chosen in one pass: run that first, and "
                             "this with the bits in its config.yaml")  # fmt: skip


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
                raise ValueError(f"measure.num_{name} is not set: drawn scenes have no end, give a number")
            if number is not None and number < 1:
                raise ValueError(f"measure.num_{name} must be at least 1, got {number}")


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
            raise ValueError(
                "convert_nunchaku: nunchaku's kernels do not rotate what enters a layer: leave quant.rotation out"
            )


@dataclass(frozen=True)
class SegmentConfig:
    """What `sam2jq segment` takes beside the image and its prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


TASKS = ("image", "vos")


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
            raise ValueError("data is not set: give a COCO or SA-V folder, or scenes:0 for drawn ones")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")


@dataclass(frozen=True)
class DataConfig:
    """train, val: folders of images, SA-V roots (sav_train is taken for the one, sav_val for the other), or
    scenes:<seed>; train_samples, val_samples: how many frames or clips, all when null; frames: of a clip, 1 for
    stills; stride: frames from one of them to the next; image_size in pixels, the model's own when null."""

    train: str = ""
    val: str = ""
    train_samples: int | None = None
    val_samples: int | None = 128
    frames: int = 1
    stride: int = 4
    image_size: int | None = None

    def __post_init__(self):
        for name in ("train", "val"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is not set: give a folder of frames, an SA-V root, or scenes:<seed>")
        for name in ("train_samples", "val_samples", "frames", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class StudentConfig:
    """wgts: the grid on which layers start that are not quantized yet, its dtype's bits or those of initial_bits; ipts:
    as in quant; min_bits: no layer falls below; target_bits: mean bits a weight at which lowering ends;
    target_roots: dotted prefixes of the layers that may lose bits, all when empty; learn_clipping: each group learns
    the share of its range that its grid spans."""

    wgts: WeightsConfig = field(default_factory=WeightsConfig)
    ipts: InputsConfig = field(default_factory=InputsConfig)
    initial_bits: int | None = None
    min_bits: int = 4
    target_bits: float | None = None
    target_roots: list[str] = field(default_factory=list)
    learn_clipping: bool = True

    def __post_init__(self):
        wgts = self.wgts
        if wgts.mixed or wgts.kernel_gptq or wgts.low_rank or wgts.ridge or wgts.bias_correction:
            raise ValueError("quant.wgts: this rounds to nearest: give GPTQ, branches and bits for a target under ptq, "
                             "or as student.checkpoint a package that quantize made with them")  # fmt: skip
        if self.ipts.static or self.ipts.allow_unsigned or self.ipts.mixed:
            raise ValueError("quant.ipts.static, allow_unsigned and target_bits go by calibration: give them under "
                             "ptq, or as student.checkpoint a package that quantize made with them")  # fmt: skip
        if self.initial_bits is not None and not 2 <= self.initial_bits <= 8:
            raise ValueError(f"quant.initial_bits must be in 2..8, got {self.initial_bits}")
        if not 2 <= self.min_bits <= self.starts_at:
            raise ValueError(
                f"quant.min_bits {self.min_bits}: must be in 2..{self.starts_at}, where the student starts"
            )
        if self.target_bits is not None and self.target_bits < self.min_bits:
            raise ValueError(f"quant.target_bits {self.target_bits} is under quant.min_bits {self.min_bits}")

    @property
    def starts_at(self) -> int:
        return self.initial_bits or int(self.wgts.dtype[-1])


METHODS = ("baseline", "variance", "ladder", "fixed")


@dataclass(frozen=True)
class DistillLossConfig:
    """layers, affinity, features, masks, ious, memory: weights of the parts of the loss; prompts: random clicks a
    clip, each asked again as a box and with a second click; objects: followed into the clip's last frame.

    confidence_method: baseline lowers layers whose mean loss over the last `window` steps is at most layer_threshold,
    variance those whose loss also varies by at most variance_threshold of its square; ladder takes for each layer the
    lowest of bit_candidates whose weight, or, with confidence_on output, whose outputs on the first clips err by at
    most confidence_threshold, once; fixed lowers none.
    impact_threshold: by how much of the validation loss one layer's bit may raise it; impact_budget: all bits of an
    epoch together; impact_floor: losses below count as this; candidates: layers tried an epoch, all when null;
    settle_epochs: the last ones, in which no bit is taken; cache_teacher: keep the teacher's answers in cache.root.
    """

    layers: float = 1.0
    affinity: float = 0.0
    features: float = 1.0
    masks: float = 1.0
    ious: float = 1.0
    memory: float = 1.0
    prompts: int = 8
    objects: int = 2
    confidence_method: str = "baseline"
    window: int = 8
    layer_threshold: float = 0.1
    variance_threshold: float = 0.05
    bit_candidates: list[int] = field(default_factory=lambda: [8, 6, 4])
    confidence_threshold: float = 0.03
    confidence_on: str = "weight"
    impact_threshold: float = 0.3
    impact_budget: float = 1.0
    impact_floor: float = 0.01
    candidates: int | None = None
    cooldown_epochs: int = 1
    cache_teacher: bool = False

    def __post_init__(self):
        one_of("distill.confidence_method", self.confidence_method, METHODS)
        one_of("distill.confidence_on", self.confidence_on, ("weight", "output"))
        wrong = [name for name in ("prompts", "objects", "window") if getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"distill.{wrong[0]} must be at least 1")
        if 2 * self.objects > self.prompts:
            raise ValueError(f"distill.objects {self.objects}: at most half of the {self.prompts} prompts are followed")
        if not self.layers and self.confidence_method in ("baseline", "variance"):
            raise ValueError("distill.layers: confidence looks at the losses of layers, so this weight must be over 0")


@dataclass(frozen=True)
class TrainConfig:
    """batch_size: clips a step, over all devices; schedule: cosine or constant, after warmup_steps; accumulate: steps
    whose gradients make one update; ema: decay of the average of params that is validated and written, 0 for none;
    parallel: jit or pmap; remat: compute the trunk's blocks once more for their gradient, for a quarter of the memory;
    patience: epochs without a better validation loss before it stops; checkpoint_every, log_interval: steps."""

    epochs: int = 5
    batch_size: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    parallel: str = "jit"
    remat: bool = False
    patience: int | None = None
    checkpoint_every: int = 100
    log_interval: int = 10

    def __post_init__(self):
        one_of("train.schedule", self.schedule, ("cosine", "constant"))
        one_of("train.parallel", self.parallel, ("jit", "pmap"))
        wrong = [name for name in ("epochs", "batch_size", "accumulate", "checkpoint_every", "log_interval")
                 if getattr(self, name) < 1]  # fmt: skip
        if wrong:
            raise ValueError(f"train.{wrong[0]} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema must be in 0..1, below 1, got {self.ema}")


@dataclass(frozen=True)
class DistributedConfig:
    """coordinator: HOST:PORT of process 0, or auto where Slurm or a TPU pod tells; timeout: seconds to wait for all."""

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None
    timeout: int = 300

    def __post_init__(self):
        alone = self.coordinator in (None, "auto")
        if alone != (self.processes is None) or alone != (self.index is None):
            raise ValueError("distributed: coordinator HOST:PORT, processes and index belong together")


@dataclass(frozen=True)
class TrackConfig:
    """project: of Weights & Biases, where curves go too when set; mode: online or offline; tensorboard: into the run's
    folder."""

    project: str | None = None
    entity: str | None = None
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "online"
    tensorboard: bool = False

    def __post_init__(self):
        one_of("track.mode", self.mode, ("online", "offline"))


@dataclass(frozen=True)
class DistillConfig:
    """teacher and student: as in `model`; the student may be a package, whose bits and leaves it keeps. Its dtype is
    that of the computation, weights stay float32. ptq: what quantize has under `quant`, by which the student is
    quantized before it learns; quant: how the layers start that are not quantized by then, and how far bits may fall.
    measure: as for quantize, drawn scenes of data.val when empty."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ptq: QuantConfig | None = None
    quant: StudentConfig = field(default_factory=StudentConfig)
    distill: DistillLossConfig = field(default_factory=DistillLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    seed: int = 42

    def __post_init__(self):
        if self.ptq and self.ptq.calib.image_size not in (None, self.data.image_size):
            raise ValueError("ptq.calib.image_size: teacher and student see images of data.image_size: set that")
        if self.ptq and self.ptq.rotation.fold_heads:
            raise ValueError("ptq.rotation.fold_heads: such layers no longer answer as the teacher's do: leave it out")


def keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema with its default: what can follow `--`."""
    found = []
    for entry in dataclasses.fields(schema):
        if kind := section(get_type_hints(schema)[entry.name]):
            found += keys(kind, f"{prefix}{entry.name}.")
        else:
            made = entry.default_factory is not dataclasses.MISSING
            found.append(f"--{prefix}{entry.name} {entry.default_factory() if made else entry.default!r}")
    return found


def check_grid(key: str, dtype: str, group_shapes: list[list[int]]) -> None:
    """ValueError unless both say how numbers are rounded; `key` is the section they stand in."""
    if not DTYPE.fullmatch(dtype):
        raise ValueError(f"{key}.dtype {dtype!r}: allowed are sintN and uintN with N (bits) in 2..8, fp4, nvfp4, fp8")
    if dtype == "nvfp4" and group_shapes != [[1, 16]]:
        raise ValueError(f"{key}.group_shapes {group_shapes}: nvfp4 is groups of 16, [[1, 16]]")
    match group_shapes:
        case [[1, size]] if size == -1 or size > 0:
            pass
        case [[-1, -1]]:
            pass
        case _:
            raise ValueError(f"{key}.group_shapes {group_shapes}: allowed are [[1, g]], [[1, -1]], [[-1, -1]]")


def check_bits(key: str, bits: dict[str, int], target: float | None) -> None:
    """ValueError unless layers can have these bits; `key` is the section they stand in."""
    wrong = {prefix: width for prefix, width in bits.items() if not 2 <= width <= 8}
    if wrong:
        raise ValueError(f"{key}.bits: bits must be in 2..8, got {wrong}")
    if target is not None and not 2 <= target <= 8:
        raise ValueError(f"{key}.target_bits: layers have 2 to 8 bits, so {target} is out of reach")


def section(kind) -> type | None:
    """The dataclass in a type such as GptqConfig or GptqConfig | None; None where there is none."""
    return next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key} {value!r}: allowed are {', '.join(allowed)}{suggest(value, allowed)}")


def load(path: str | None, flags: list[str], schema: type = Config):
    """The `schema` in a YAML file, overridden by flags such as ["--model.name", "tiny", "--seed=1"].

    ValueError, FileNotFoundError: one line naming the key and what is allowed.
    """
    settings = {} if path is None else read_yaml(path)
    for key, value in parse_flags(flags).items():
        *sections, last = key.split(".")
        node = settings
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--{key}: {section} is not a section")
        node[last] = value
    check_keys(settings, schema)
    try:
        return draccus.decode(schema, settings)
    except DraccusException as error:
        within, last = str(error).startswith("`ptq`"), error
        while isinstance(last.__cause__, DraccusException):  # of a section that may be null, the first says nothing
            last = last.__cause__
        unmet = str(last).startswith("Couldn't instantiate")  # a __post_init__ above said why
        why = " ".join(str(last.__cause__ if unmet else last).split())
        raise ValueError(rename_quant_to_ptq(why) if within else why) from error


def rename_quant_to_ptq(message: str) -> str:
    """An error of quantize's section `quant`, for the same that stands under `ptq`."""
    return message.replace("quant.", "ptq.")


def sweep_combinations(overs: list[str]) -> list[dict[str, object]]:
    """Every combination of ["quant.wgts.dtype=sint8,sint4", "seed=1,2"] as {key: value}; values are YAML."""
    axes = {}
    for over in overs:
        key, equals, values = over.partition("=")
        try:
            axes[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise ValueError(f"--over {over}: the values are not YAML, with commas between") from error
        if not (key and equals and axes[key]):
            raise ValueError(f"--over {over}: write key=value,value such as quant.wgts.dtype=sint8,sint4")
    if len(axes) < len(overs):
        raise ValueError(f"--over {' --over '.join(overs)}: give all values of a key in one --over")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        near = suggest(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")])
        raise FileNotFoundError(f"no config at {path}{near}")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: it must be a mapping such as model: {{name: tiny}}")
    return settings


def parse_flags(flags: list[str]) -> dict[str, object]:
    """{"model.name": "tiny", "seed": 1} of ["--model.name", "tiny", "--seed=1"]; a flag without a value is true."""
    parsed, rest = {}, list(flags)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}: settings are given as --key value")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            parsed[flag[2:].replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag} {value!r} is not a YAML value") from error
    return parsed


def check_keys(settings: dict, schema: type, prefix: str = "") -> None:
    """ValueError naming the first key that `schema` does not have, with the one that may have been meant."""
    known = get_type_hints(schema)
    for key, value in settings.items():
        if key not in known:
            allowed = f"{prefix or 'top level '}allows {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key}{suggest(str(key), known)}; {allowed}")
        kind = section(known[key])
        if kind and not (value is None and kind is not known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} must be a section such as {key}: {{...}}, got {value!r}")
            check_keys(value, kind, f"{prefix}{key}.")


def to_dict(config) -> dict:
    """`config` as nested dicts of plain values."""
    return draccus.encode(config)


def dump(config) -> str:
    """The YAML text that `load` reads back as `config`."""
    return draccus.dump(config)

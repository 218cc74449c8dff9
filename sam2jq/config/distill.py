"""The settings of `distill`."""

from dataclasses import dataclass, field

from sam2jq.config.checks import one_of
from sam2jq.config.quant import InputsConfig, QuantConfig, WeightsConfig
from sam2jq.config.run import CacheConfig, MeasureConfig, ModelConfig, OutputConfig
from sam2jq.errors import UserError

METHODS = ("baseline", "variance", "ladder", "fixed")


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
                raise UserError(f"data.{name} is not set: give a folder of frames, an SA-V root, or scenes:<seed>")
        for name in ("train_samples", "val_samples", "frames", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")


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
            raise UserError("quant.wgts: this rounds to nearest: give GPTQ, branches and bits for a target under ptq, "
                             "or as student.checkpoint a package that quantize made with them")  # fmt: skip
        if self.ipts.static or self.ipts.allow_unsigned or self.ipts.mixed:
            raise UserError("quant.ipts.static, allow_unsigned and target_bits go by calibration: give them under "
                             "ptq, or as student.checkpoint a package that quantize made with them")  # fmt: skip
        if self.initial_bits is not None and not 2 <= self.initial_bits <= 8:
            raise UserError(f"quant.initial_bits must be in 2..8, got {self.initial_bits}")
        if not 2 <= self.min_bits <= self.starts_at:
            raise UserError(f"quant.min_bits {self.min_bits}: must be in 2..{self.starts_at}, where the student starts")
        if self.target_bits is not None and self.target_bits < self.min_bits:
            raise UserError(f"quant.target_bits {self.target_bits} is under quant.min_bits {self.min_bits}")

    @property
    def starts_at(self) -> int:
        return self.initial_bits or int(self.wgts.dtype[-1])


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
            raise UserError(f"distill.{wrong[0]} must be at least 1")
        if 2 * self.objects > self.prompts:
            raise UserError(f"distill.objects {self.objects}: at most half of the {self.prompts} prompts are followed")
        if not self.layers and self.confidence_method in ("baseline", "variance"):
            raise UserError("distill.layers: confidence looks at the losses of layers, so this weight must be over 0")


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
            raise UserError(f"train.{wrong[0]} must be at least 1")
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema must be in 0..1, below 1, got {self.ema}")


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
            raise UserError("distributed: coordinator HOST:PORT, processes and index belong together")


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
            raise UserError("ptq.calib.image_size: teacher and student see images of data.image_size: set that")
        if self.ptq and self.ptq.rotation.fold_heads:
            raise UserError("ptq.rotation.fold_heads: such layers no longer answer as the teacher's do: leave it out")

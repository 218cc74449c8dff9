"""The settings of `distill`."""

from dataclasses import dataclass, field

from sam2jq.config.quant import InputsConfig, QuantConfig, WeightsConfig
from sam2jq.config.run import CacheConfig, DistributedConfig, MeasureConfig, ModelConfig, OutputConfig, same_size
from sam2jq.errors import ConfigError, one_of
from sam2jq.quant.field_types import check_types

METHODS = ("baseline", "variance", "ladder", "fixed")


@dataclass(frozen=True)
class DataConfig:
    """Frames to train and to validate on: the section `data`."""

    # a folder of images, an SA-V root (its sav_train), or scenes:<seed>
    train: str = ""
    # a folder of images, an SA-V root (its sav_val), or scenes:<seed>; must not share a frame with train
    val: str = ""
    # images or clips to train on; null: all
    train_samples: int | None = None
    # images or clips to validate on; null: all
    val_samples: int | None = 128
    # frames of a clip; 1: single images
    frames: int = 1
    # frames of the video from one frame of a clip to the next
    stride: int = 4
    # side of the models' input in pixels; null: the models' own
    image_size: int | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("train", "val"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set: give a folder of frames, an SA-V root, or scenes:<seed>")
        for name in ("train_samples", "val_samples", "frames", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class StudentConfig:
    """How the student is quantized while it trains: the section `quant` of `distill`."""

    # grids of layers that are not quantized yet, rounded to nearest
    wgts: WeightsConfig = field(default_factory=WeightsConfig)
    # rounding of the inputs of these layers
    ipts: InputsConfig = field(default_factory=InputsConfig)
    # bits at the start, in place of those of wgts.dtype
    initial_bits: int | None = None
    # no layer gets fewer bits
    min_bits: int = 4
    # mean bits per weight at which bits stop falling
    target_bits: float | None = None
    # dotted prefixes of the layers whose bits may fall; []: all
    target_roots: list[str] = field(default_factory=list)
    # train the share of each group's range that its grid spans
    learn_clipping: bool = True

    def __post_init__(self):
        check_types(self)
        wgts = self.wgts
        rounded = wgts.rounding in (None, "nearest")
        if not rounded or wgts.mixed or wgts.kernel_gptq or wgts.low_rank or wgts.ridge or wgts.bias_correction:
            raise ConfigError(
                "wgts: here weights are only rounded to nearest: give GPTQ, branches and bits for a target under ptq, "
                "or a package that quantize made with them as student.checkpoint"
            )
        if self.ipts.static or self.ipts.allow_unsigned or self.ipts.mixed:
            raise ConfigError(
                "ipts.static, allow_unsigned and target_bits need calibration: give them under ptq, or a package that "
                "quantize made with them as student.checkpoint"
            )
        if self.initial_bits is not None and not 2 <= self.initial_bits <= 8:
            raise ConfigError(f"initial_bits must be in 2..8, got {self.initial_bits}")
        if not 2 <= self.min_bits <= self.starts_at:
            raise ConfigError(f"min_bits {self.min_bits}: must be in 2..{self.starts_at}, where the student starts")
        if self.target_bits is not None and self.target_bits < self.min_bits:
            raise ConfigError(f"target_bits {self.target_bits} is under min_bits {self.min_bits}")

    @property
    def starts_at(self) -> int:
        """The bits of layers that are not quantized yet."""
        return self.initial_bits or int(self.wgts.dtype[-1])


@dataclass(frozen=True)
class DistillLossConfig:
    """The loss between student and teacher."""

    # weight of the loss on mean and deviation of each layer's outputs
    layers: float = 1.0
    # weight of the loss on cosines between places of each stage's map
    affinity: float = 0.0
    # weight of the loss on the three feature maps that the decoder reads
    features: float = 1.0
    # weight of the loss on mask logits
    masks: float = 1.0
    # weight of the loss on predicted IoUs and object scores
    ious: float = 1.0
    # weight of the loss on objects tracked into the clip's last frame
    memory: float = 1.0
    # random clicks per clip; each is used again as a box and with a second click
    prompts: int = 8
    # objects tracked into the clip's last frame
    objects: int = 2
    # keep the teacher's outputs in cache.root
    cache_teacher: bool = False

    def __post_init__(self):
        check_types(self)
        for name in ("prompts", "objects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")
        if 2 * self.objects > self.prompts:
            raise ConfigError(f"objects {self.objects}: at most half of the {self.prompts} prompts can be tracked")


@dataclass(frozen=True)
class BitScheduleConfig:
    """Which layers lose a bit, and when."""

    # baseline: layers with a small loss; variance: with a small and steady loss; ladder: bits are chosen once, before
    # training; fixed: bits stay
    confidence_method: str = "baseline"
    # steps whose losses decide
    window: int = 8
    # largest mean loss of a layer that may lose a bit
    layer_threshold: float = 0.1
    # largest variance of that loss, as a share of its squared mean (method variance)
    variance_threshold: float = 0.05
    # bits to choose from (method ladder)
    bit_candidates: list[int] = field(default_factory=lambda: [8, 6, 4])
    # largest relative error at the chosen bits (method ladder)
    confidence_threshold: float = 0.03
    # error of the weight or of the output (method ladder): weight or output
    confidence_on: str = "weight"
    # largest relative rise of the validation loss by one layer's bit
    impact_threshold: float = 0.3
    # largest relative rise of the validation loss by all bits of one epoch
    impact_budget: float = 1.0
    # validation losses below this count as this when rises are made relative
    impact_floor: float = 0.01
    # layers that are tried per epoch, the most confident first; null: all
    candidates: int | None = None
    # epochs at the end in which no layer loses a bit
    cooldown_epochs: int = 1

    def __post_init__(self):
        check_types(self)
        one_of("confidence_method", self.confidence_method, METHODS)
        one_of("confidence_on", self.confidence_on, ("weight", "output"))
        if self.window < 1:
            raise ConfigError("window must be at least 1")


@dataclass(frozen=True)
class DistillSection(BitScheduleConfig, DistillLossConfig):
    """The loss and the bit schedule: the section `distill`."""

    def __post_init__(self):
        check_types(self)
        DistillLossConfig.__post_init__(self)
        BitScheduleConfig.__post_init__(self)
        if not self.layers and self.confidence_method in ("baseline", "variance"):
            raise ConfigError(
                f"layers: confidence_method {self.confidence_method} reads the losses of layers, so their weight must "
                "be over 0"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the student trains: the section `train`."""

    # passes over the training data
    epochs: int = 5
    # clips per step, over all devices
    batch_size: int = 1
    # peak learning rate of AdamW
    learning_rate: float = 1e-4
    # learning rate after warm-up: cosine or constant
    schedule: str = "cosine"
    # updates of linear warm-up
    warmup_steps: int = 20
    # weight decay of AdamW
    weight_decay: float = 1e-6
    # gradients are clipped to this global norm
    max_grad_norm: float = 1.0
    # steps whose gradients are averaged for one update
    accumulate: int = 1
    # decay of the moving average of params that is validated and saved; 0: none
    ema: float = 0.0
    # how steps run on several devices: jit or pmap
    parallel: str = "jit"
    # recompute the trunk's blocks for their gradient: less memory, more time
    remat: bool = False
    # epochs without a better validation loss before training stops; null: never
    patience: int | None = None
    # steps between checkpoints
    checkpoint_every: int = 100
    # steps between rows of metrics.jsonl
    log_interval: int = 10

    def __post_init__(self):
        check_types(self)
        one_of("schedule", self.schedule, ("cosine", "constant"))
        one_of("parallel", self.parallel, ("jit", "pmap"))
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every", "log_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in 0..1, below 1, got {self.ema}")


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics are logged beside metrics.jsonl: the section `track`."""

    # project of Weights & Biases; null: not used
    project: str | None = None
    # entity of Weights & Biases
    entity: str | None = None
    # name of the run there
    run_name: str | None = None
    # tags of the run there
    tags: list[str] = field(default_factory=list)
    # online or offline
    mode: str = "online"
    # write TensorBoard files into the run's folder
    tensorboard: bool = False

    def __post_init__(self):
        check_types(self)
        one_of("mode", self.mode, ("online", "offline"))


@dataclass(frozen=True)
class DistillConfig:
    """The settings of `distill`."""

    # full-precision model whose outputs the student learns
    teacher: ModelConfig = field(default_factory=ModelConfig)
    # model to quantize; a package keeps its bits and leaves; weights train in float32, activations have its dtype
    student: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # post-training quantization of the student before it trains, as the section quant of `quantize`; null: none
    ptq: QuantConfig | None = None
    quant: StudentConfig = field(default_factory=StudentConfig)
    distill: DistillSection = field(default_factory=DistillSection)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    # seed of everything random; equal seeds give equal results on one device
    seed: int = 42

    def __post_init__(self):
        check_types(self)
        if self.ptq and not self.ptq.calib.path:
            raise ConfigError("ptq.calib.path is not set: give a folder of images, or scenes:0 for synthetic ones")
        if self.ptq and self.ptq.calib.image_size not in (None, self.data.image_size):
            raise ConfigError("ptq.calib.image_size: both models use data.image_size: set that")
        for key in ("teacher", "student"):
            size = getattr(self, key).image_size
            same_size("data.image_size", self.data.image_size, f"{key}.image_size", size)
        same_size("student.image_size", self.student.image_size, "teacher.image_size", self.teacher.image_size)
        if self.ptq and self.ptq.rotation.fold_heads:
            raise ConfigError("ptq.rotation.fold_heads: it changes layers' outputs, which the loss compares with the "
                              "teacher's: leave it out")  # fmt: skip

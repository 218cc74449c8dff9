"""The settings of `quantize`, `segment`, `track` and `evaluate`."""

from dataclasses import dataclass, field

from sam2jq.config.quant import QuantConfig
from sam2jq.errors import ConfigError, one_of
from sam2jq.models.variants import FLOATS, MEMORY_BITS, VARIANTS, VERSIONS
from sam2jq.quant.field_types import check_types

DEVICES = ("auto", "cpu", "gpu", "cuda", "tpu")
DTYPES = ("auto", *FLOATS)
TASKS = ("image", "vos", "everything")
ENGINES = ("auto", "openvino", "onnxruntime")


@dataclass(frozen=True)
class ModelConfig:
    """A model and its checkpoint: the section `model`, or `teacher` and `student`."""

    # tiny, small, base-plus, large, or nano, the demo model; null: what the checkpoint holds (random:<seed>: tiny)
    name: str | None = None
    # "2.0" or "2.1"; null: what the checkpoint holds
    version: str | None = None
    # a file (file.pt#ema where it holds several models), a folder, a Hugging Face Hub id, random:<seed>, or demo, the
    # trained nano that comes with the package; segment, track and evaluate take a folder of ONNX files, too
    checkpoint: str = ""
    # side of the model's input in pixels; null: what the checkpoint holds, else the model's own
    image_size: int | None = None
    # auto, cpu, gpu, cuda or tpu
    device: str = "auto"
    # dtype of the activations: float32, bfloat16, float16, or auto: bfloat16 on GPUs and TPUs, float32 on CPUs
    dtype: str = "auto"

    def __post_init__(self):
        check_types(self)
        if self.name is not None:
            one_of("name", self.name.replace("_", "-"), VARIANTS)
        if self.version is not None:
            one_of("version", self.version, VERSIONS)
        if not self.checkpoint and self.name == "nano":
            object.__setattr__(self, "checkpoint", "demo")
        if not self.checkpoint:
            raise ConfigError("checkpoint is not set: give a file, a Hub id, or random:0; only nano has a default")
        if self.name is None and self.checkpoint.startswith("random:"):
            object.__setattr__(self, "name", "tiny")
        one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, DTYPES)


def same_size(key: str, size: int | None, model_key: str, model_size: int | None) -> None:
    """Raises ConfigError if two settings of the model's image size are both set, and differ."""
    if size is not None and model_size is not None and size != model_size:
        raise ConfigError(f"{key} is {size} and {model_key} is {model_size}: they are one size, set only one")


@dataclass(frozen=True)
class EverythingConfig:
    """The settings of AutomaticMaskGenerator: the section `everything` of `segment`, `evaluate` and `measure`."""

    # clicks in a row and in a column
    points_per_side: int = 32
    # clicks in one call of the model
    points_per_batch: int = 64
    # masks with a lower estimated IoU are left out
    pred_iou_thresh: float = 0.8
    # masks with a lower stability are left out: the IoU of the masks at logits of + and - stability_score_offset
    stability_score_thresh: float = 0.95
    # logits around the threshold of masks
    stability_score_offset: float = 1.0
    # of masks whose boxes have a higher IoU, one remains
    box_nms_thresh: float = 0.7
    # layers of crops that are searched, too: 4 crops in the first one, 16 in the second
    crop_n_layers: int = 0
    # box_nms_thresh between crops
    crop_nms_thresh: float = 0.7
    # overlap of the first layer's crops, relative to the image's shorter side
    crop_overlap_ratio: float = 512 / 1500
    # points_per_side is divided by it in each further layer
    crop_n_points_downscale_factor: int = 1
    # holes and regions up to this many pixels of a mask in low resolution are removed
    min_mask_region_area: int = 0
    # each mask is refined once
    use_m2m: bool = False
    # three masks per click, or one
    multimask_output: bool = True

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True)
class MeasureConfig:
    """Images and clips with ground truth, for scores before and after: the section `measure`."""

    # scenes:<seed>, or a COCO, LVIS, Roboflow or SA-1B folder, for mIoU; empty: calibration's if these are scenes
    images: str = ""
    # number of images, from the first; null: all
    num_images: int | None = None
    # number of annotated images that may be missing; they are left out
    allow_missing: int = 0
    # scenes:<seed>, or an SA-V, DAVIS, MOSE or YouTube-VOS folder, for J&F
    clips: str = ""
    # split of the folder; empty: sav_val, val or valid
    split: str = ""
    # number of clips, from the first; null: all
    num_clips: int | None = None
    # 8, 4 or both: J&F of the result also with memories of earlier frames in so many bits, as `track --memory_bits`
    memory_bits: list[int] = field(default_factory=list)
    # number of images, of those for mIoU if there are, else of calibration's, in which the masks of `segment
    # --everything` are compared with those of full precision
    num_everything: int = 0
    everything: EverythingConfig = field(default_factory=EverythingConfig)

    def __post_init__(self):
        check_types(self)
        for name in ("images", "clips"):
            number = getattr(self, f"num_{name}")
            if number is None and getattr(self, name).startswith("scenes:"):
                raise ConfigError(f"num_{name} is not set: there is no end of synthetic scenes, give a number")
            if number is not None and number < 1:
                raise ConfigError(f"num_{name} must be at least 1, got {number}")
        for bits in self.memory_bits:
            check_memory_bits(bits)
        if self.memory_bits and not self.clips:
            raise ConfigError("memory_bits: it is measured on clips: set clips too, or leave it out")
        for name in ("allow_missing", "num_everything"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class CacheConfig:
    """Files that later runs use again: the section `cache`."""

    # folder of compiled programs, calibration statistics and teacher targets
    root: str = "./cache/sam2"
    # limit in MB for the compiled programs, whose oldest are deleted at the start of a run; -1: no limit
    max_compiled_mb: int = 1000

    def __post_init__(self):
        check_types(self)
        if self.max_compiled_mb < -1:
            raise ConfigError(f"max_compiled_mb must be at least 0, or -1 for no limit, got {self.max_compiled_mb}")


@dataclass(frozen=True)
class OutputConfig:
    """Where a run writes, the folder <root>/<job>: the section `output`."""

    # folder of all runs
    root: str = "./outputs/sam2"
    # name of the run, which is no path; empty: the name of the config file
    job: str = ""

    def __post_init__(self):
        check_types(self)
        if self.job in (".", "..") or set(self.job) & set("/\\"):
            raise ConfigError(f"job {self.job!r}: it is the name of a folder in output.root, not a path: set root, too")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, each with its own devices: the section `distributed`."""

    # HOST:PORT of process 0, or auto under Slurm and on TPU pods; null: one process
    coordinator: str | None = None
    # number of processes
    processes: int | None = None
    # number of this process, from 0
    index: int | None = None
    # seconds to wait for the other processes
    timeout: int = 300

    def __post_init__(self):
        check_types(self)
        alone = self.coordinator in (None, "auto")
        if alone != (self.processes is None) or alone != (self.index is None):
            raise ConfigError("coordinator HOST:PORT, processes and index belong together")
        if alone:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"coordinator {self.coordinator!r}: give HOST:PORT, such as localhost:1234")
        if self.processes < 1:
            raise ConfigError(f"processes must be at least 1, got {self.processes}")
        if not 0 <= self.index < self.processes:
            raise ConfigError(f"index must be 0 to {self.processes - 1}, got {self.index}")


@dataclass(frozen=True)
class Config:
    """The settings of `quantize`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    # write vanilla.pt for build_sam2, and deepcompressor's files in cache/, beside the package
    save_model: bool = True
    # write nunchaku/: the trunk's linear layers in sint4 with groups of 64
    convert_nunchaku: bool = False
    # write onnx/: the files of export --to onnx, and measure the masks that the installed engines compute from them
    convert_onnx: bool = False
    # seed of everything random; equal seeds give equal results on one device
    seed: int = 42

    def __post_init__(self):
        check_types(self)
        if not self.quant.calib.path:
            raise ConfigError("quant.calib.path is not set: give a folder of images, or scenes:0 for synthetic ones")
        same_size("quant.calib.image_size", self.quant.calib.image_size, "model.image_size", self.model.image_size)
        if self.convert_nunchaku and self.quant.rotation.transforms:
            raise ConfigError("convert_nunchaku: nunchaku's kernels cannot rotate inputs: leave quant.rotation out")
        alone = {"convert_nunchaku": self.convert_nunchaku, "convert_onnx": self.convert_onnx}
        alone["quant.reconstruct"] = self.quant.reconstruct
        if self.distributed.coordinator and any(alone.values()):
            key = next(key for key, is_set in alone.items() if is_set)
            raise ConfigError(f"{key}: this runs in one process: leave it or distributed.coordinator out")
        ipts = self.quant.ipts
        if self.convert_onnx and (self.quant.opts.dtype or (ipts.dtype and not (ipts.static and "int" in ipts.dtype))):
            raise ConfigError(
                "convert_onnx: engines have kernels for integer inputs on a fixed grid only: set quant.ipts.static to "
                "true, with group_shapes [[-1, -1]] and dtype uint8, and leave quant.opts out"
            )


def check_memory_bits(bits: int | None) -> None:
    """Raises ConfigError unless memories can be stored in `bits`."""
    if bits not in (None, *MEMORY_BITS):
        raise ConfigError(f"memory_bits must be 8, 4 or null, got {bits}")


@dataclass(frozen=True)
class PredictConfig:
    """The settings of `segment` and `track`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    # that runs ONNX files: openvino, onnxruntime, or auto, the first that is installed
    engine: str = "auto"

    def __post_init__(self):
        check_types(self)
        one_of("engine", self.engine, ENGINES)


@dataclass(frozen=True)
class TrackConfig(PredictConfig):
    """The settings of `track`, beside the file and its prompts."""

    # 8 or 4, in which memories and object pointers of earlier frames are stored; null: bfloat16, as sam2
    memory_bits: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_memory_bits(self.memory_bits)


@dataclass(frozen=True)
class SegmentConfig(PredictConfig):
    """The settings of `segment`, beside the file and its prompts."""

    everything: EverythingConfig = field(default_factory=EverythingConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of `evaluate`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    # that runs ONNX files: openvino, onnxruntime, or auto, the first that is installed
    engine: str = "auto"
    # image: mIoU of prompted objects; vos: J&F of tracked objects; everything: the masks of `segment --everything`
    # against those of `reference`
    task: str = "image"
    # scenes:<seed>; a COCO, LVIS, Roboflow or SA-1B folder (image); an SA-V, DAVIS, MOSE or YouTube-VOS folder (vos);
    # a folder of images (everything)
    data: str = ""
    # boxes of a detector for the images of a COCO folder, a json in COCO's results format: COCO's mask AP for image
    boxes: str = ""
    # the checkpoint that everything is compared with, such as the one that was quantized
    reference: str = ""
    everything: EverythingConfig = field(default_factory=EverythingConfig)
    # split of the folder of clips; empty: sav_val, val or valid
    split: str = ""
    # number of images or clips, from the first, or for everything sampled; null: all
    num_samples: int | None = None
    # number of annotated images that may be missing; they are left out
    allow_missing: int = 0
    # write every mask of vos, one PNG per object and frame
    masks: bool = True
    # 8 or 4, in which vos stores memories and object pointers of earlier frames; null: bfloat16, as sam2
    memory_bits: int | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        check_types(self)
        one_of("task", self.task, TASKS)
        one_of("engine", self.engine, ENGINES)
        check_memory_bits(self.memory_bits)
        if self.memory_bits and self.task != "vos":
            raise ConfigError(f"memory_bits: task {self.task} has no memory: leave it out, or set task to vos")
        if self.distributed.coordinator and self.task == "vos" and self.masks:
            raise ConfigError("masks: only one process writes files: set masks to false, or leave "
                              "distributed.coordinator out")  # fmt: skip
        if not self.data:
            raise ConfigError("data is not set: give a COCO or SA-V folder, or scenes:0 for synthetic images")
        if self.boxes and self.task != "image":
            raise ConfigError(f"boxes: task {self.task} takes no boxes: leave it out, or set task to image")
        if bool(self.reference) != (self.task == "everything"):
            raise ConfigError("reference: set it to the checkpoint to compare with, for task everything only")
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.allow_missing < 0:
            raise ConfigError(f"allow_missing must be at least 0, got {self.allow_missing}")

"""What a finished run records: the metadata in its package, and metrics.json, from which its page is made."""

from dataclasses import dataclass, field, fields

REPORT_VERSION = 1  # of metrics.json, as far as pages are made from it


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """What a run's package says about how it was made. Every field becomes a key, unless its default is None."""

    model: dict  # ModelConfig as a dict, and image_size in pixels
    names: str  # how the source checkpoint names its tensors: "original" or "huggingface"
    checkpoint: str  # hash of the full-precision params
    random_weights: bool  # nobody trained these weights, so no score of theirs means anything
    config: dict  # resolved settings; the bits that were chosen for a target are in it
    results: dict  # scores, as `eval.fidelity.measure` returns them
    versions: dict  # {package: version} of sam2jq, jax, flax and torch
    input_ranges: dict | None = None  # {layer: [lowest, highest input of calibration]}; of quantize
    history: dict | None = None  # losses, bits and decisions by step, as `distillation.history` returns them

    def to_dict(self) -> dict:
        """{field: value}, without the optional ones that were not set."""
        optional = {entry.name for entry in fields(self) if entry.default is None}
        return {name: value for name, value in vars(self).items() if value is not None or name not in optional}


@dataclass(frozen=True, kw_only=True)
class RunMetrics(RunMetadata):
    """metrics.json: the metadata of the package, its sizes, a row for each layer and stage, and the gallery."""

    report_version: int = REPORT_VERSION  # raised when a reader must treat the file differently
    parameters: int  # of the whole model
    quantized_weights: int  # how many of them are quantized
    effective_bits: float | None  # stored bits per quantized weight, scales and zero points included; None without any
    bytes_quantized: int  # of the quantized layers, scales, zero points and branches included
    bytes_unquantized: int  # of all other tensors
    bytes_float32: int  # of the whole model in float32
    layers: list[dict]  # of quantized layers, in the order of the data; rows as `report.run.layer_rows` makes them
    unquantized: list[str]  # names of the layers left in float32
    stages: list[dict]  # {"name", "what", "seconds"} in order, with the errors measured after the stage
    stage_images: int  # how many images the errors of stages are measured on
    images_id: str  # hash of the images without masks; equal for runs that can be compared on them
    truth_id: str  # hash of the images and clips with known masks
    asked: dict  # settings as they were given, before bits were chosen for a target
    command: str  # the command line, quoted for a shell
    gallery: list[dict] = field(default_factory=list)  # masks shown, and their picture files inside the run's folder

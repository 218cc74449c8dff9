"""The folder of an ONNX export: one file for each graph, and model.json, which describes them."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from converters.exports.onnx.graph import Graph
from converters.exports.onnx.image import image_encoder, prompt_mask_decoder
from converters.exports.onnx.leaves import why_refused
from converters.exports.onnx.memory import mask_prompt, memory_attention, memory_encoder
from sam2jq import __version__
from sam2jq.data.images import MEAN, STD
from sam2jq.deploy.folder import DESCRIPTION, FORMAT, FORMAT_VERSION
from sam2jq.errors import UserError, few
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import SAM2, is_image_only
from sam2jq.quant.package import MODEL_KEYS, describe, pack_params
from sam2jq.tree import flatten, kernels, layer_name

IMAGE_GRAPHS = {"image_encoder": image_encoder, "prompt_mask_decoder": prompt_mask_decoder}
MEMORY_GRAPHS = {"memory_attention": memory_attention, "memory_encoder": memory_encoder, "mask_prompt": mask_prompt}


def save_onnx(folder: Path, model: SAM2, params: dict, metadata: Mapping) -> None:
    """Writes the graphs and DESCRIPTION. The latter comes last, and an old one is removed first: a folder that has one
    is complete.

    Raises UserError that names layers whose leaves have no exact form in ONNX.
    """
    refused = {layer_name(path): why_refused(leaf) for path, leaf in kernels(flatten(params)).items()}
    if layers := [layer for layer, why in refused.items() if why]:
        raise UserError(f"{few(layers, 3)}: {refused[layers[0]]}, or export with --nearest")
    (folder / DESCRIPTION).unlink(missing_ok=True)
    files = {}
    graphs = IMAGE_GRAPHS if is_image_only(params) else IMAGE_GRAPHS | MEMORY_GRAPHS
    for name, build in graphs.items():
        graph, outputs = build(model, params)
        path = folder / f"{name}.onnx"
        with atomic_write(path) as temporary:
            graph.write(temporary, name, outputs)
        files[path.name] = describe_file(path, graph, outputs)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {key: metadata["model"][key] for key in MODEL_KEYS},
        "random_weights": metadata["random_weights"],
        "normalization": {"mean": MEAN.tolist(), "std": STD.tolist()},  # of RGB in 0..1
        "files": files,
        "layers": describe_layers(params),
        "versions": {"sam2jq": __version__, "onnx": version("onnx")},
    }
    with atomic_write(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(about, indent=1))


def describe_file(path: Path, graph: Graph, outputs: Mapping[str, str]) -> dict:
    """The entry of a file in DESCRIPTION; sizes that each call may choose are names."""
    sizes = lambda tensor: [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "inputs": {tensor.name: sizes(tensor) for tensor in graph.inputs},
        "outputs": list(outputs),
    }


def describe_layers(params: dict) -> dict[str, dict]:
    """{layer: how its weight and its inputs are rounded} of the quantized layers."""
    rows = [describe(name, layer) for name, layer in pack_params(params, {}, {}).layers.items()]
    return {row["name"]: {key: row[key] for key in ("dtype", "group", "inputs", "around", "rank")} for row in rows}

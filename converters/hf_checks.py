"""The configuration files beside Hugging Face's weights, read and compared with what this program computes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.hf_config import FILES, model_config, processor_config
from sam2jq.data.images import MEAN, STD
from sam2jq.errors import UserError, few
from sam2jq.models.sam2 import SAM2

Files = Mapping[Path, dict]  # path: content
MODEL_TYPES = ("sam2", "sam2_video")
# What transformers assumes for keys that config.json leaves out, where they change what is computed. `model_config`
# has those in which the models of SAM 2 differ; in all other keys this is what every SAM 2 has.
BACKBONE = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 96,
    "num_channels": 3,
    "image_size": [1024, 1024],
    "patch_kernel_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "query_stride": [2, 2],
    "window_positional_embedding_background_size": [7, 7],
    "num_query_pool_stages": 3,
    "blocks_per_stage": [1, 2, 7, 2],
    "embed_dim_per_stage": [96, 192, 384, 768],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 14, 7],
    "global_attention_blocks": [5, 7, 9],
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
IMAGE = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": BACKBONE,
        "backbone_channel_list": [768, 384, 192, 96],
        "backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]],
        "fpn_hidden_size": 256,
        "fpn_kernel_size": 1,
        "fpn_stride": 1,
        "fpn_padding": 0,
        "fpn_top_down_levels": [2, 3],
        "num_feature_levels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "prompt_encoder_config": {
        "hidden_size": 256,
        "image_size": 1024,
        "patch_size": 16,
        "mask_input_channels": 16,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "scale": 1,
    },
    "mask_decoder_config": {
        "hidden_size": 256,
        "hidden_act": "gelu",
        "mlp_dim": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "attention_downsample_rate": 2,
        "num_multimask_outputs": 3,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
VIDEO = {
    "image_size": 1024,
    "num_maskmem": 7,
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "enable_occlusion_spatial_embedding": True,
    "enable_temporal_pos_encoding_for_object_pointers": True,
    "multimask_output_in_sam": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
    "multimask_output_for_tracking": True,
    "max_object_pointers_in_encoder": 16,
    "max_cond_frame_num": -1,
    "memory_attention_hidden_size": 256,
    "memory_attention_num_layers": 4,
    "memory_attention_num_attention_heads": 1,
    "memory_attention_downsample_rate": 1,
    "memory_attention_feed_forward_hidden_size": 2048,
    "memory_attention_feed_forward_hidden_act": "relu",
    "memory_attention_rope_feat_sizes": [64, 64],
    "memory_attention_rope_theta": 10000,  # of older versions
    "rope_parameters": {"rope_theta": 10000},
    "memory_encoder_hidden_size": 256,
    "memory_encoder_output_channels": 64,
    "mask_downsampler_embed_dim": 256,
    "mask_downsampler_kernel_size": 3,
    "mask_downsampler_stride": 2,
    "mask_downsampler_padding": 1,
    "mask_downsampler_total_stride": 16,
    "mask_downsampler_hidden_act": "gelu",
    "memory_fuser_num_layers": 2,
    "memory_fuser_embed_dim": 256,
    "memory_fuser_intermediate_dim": 1024,
    "memory_fuser_kernel_size": 7,
    "memory_fuser_padding": 3,
    "memory_fuser_hidden_act": "gelu",
}
PIXELS = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "rescale_factor", "resample", "size")
OTHER_STEPS = ("do_pad", "do_center_crop")  # of other processors


def read_config(folder: Path) -> Files:
    """The content of the configuration files in `folder`. Raises UserError if one is damaged or of another model."""
    files = {folder / name: read_object(folder / name) for name in FILES if (folder / name).is_file()}
    kind = files.get(folder / FILES[0], {}).get("model_type")
    if kind not in (None, *MODEL_TYPES):
        raise UserError(f"{folder / FILES[0]}: model_type is {kind}, but only SAM 2 is supported: "
                        f"{' and '.join(MODEL_TYPES)}")  # fmt: skip
    return files


def config_size(files: Files) -> dict:
    """{"image_size": pixels} as config.json has it; {} if it says nothing. Raises UserError if it is not square."""
    path, config = next((item for item in files.items() if item[0].name == FILES[0]), (None, {}))
    places = ((), ("prompt_encoder_config",), ("vision_config", "backbone_config"))
    sizes = (nested_value(config, (*place, "image_size")) for place in places)
    size = next((side(path, value) for value in sizes if value is not None), None)
    return {} if size is None else {"image_size": size}


def check_config(files: Files, model: SAM2, *, video: bool) -> None:
    """Raises UserError that names the keys of `files` with which transformers computes something else than `model`.

    video: whether the settings of the memory count.
    """
    for path, content in files.items():
        if path.name == FILES[0]:
            wrong = list(differences(content, model, video and content.get("model_type") != "sam2"))
        else:
            parts = (content, content.get("image_processor"), content.get("video_processor"))
            wrong = [line for part in parts if isinstance(part, dict) for line in processor_differences(part, model)]
        if wrong:
            raise UserError(f"{path}: {few(wrong, 3)}")


def differences(config: dict, model: SAM2, video: bool) -> Iterator[str]:
    """Yields "key is value, ..." for each key of config.json that `model` does not have so."""
    defaults = flat(IMAGE | VIDEO if video else IMAGE)
    own, given = defaults | flat(model_config(model, video)), flat(config)
    for key, default in defaults.items():
        if given.get(key) is not None:
            if not equal(given[key], own[key]):
                yield f"{key} is {given[key]!r}, and this program computes with {own[key]}"
        elif "model_type" in config and not equal(default, own[key]):
            yield f"{key} is missing, which means {default}, and this program computes with {own[key]}"


def processor_differences(content: dict, model: SAM2) -> Iterator[str]:
    """Yields "key is value, ..." for each key of a processor that prepares images in another way than SAM 2 does."""
    own = processor_config(model, video=False)
    expected = {key: own["image_processor"][key] for key in PIXELS} | dict.fromkeys(OTHER_STEPS, False)
    for key, value in (expected | {"target_size": own["target_size"]}).items():
        if content.get(key) is not None and not equal(content[key], value):
            yield f"{key} is {content[key]}, but images are always prepared as SAM 2 does, with {value}"
    for key, values in (("image_mean", MEAN), ("image_std", STD)):
        if content.get(key) is not None and not close(content[key], values):
            yield (
                f"{key} is {content[key]}, and this program normalizes images by SAM 2's {values.tolist()}: the model "
                "would see other colors than it was trained on"
            )


def flat(content: Mapping, prefix: str = "") -> dict[str, object]:
    """{"vision_config.fpn_stride": value} of nested objects."""
    items: dict[str, object] = {}
    for key, value in content.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def equal(given: object, own: object) -> bool:
    """Whether two settings are the same; a number stands for lists and objects of this number, as 7 for [7, 7]."""
    if isinstance(own, dict):
        given = given if isinstance(given, dict) else dict.fromkeys(own, given)
        return all(equal(value, own.get(key)) for key, value in given.items() if value is not None)
    if isinstance(own, list):
        return equal_lists(given if isinstance(given, list) else [given] * len(own), own)
    if isinstance(given, list):
        return bool(given) and all(equal(value, own) for value in given)
    return given == own or (isinstance(given, float) and isinstance(own, float) and abs(given - own) <= 1e-6 * own)


def equal_lists(given: list, own: list) -> bool:
    return len(given) == len(own) and all(map(equal, given, own))


def close(given: object, own: np.ndarray) -> bool:
    """Whether `given` is a list of these numbers, rounded."""
    try:
        return np.allclose(np.asarray(given, np.float64), own, atol=1e-3)
    except (TypeError, ValueError):
        return False


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, as Hugging Face writes it: fetch it again")
    return content


def nested_value(content: object, path: tuple[str, ...]) -> object:
    """content[path[0]][path[1]]...; None if it is not there."""
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def side(path: Path, value: object) -> int:
    """The side, in pixels, of an image size such as 1024 or [1024, 1024]. Raises UserError for other values."""
    sides = value if isinstance(value, list) else [value]
    if not sides or type(sides[0]) is not int or any(x != sides[0] for x in sides):
        raise UserError(f"{path}: image_size {value} is not one whole number of pixels; SAM 2's input is square")
    return sides[0]

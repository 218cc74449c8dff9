"""The configuration files beside Hugging Face's weights, written for `from_pretrained` of transformers."""

import json
from pathlib import Path

from sam2jq.data.images import MEAN, STD
from sam2jq.files import atomic_write
from sam2jq.models.sam2 import SAM2

# that of the model, that of both processors, and those of one processor each, as older versions write them
FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
HF_MEMORY_FEATURES = 64  # channels of a memory that transformers' memory attention is built for


def write_config(folder: Path, model: SAM2, *, video: bool = True, quantization: dict | None = None) -> None:
    """Writes config.json and processor_config.json into `folder`.

    video: for `Sam2VideoModel` and `Sam2VideoProcessor`, else for the image-only `Sam2Model` and `Sam2Processor`.
    quantization: the `quantization_config` of config.json.
    """
    config = model_config(model, video) | ({"quantization_config": quantization} if quantization else {})
    for name, content in zip(FILES, (config, processor_config(model, video))):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def model_config(model: SAM2, video: bool) -> dict:
    """The content of config.json: what the sizes and versions of SAM 2 differ in."""
    v, latest = model.variant, model.version == "2.1"
    widths = [v.embed_dim * 2**stage for stage in range(len(v.stages))]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": v.embed_dim,
        "image_size": [v.image_size] * 2,
        "blocks_per_stage": list(v.stages),
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [v.num_heads * 2**stage for stage in range(len(v.stages))],
        "window_size_per_stage": list(v.windows),
        "global_attention_blocks": list(v.global_blocks),
        "window_positional_embedding_background_size": [v.position_size] * 2,
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[v.image_size // stride] * 2 for stride in (4, 8, 16)],
        "fpn_hidden_size": v.features,
    }
    image = {
        "dtype": "float32",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": v.features, "image_size": v.image_size},
        "mask_decoder_config": {"hidden_size": v.features},
    }
    if not video:
        return {"architectures": ["Sam2Model"], "model_type": "sam2"} | image
    return image | {
        "architectures": ["Sam2VideoModel"],
        "model_type": "sam2_video",
        "image_size": v.image_size,
        "enable_occlusion_spatial_embedding": latest,
        "enable_temporal_pos_encoding_for_object_pointers": latest,
        "memory_attention_hidden_size": v.features,
        "memory_attention_num_layers": v.memory_layers,
        "memory_attention_feed_forward_hidden_size": v.memory_hidden,
        "memory_attention_rope_feat_sizes": [v.image_size // 16] * 2,
        "memory_encoder_hidden_size": v.features,
        "memory_encoder_output_channels": v.memory_features,
        "mask_downsampler_embed_dim": v.features,
        "memory_fuser_embed_dim": v.features,
        "memory_fuser_intermediate_dim": 4 * v.features,
    }


def processor_config(model: SAM2, video: bool) -> dict:
    """The content of processor_config.json: the size, mean and standard deviation of the model's input."""
    square = lambda side: {"height": side, "width": side}
    size = model.variant.image_size
    pixels = {
        **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": [round(float(x), 3) for x in MEAN],
        "image_std": [round(float(x), 3) for x in STD],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": square(size),
    }
    image = {"image_processor_type": "Sam2ImageProcessor", "mask_size": square(size // 4)} | pixels
    shared = {"image_processor": image, "point_pad_value": -10, "target_size": size}
    if not video:
        return {"processor_class": "Sam2Processor"} | shared
    frames = {"video_processor_type": "Sam2VideoVideoProcessor"} | pixels
    return {"processor_class": "Sam2VideoProcessor", "video_processor": frames} | shared

"""Original SAM 2 names of tensors <-> those of Hugging Face's `Sam2VideoModel` (model.safetensors), for 2.0 and 2.1.

A tensor keeps its values, dtype and layout. Two things differ besides the names: the four point embeddings [1, C] are
one tensor [4, C], and the random Fourier matrix of the positional encoding has two names. `from_hf` takes numpy arrays
as well as tensors and does not import torch.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import count, takewhile
from typing import Any

from sam2jq.errors import UserError, few

Tensors = dict[str, Any]  # name: tensor or numpy array

SLOTS = {
    "i": r"\d+",
    "p": "weight|bias",
    "x": "[qkv]",
    "attn": r"layers\.\d+\.self_attn|layers\.\d+\.cross_attn_\w+|final_attn_token_to_image",
    "head": r"iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+",
}

# (original prefix, Hugging Face prefix) -> [(original, Hugging Face)]; a {slot} matches the same text on both sides.
# A name that is the same on both sides has no row. 2.0 has neither no_obj_embed_spatial nor obj_ptr_tpos_proj.
NAMES = {
    ("image_encoder.trunk.", "vision_encoder.backbone."): [
        ("pos_embed", "pos_embed"),
        ("pos_embed_window", "pos_embed_window"),
        ("patch_embed.proj.{p}", "patch_embed.projection.{p}"),
        ("blocks.{i}.norm1.{p}", "blocks.{i}.layer_norm1.{p}"),
        ("blocks.{i}.norm2.{p}", "blocks.{i}.layer_norm2.{p}"),
        ("blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.qkv.{p}"),
        ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attn.proj.{p}"),
        ("blocks.{i}.mlp.layers.0.{p}", "blocks.{i}.mlp.proj_in.{p}"),
        ("blocks.{i}.mlp.layers.1.{p}", "blocks.{i}.mlp.proj_out.{p}"),
        ("blocks.{i}.proj.{p}", "blocks.{i}.proj.{p}"),
    ],
    ("image_encoder.neck.", "vision_encoder.neck."): [
        ("convs.{i}.conv.{p}", "convs.{i}.{p}"),
    ],
    ("sam_prompt_encoder.", "prompt_encoder."): [
        ("no_mask_embed.weight", "no_mask_embed.weight"),
        ("not_a_point_embed.weight", "not_a_point_embed.weight"),
        ("mask_downscaling.0.{p}", "mask_embed.conv1.{p}"),
        ("mask_downscaling.1.{p}", "mask_embed.layer_norm1.{p}"),
        ("mask_downscaling.3.{p}", "mask_embed.conv2.{p}"),
        ("mask_downscaling.4.{p}", "mask_embed.layer_norm2.{p}"),
        ("mask_downscaling.6.{p}", "mask_embed.conv3.{p}"),
    ],
    ("sam_mask_decoder.", "mask_decoder."): [
        ("iou_token.weight", "iou_token.weight"),
        ("mask_tokens.weight", "mask_tokens.weight"),
        ("obj_score_token.weight", "obj_score_token.weight"),
        ("conv_s0.{p}", "conv_s0.{p}"),
        ("conv_s1.{p}", "conv_s1.{p}"),
        ("output_upscaling.0.{p}", "upscale_conv1.{p}"),
        ("output_upscaling.1.{p}", "upscale_layer_norm.{p}"),
        ("output_upscaling.3.{p}", "upscale_conv2.{p}"),
        ("{head}.layers.0.{p}", "{head}.proj_in.{p}"),
        ("{head}.layers.1.{p}", "{head}.layers.0.{p}"),
        ("{head}.layers.2.{p}", "{head}.proj_out.{p}"),
        ("transformer.{attn}.{x}_proj.{p}", "transformer.{attn}.{x}_proj.{p}"),
        ("transformer.{attn}.out_proj.{p}", "transformer.{attn}.o_proj.{p}"),
        ("transformer.layers.{i}.norm1.{p}", "transformer.layers.{i}.layer_norm1.{p}"),
        ("transformer.layers.{i}.norm2.{p}", "transformer.layers.{i}.layer_norm2.{p}"),
        ("transformer.layers.{i}.norm3.{p}", "transformer.layers.{i}.layer_norm3.{p}"),
        ("transformer.layers.{i}.norm4.{p}", "transformer.layers.{i}.layer_norm4.{p}"),
        ("transformer.layers.{i}.mlp.layers.0.{p}", "transformer.layers.{i}.mlp.proj_in.{p}"),
        ("transformer.layers.{i}.mlp.layers.1.{p}", "transformer.layers.{i}.mlp.proj_out.{p}"),
        ("transformer.norm_final_attn.{p}", "transformer.layer_norm_final_attn.{p}"),
    ],
    ("memory_attention.", "memory_attention."): [
        ("{attn}.out_proj.{p}", "{attn}.o_proj.{p}"),
        ("layers.{i}.norm1.{p}", "layers.{i}.layer_norm1.{p}"),
        ("layers.{i}.norm2.{p}", "layers.{i}.layer_norm2.{p}"),
        ("layers.{i}.norm3.{p}", "layers.{i}.layer_norm3.{p}"),
        ("norm.{p}", "layer_norm.{p}"),
    ],
    ("memory_encoder.", "memory_encoder."): [
        # The original is one flat sequence; every third entry is an activation and has no tensors.
        *((f"mask_downsampler.encoder.{3 * k}.{{p}}", f"mask_downsampler.layers.{k}.conv.{{p}}") for k in range(4)),
        *(
            (f"mask_downsampler.encoder.{3 * k + 1}.{{p}}", f"mask_downsampler.layers.{k}.layer_norm.{{p}}")
            for k in range(4)
        ),
        ("mask_downsampler.encoder.12.{p}", "mask_downsampler.final_conv.{p}"),
        ("pix_feat_proj.{p}", "feature_projection.{p}"),
        ("fuser.layers.{i}.dwconv.{p}", "memory_fuser.layers.{i}.depthwise_conv.{p}"),
        ("fuser.layers.{i}.norm.{p}", "memory_fuser.layers.{i}.layer_norm.{p}"),
        ("fuser.layers.{i}.pwconv1.{p}", "memory_fuser.layers.{i}.pointwise_conv1.{p}"),
        ("fuser.layers.{i}.pwconv2.{p}", "memory_fuser.layers.{i}.pointwise_conv2.{p}"),
        ("fuser.layers.{i}.gamma", "memory_fuser.layers.{i}.scale"),
        ("out_proj.{p}", "projection.{p}"),
    ],
    ("", ""): [
        ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
        ("no_mem_embed", "no_memory_embedding"),
        ("no_mem_pos_enc", "no_memory_positional_encoding"),
        ("no_obj_ptr", "no_object_pointer"),
        ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
        ("obj_ptr_tpos_proj.{p}", "temporal_positional_encoding_projection_layer.{p}"),
        ("obj_ptr_proj.layers.0.{p}", "object_pointer_proj.proj_in.{p}"),
        ("obj_ptr_proj.layers.1.{p}", "object_pointer_proj.layers.0.{p}"),
        ("obj_ptr_proj.layers.2.{p}", "object_pointer_proj.proj_out.{p}"),
    ],
}
POINT, HF_POINTS = "sam_prompt_encoder.point_embeddings.{}.weight", "prompt_encoder.point_embed.weight"
FOURIER = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
HF_FOURIER = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")


def is_hf(keys: Iterable[str]) -> bool:
    """Whether any of `keys` is a Hugging Face name, one that no original checkpoint has."""
    return any(key in (HF_POINTS, *HF_FOURIER) or _rename(key, _FROM_HF) != key for key in keys)


def to_hf(state_dict: Tensors) -> Tensors:
    """`state_dict` under the names that `Sam2VideoModel.save_pretrained` writes; unknown names stay as they are."""
    import torch

    rest = dict(state_dict)
    points = [rest.pop(key) for key in takewhile(rest.__contains__, map(POINT.format, count()))]
    fourier = [rest.pop(key) for key in (FOURIER,) if key in rest]
    items = [(_rename(key, _TO_HF), x) for key, x in rest.items()]
    items += [(HF_POINTS, torch.cat(points))] if points else []
    items += [(key, x.clone()) for key in HF_FOURIER for x in fourier]  # safetensors rejects two names of one memory
    return _unique(items)


def from_hf(state_dict: Tensors) -> Tensors:
    """Inverse of `to_hf`; the Fourier matrix may have either of its two names or, if both are equal, both.

    Raises UserError if the two Fourier matrices differ, or if a tensor is there under both naming styles.
    """
    rest = dict(state_dict)
    rows = rest.pop(HF_POINTS, ())
    points = [rows[i : i + 1] for i in range(len(rows))]  # [1, C] each
    fourier = [rest.pop(key) for key in HF_FOURIER if key in rest]
    if any(not _equal(x, fourier[0]) for x in fourier):
        raise UserError(f"{' and '.join(HF_FOURIER)} must be equal: SAM 2 has one matrix for both")
    items = [(_rename(key, _FROM_HF), x) for key, x in rest.items()]
    items += [(POINT.format(i), row) for i, row in enumerate(points)]
    items += [(FOURIER, x) for x in fourier[:1]]
    return _unique(items)


def _equal(x, y) -> bool:
    """Whether two tensors or arrays have the same dtype, shape and values."""
    return x.dtype == y.dtype and tuple(x.shape) == tuple(y.shape) and bool((x == y).all())


def _pattern(template: str) -> re.Pattern:
    """The regular expression that matches the names of `template`, one group per {slot}."""
    parts = re.split(r"\{(\w+)\}", template)  # text, slot, text, slot, ..., text
    return re.compile("".join(f"(?P<{s}>{SLOTS[s]})" if k % 2 else re.escape(s) for k, s in enumerate(parts)))


_ROWS = [(ours + name, theirs + hf_name) for (ours, theirs), rows in NAMES.items() for name, hf_name in rows]
_TO_HF = [(_pattern(original), hf) for original, hf in _ROWS]
_FROM_HF = [(_pattern(hf), original) for original, hf in _ROWS]


def _rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str:
    """The name that the rule matching `key` gives it, or `key` itself."""
    matches = ((pattern.fullmatch(key), target) for pattern, target in rules)
    return next((target.format(**match.groupdict()) for match, target in matches if match), key)


def _unique(items: list[tuple[str, Any]]) -> Tensors:
    """The dict of `items`. Raises UserError if a name occurs twice, as in a file that mixes both naming styles."""
    twice = sorted(key for key, n in Counter(key for key, _ in items).items() if n > 1)
    if twice:
        raise UserError(f"both the original and the Hugging Face name are present of {few(twice)}")
    return dict(items)

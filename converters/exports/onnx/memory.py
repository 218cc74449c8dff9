"""memory_attention.onnx, memory_encoder.onnx and mask_prompt.onnx: the memory of sam2jq.models.sam2 and memory.py.

Letters beside those of graph.py: T remembered frames, K tokens of object pointers, Cm channels of a memory.
"""

import numpy as np

from converters.exports.onnx.graph import Graph
from converters.exports.onnx.layers import array, attention, conv, dense, layer_norm
from sam2jq.models.layers import sine_position
from sam2jq.models.memory import EPS
from sam2jq.models.sam2 import SAM2
from sam2jq.models.variants import MEMORIES
from sam2jq.quant.leaves import is_bare


def memory_attention(model: SAM2, params: dict) -> tuple[Graph, dict[str, str]]:
    """The graph that conditions a frame on the memories of one object.

    `times`: 0 for a conditioning frame, else 1..6 for six frames ago to the last one. `pointers`: each object pointer
    cut into tokens of Cm channels; `pointer_times`: the frames since then over the maximal such number, of each token.
    """
    v = model.variant
    side, width, channels = v.image_size // 16, v.features, v.memory_features
    g = Graph(
        {
            "frame_embed": ("float32", (1, side, side, width)),
            "memories": ("float32", ("frames", side, side, channels)),
            "times": ("int64", ("frames",)),
            "pointers": ("float32", ("tokens", channels)),
            "pointer_times": ("float32", ("tokens",)),
        }
    )
    when = g.Gather(array(params["maskmem_tpos_enc"])[:, 0], g.Sub(np.int64(MEMORIES - 1), "times"))  # [T, 1, Cm]
    where = array(sine_position(side, side, channels)).reshape(1, -1, channels)
    maps = lambda x: g.reshape(x, 1, -1, channels)
    pointers = g.Unsqueeze("pointers", np.array([0]))
    memory = g.Concat(maps("memories"), pointers, axis=1)
    pointers = g.Add(pointers, pointer_position(g, model, params)) if model.version != "2.0" else pointers
    keys = g.Concat(maps(g.Add(g.reshape("memories", 0, -1, channels), g.Add(when, where))), pointers, axis=1)
    mapped = g.Mul(g.size("memories", 0), np.array([side**2]))  # tokens of maps, which get RoPE

    p = params["memory_attention"]
    x = g.Add("frame_embed", 0.1 * array(sine_position(side, side, width)))
    x = g.reshape(x, 1, side**2, width)
    for i in range(v.memory_layers):
        layer = p[f"layers.{i}"]
        own = layer_norm(g, layer["norm1"], x)
        x = g.Add(x, rotary_attention(g, layer["self_attn"], own, own, own, side, None))
        query = layer_norm(g, layer["norm2"], x)
        x = g.Add(x, rotary_attention(g, layer["cross_attn_image"], query, keys, memory, side, mapped))
        hidden = g.Relu(dense(g, layer["linear1"], layer_norm(g, layer["norm3"], x)))
        x = g.Add(x, dense(g, layer["linear2"], hidden))
    return g, {"image_embed": g.reshape(layer_norm(g, p["norm"], x), 1, side, side, width)}


def pointer_position(g: Graph, model: SAM2, params: dict) -> str:
    """Position encoding [1, K, Cm] of `pointer_times`: a projected sine of the time."""
    half = model.variant.features // 2
    period = (10000.0 ** (2 * (np.arange(half) // 2) / half)).astype(np.float32)
    angle = g.Div(g.Unsqueeze("pointer_times", np.array([0, 2])), period)
    return dense(g, params["obj_ptr_tpos_proj"], g.Concat(g.Sin(angle), g.Cos(angle), axis=-1))


def rotary_attention(g: Graph, p: dict, q: str, k: str, v: str, side: int, mapped: str | None) -> str:
    """Single-head attention with RoPE, q [1, h * w, C], k and v [1, M, C'] -> [1, h * w, C].

    mapped: int64 [1], the keys that get RoPE, maps of side x side; None: all.
    """
    channels = len(p["q_proj"]["bias"])
    # as in RotaryAttention: a linear v_proj may follow the softmax, on the C' channels of memories
    late = mapped is not None and is_bare(p["v_proj"]["kernel"])
    q, k, v = dense(g, p["q_proj"], q), dense(g, p["k_proj"], k), v if late else dense(g, p["v_proj"], v)
    if mapped is None:
        k = apply_rope(g, k, side, channels)
    else:
        maps, pointers = g.slice(k, 0, mapped, 1), g.slice(k, mapped, np.iinfo(np.int64).max, 1)
        k = g.Concat(apply_rope(g, maps, side, channels), pointers, axis=1)
    y = attention(g, apply_rope(g, q, side, channels), k, v, 1)
    return dense(g, p["out_proj"], dense(g, p["v_proj"], y) if late else y)


def apply_rope(g: Graph, x: str, side: int, channels: int) -> str:
    """x [1, R * side * side, C] after axial rotary position encoding, in real arithmetic.

    A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin).
    """
    frequency = 10000.0 ** -(np.arange(0, channels, 4) / channels)
    row, column = np.divmod(np.arange(side**2), side)
    angle = np.concatenate([column[:, None] * frequency, row[:, None] * frequency], -1)[..., None]  # [h * w, C / 2, 1]
    cos, sin = np.cos(angle), np.sin(angle) * np.array([-1, 1])
    pairs = g.reshape(x, -1, side**2, channels // 2, 2)
    swapped = g.Gather(pairs, np.array([1, 0]), axis=-1)
    rotated = g.Add(g.Mul(pairs, array(cos)), g.Mul(swapped, array(sin)))
    return g.reshape(rotated, 1, -1, channels)


def memory_encoder(model: SAM2, params: dict) -> tuple[Graph, dict[str, str]]:
    """The graph of the memory of one object in a frame; `binarize` is 1 where a user prompted the frame, else 0."""
    size, width = model.variant.image_size, model.variant.features
    g = Graph(
        {
            "frame_embed": ("float32", (1, size // 16, size // 16, width)),
            "mask_logits": ("float32", (1, size // 4, size // 4)),
            "object_score": ("float32", (1, 1)),
            "binarize": ("float32", (1,)),
        }
    )
    p = params["memory_encoder"]
    mask = g.Unsqueeze("mask_logits", np.array([1]))
    sizes = np.array([1, 1, size, size])
    mask = g.Resize(mask, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel")
    mask = g.reshape(mask, 1, size, size, 1)
    binary = g.Cast(g.Greater(mask, 0.0), to=1)
    mask = g.Where(g.Greater("binarize", 0.0), binary, g.Sigmoid(mask))
    x = g.Sub(g.Mul(mask, 20.0), 10.0)
    for i in range(4):
        x = conv(g, p["mask_downsampler"][f"encoder.{3 * i}"], x, size=3, stride=2, padding=1)
        x = g.Gelu(layer_norm(g, p["mask_downsampler"][f"encoder.{3 * i + 1}"], x, EPS))
    x = conv(g, p["mask_downsampler"]["encoder.12"], x)
    x = g.Add(conv(g, p["pix_feat_proj"], "frame_embed"), x)
    for i in range(2):
        layer = p["fuser"][f"layers.{i}"]
        y = layer_norm(g, layer["norm"], conv(g, layer["dwconv"], x, size=7, padding=3, groups=width), EPS)
        y = dense(g, layer["pwconv2"], g.Gelu(dense(g, layer["pwconv1"], y)))
        x = g.Add(x, g.Mul(array(layer["gamma"]), y))
    memory = conv(g, p["out_proj"], x)
    if model.version != "2.0":
        hidden = g.Cast(g.LessOrEqual("object_score", 0.0), to=1)
        memory = g.Add(memory, g.Mul(hidden, array(params["no_obj_embed_spatial"])))
    return g, {"memory": memory}


def mask_prompt(model: SAM2, params: dict) -> tuple[Graph, dict[str, str]]:
    """The graph of a mask that a user gives for a frame: `mask_input` of the decoder; the pointer of no object."""
    size = model.variant.image_size
    g = Graph({"mask": ("float32", (1, size, size, 1))})
    mask_input = conv(g, params["mask_downsample"], "mask", size=4, stride=4)
    return g, {"mask_input": mask_input, "no_object_pointer": g.constant(array(params["no_obj_ptr"]))}

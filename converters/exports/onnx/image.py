"""image_encoder.onnx and prompt_mask_decoder.onnx: sam2jq.models.hiera, neck.py, prompt.py and decoder.py."""

import jax.numpy as jnp
import numpy as np

from converters.exports.onnx.graph import Graph
from converters.exports.onnx.layers import array, attention, conv, conv_transpose, dense, layer_norm, mlp
from sam2jq.models.decoder import MASKS, STABILITY
from sam2jq.models.hiera import EPS, BlockSpec
from sam2jq.models.layers import resize
from sam2jq.models.prompt import LABELS
from sam2jq.models.sam2 import SAM2, is_image_only, trunk_of


def image_encoder(model: SAM2, params: dict) -> tuple[Graph, dict[str, str]]:
    """The graph of one preprocessed image, and its outputs: the maps at strides 4, 8 and 16.

    The last map is there with and, for videos, without the embedding of "no memory", as `frame_embed`.
    """
    size, p = model.variant.image_size, params
    g = Graph({"image": ("float32", (1, size, size, 3))})
    stages = trunk(g, model, p["image_encoder.trunk"], "image")
    neck = p["image_encoder.neck"]
    fine, middle, coarse, coarsest = (
        conv(g, neck[f"convs.{len(stages) - 1 - i}.conv"], x) for i, x in enumerate(stages)
    )
    coarse = g.Add(coarse, double(g, coarsest, size // 32))
    outputs = {
        "high_res_0": conv(g, p["sam_mask_decoder"]["conv_s0"], fine),
        "high_res_1": conv(g, p["sam_mask_decoder"]["conv_s1"], middle),
        "image_embed": g.Add(coarse, array(p["no_mem_embed"])),
    }
    return g, outputs if is_image_only(p) else outputs | {"frame_embed": coarse}


def double(g: Graph, x: str, side: int) -> str:
    """Nearest-neighbor upsampling, [1, side, side, C] -> [1, 2 side, 2 side, C]."""
    x = g.Expand(g.reshape(x, 1, side, 1, side, 1, -1), np.array([1, 1, 2, 1, 2, 1]))
    return g.reshape(x, 1, 2 * side, 2 * side, -1)


def trunk(g: Graph, model: SAM2, p: dict, image: str) -> list[str]:
    """[1, S, S, 3] -> the last map of each stage."""
    hiera = trunk_of(model.variant)
    side, width = model.variant.image_size // 4, hiera.embed_dim
    x = conv(g, p["patch_embed.proj"], image, size=7, stride=4, padding=3)
    x = g.Add(x, position(g, p, side, hiera.windows[0]))
    outputs = []
    for i, spec in enumerate(hiera.blocks()):
        x = block(g, p[f"blocks.{i}"], x, spec, side, pool=spec.features != width)
        side, width = side // (2 if spec.features != width else 1), spec.features
        outputs.append(x)
    return [outputs[sum(hiera.stages[: stage + 1]) - 1] for stage in range(len(hiera.stages))]


def position(g: Graph, p: dict, side: int, window: int) -> str:
    """The position embedding [side, side, C] from its small parameters, as two constant products: engines take minutes
    to fold a bicubic Resize."""
    background, tile = (array(p[name])[0].transpose(1, 2, 0) for name in ("pos_embed", "pos_embed_window"))
    size, width = background.shape[1:]
    weights = array(resize(jnp.eye(size)[None, :, :, None], (side, size), "bicubic-pytorch")[0, :, :, 0])
    rows = g.reshape(g.MatMul(weights, background.reshape(size, -1)), side, size, width)
    return g.Add(g.MatMul(weights, rows), g.Tile(tile, np.array([side // window] * 2 + [1])))


def block(g: Graph, p: dict, x: str, spec: BlockSpec, side: int, *, pool: bool) -> str:
    """[1, side, side, C] -> [1, side, side, features], or half of the side with `pool`."""
    shortcut, x = x, layer_norm(g, p["norm1"], x, EPS)
    if pool:
        shortcut = max_pool(g, dense(g, p["proj"], x), side)
    window = spec.window or side
    padded = side + -side % window
    x = to_windows(g, x, side, window)
    q, k, v = g.add("Split", dense(g, p["attn"]["qkv"], x), outputs=3, axis=-1, num_outputs=3)
    if pool:
        q, window, side, padded = max_pool(g, q, window), window // 2, side // 2, padded // 2
    q, k, v = (g.reshape(t, 0, -1, spec.features) for t in (q, k, v))
    x = dense(g, p["attn"]["proj"], attention(g, q, k, v, spec.heads))
    x = g.Add(shortcut, from_windows(g, x, side, window, padded))
    return g.Add(x, mlp(g, p["mlp"], layer_norm(g, p["norm2"], x, EPS), "Gelu"))


def max_pool(g: Graph, x: str, side: int) -> str:
    """Maximum over 2 x 2 pixels, [B, side, side, C] -> [B, side / 2, side / 2, C]."""
    x = g.reshape(x, 0, side // 2, 2, side // 2, 2, -1)
    return g.ReduceMax(x, np.array([2, 4]), keepdims=0)


def to_windows(g: Graph, x: str, side: int, window: int) -> str:
    """[1, side, side, C] -> [windows, window, window, C]; zeros pad windows that extend past the edge."""
    if window == side:
        return x
    if gap := -side % window:
        x = g.Pad(x, np.array([0, 0, 0, 0, 0, gap, gap, 0]))
    count = -(-side // window)
    x = g.transpose(g.reshape(x, count, window, count, window, -1), 0, 2, 1, 3, 4)
    return g.reshape(x, count**2, window, window, -1)


def from_windows(g: Graph, x: str, side: int, window: int, padded: int) -> str:
    """[windows, window ** 2, C] -> [1, side, side, C]; inverse of `to_windows`."""
    count = padded // window
    if count > 1:
        x = g.transpose(g.reshape(x, count, count, window, window, -1), 0, 2, 1, 3, 4)
    x = g.reshape(x, 1, padded, padded, -1)
    return x if padded == side else g.slice(g.slice(x, 0, side, 1), 0, side, 2)


def prompt_mask_decoder(model: SAM2, params: dict) -> tuple[Graph, dict[str, str]]:
    """The graph of P prompts of N points each, and its outputs.

    Points of label -1 are padding, of which a prompt without a box has one at its end. `mask_input` counts if
    `has_mask_input` is 1. Of four masks the first is that of a prompt with one meaning (`stable_or_best`), the others
    are the three of an ambiguous one.
    """
    width, side = model.variant.features, model.variant.image_size // 16
    g = Graph(
        {
            "high_res_0": ("float32", (1, 4 * side, 4 * side, width // 8)),
            "high_res_1": ("float32", (1, 2 * side, 2 * side, width // 4)),
            "image_embed": ("float32", ("images", side, side, width)),
            "point_coords": ("float32", ("prompts", "points", 2)),
            "point_labels": ("int32", ("prompts", "points")),
            "mask_input": ("float32", ("masks", 4 * side, 4 * side, 1)),
            "has_mask_input": ("float32", (1,)),
        }
    )
    encoder, decoder = params["sam_prompt_encoder"], params["sam_mask_decoder"]
    gaussian = array(encoder["pe_layer.positional_encoding_gaussian_matrix"])
    centers = (np.arange(side, dtype=np.float32) + 0.5) / side
    image_position = fourier(g, np.stack(np.meshgrid(centers, centers), -1).reshape(1, -1, 2), gaussian)
    sparse = embed_points(g, encoder, gaussian, model.variant.image_size)
    given = g.Mul(embed_masks(g, encoder), "has_mask_input")
    dense_embed = g.Add(given, g.Mul(array(encoder["no_mask_embed.weight"]), g.Sub(1.0, "has_mask_input")))

    prompts = g.size("point_labels", 0)
    fixed = np.concatenate([array(decoder[f"{n}.weight"]) for n in ("obj_score_token", "iou_token", "mask_tokens")])
    fixed = g.Expand(fixed[None], g.Concat(prompts, np.array([1, 1]), axis=0))
    image = g.Expand(g.Add("image_embed", dense_embed), g.Concat(prompts, np.array([1, 1, 1]), axis=0))
    tokens = g.Concat(fixed, sparse, axis=1)
    tokens, image = two_way_transformer(
        g, decoder["transformer"], tokens, g.reshape(image, 0, side**2, width), image_position
    )
    score = mlp(g, decoder["pred_obj_score_head"], token(g, tokens, 0))
    ious = g.Sigmoid(mlp(g, decoder["iou_prediction_head"], token(g, tokens, 1)))
    masks = predict_masks(g, decoder, tokens, g.reshape(image, 0, side, side, width), side)
    masks, ious = stable_first(g, masks, ious)
    outputs = {"masks": masks, "ious": ious, "object_score": score}
    if is_image_only(params):
        return g, outputs
    pointers = mlp(g, params["obj_ptr_proj"], g.slice(tokens, 2, 2 + MASKS, 1))
    present = g.Unsqueeze(g.Greater(score, 0.0), np.array([2]))
    return g, outputs | {"pointers": g.Where(present, pointers, array(params["no_obj_ptr"]))}


def fourier(g: Graph, xy: str | np.ndarray, gaussian: np.ndarray) -> str:
    """Random Fourier features [..., C] of x, y [..., 2] in 0..1."""
    angle = g.Mul(g.MatMul(g.Sub(g.Mul(xy, 2.0), 1.0), gaussian), float(2 * np.pi))
    return g.Concat(g.Sin(angle), g.Cos(angle), axis=-1)


def embed_points(g: Graph, p: dict, gaussian: np.ndarray, image_size: int) -> str:
    """Embeddings [P, N, C] of the points."""
    place = fourier(g, g.Div(g.Add("point_coords", 0.5), float(image_size)), gaussian)
    real = g.Cast(g.GreaterOrEqual("point_labels", np.int32(0)), to=1)
    table = np.concatenate([array(p[f"{name}.weight"]) for name in LABELS])
    label = g.Gather(table, g.Add("point_labels", np.int32(1)))
    return g.Add(g.Mul(place, g.Unsqueeze(real, np.array([2]))), label)


def embed_masks(g: Graph, p: dict) -> str:
    """Embeddings [masks, S / 16, S / 16, C] of `mask_input`."""
    x = conv(g, p["mask_downscaling.0"], "mask_input", size=2, stride=2)
    x = g.Gelu(layer_norm(g, p["mask_downscaling.1"], x, EPS))
    x = conv(g, p["mask_downscaling.3"], x, size=2, stride=2)
    x = g.Gelu(layer_norm(g, p["mask_downscaling.4"], x, EPS))
    return conv(g, p["mask_downscaling.6"], x)


def attend(g: Graph, p: dict, q: str, k: str, v: str) -> str:
    """The attention of `sam2jq.models.decoder.Attention`."""
    q, k, v = (dense(g, p[f"{name}_proj"], x) for name, x in (("q", q), ("k", k), ("v", v)))
    return dense(g, p["out_proj"], attention(g, q, k, v, 8))


def two_way_transformer(g: Graph, p: dict, tokens: str, image: str, image_position: str) -> tuple[str, str]:
    """Tokens [P, N, C] and image [P, h * w, C], both updated."""
    token_position = tokens
    for i in range(2):
        layer = p[f"layers.{i}"]
        q = g.Add(tokens, token_position) if i else tokens
        attended = attend(g, layer["self_attn"], q, q, tokens)
        tokens = layer_norm(g, layer["norm1"], g.Add(tokens, attended) if i else attended)
        q, k = g.Add(tokens, token_position), g.Add(image, image_position)
        tokens = g.Add(tokens, attend(g, layer["cross_attn_token_to_image"], q, k, image))
        tokens = layer_norm(g, layer["norm2"], tokens)
        tokens = layer_norm(g, layer["norm3"], g.Add(tokens, mlp(g, layer["mlp"], tokens)))
        q = g.Add(tokens, token_position)
        image = g.Add(image, attend(g, layer["cross_attn_image_to_token"], k, q, tokens))
        image = layer_norm(g, layer["norm4"], image)
    q, k = g.Add(tokens, token_position), g.Add(image, image_position)
    tokens = g.Add(tokens, attend(g, p["final_attn_token_to_image"], q, k, image))
    return layer_norm(g, p["norm_final_attn"], tokens), image


def token(g: Graph, tokens: str, index: int) -> str:
    """[P, C]: one of tokens [P, N, C]."""
    return g.Gather(tokens, np.int64(index), axis=1)


def predict_masks(g: Graph, p: dict, tokens: str, image: str, side: int) -> str:
    """Mask logits [P, MASKS, 4 side, 4 side] from tokens [P, N, C] and image [P, side, side, C]."""
    x = g.Add(conv_transpose(g, p["output_upscaling.0"], image, side), "high_res_1")
    x = g.Gelu(layer_norm(g, p["output_upscaling.1"], x, 1e-6))
    x = g.Gelu(g.Add(conv_transpose(g, p["output_upscaling.3"], x, 2 * side), "high_res_0"))
    kernels = [mlp(g, p[f"output_hypernetworks_mlps.{i}"], token(g, tokens, 2 + i)) for i in range(MASKS)]
    kernels = g.Concat(*(g.Unsqueeze(kernel, np.array([1])) for kernel in kernels), axis=1)
    pixels = g.transpose(g.reshape(x, 0, (4 * side) ** 2, -1), 0, 2, 1)
    return g.reshape(g.MatMul(kernels, pixels), 0, MASKS, 4 * side, 4 * side)


def stable_first(g: Graph, masks: str, ious: str) -> tuple[str, str]:
    """Masks [P, MASKS, H, W] and IoUs [P, MASKS], the first of each replaced as `stable_or_best` chooses."""
    offset, min_ratio = STABILITY
    first = g.slice(masks, 0, 1, 1)
    area = lambda limit: g.ReduceSum(g.Cast(g.Greater(first, limit), to=1), np.array([2, 3]), keepdims=0)  # [P, 1]
    inner, outer = area(offset), area(-offset)
    stable = g.GreaterOrEqual(g.Div(inner, g.Max(outer, 1.0)), min_ratio)
    stable = g.Or(stable, g.Equal(outer, 0.0))
    best = g.Add(g.ArgMax(g.slice(ious, 1, MASKS, 1), axis=1, keepdims=1), np.int64(1))
    choice = g.Where(stable, np.int64(0), best)  # [P, 1]
    pick = lambda x: g.Unsqueeze(g.GatherND(x, choice, batch_dims=1), np.array([1]))
    join = lambda x: g.Concat(pick(x), g.slice(x, 1, MASKS, 1), axis=1)
    return join(masks), join(ious)

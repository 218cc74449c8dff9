"""The start of the mask decoder of the demo model."""

import jax
import jax.numpy as jnp
import numpy as np
from labelled_scenes import draw_labelled_clip

from sam2jq import SAM2, build
from sam2jq.data.images import normalize
from sam2jq.tree import flatten, unflatten

FEATURE_DEVIATION = 0.2  # standard deviation of the feature maps; that of the position code is 0.7


def init_decoder(model: SAM2, params: dict) -> dict:
    """`params` with a decoder whose tokens attend to the surroundings of the prompted point.

    It continues from a trunk that `trunk_loss` trained, and computes nearly the same masks as that loss's shortcut.
    1. The first self-attention averages all tokens, so that every token holds the position code of the point.
    2. In the cross-attentions, q and k select pairs of low frequencies of the position code, so that each head attends
       to the surroundings of the point; v and out_proj project to half the channels and back.
    3. Features are scaled down against the position code, all other inputs of a token are weakened, and the object
       score is raised.
    """
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    rng, width = np.random.default_rng(0), model.variant.features
    decoder = "sam_mask_decoder/transformer"
    frequencies = flat["sam_prompt_encoder/pe_layer.positional_encoding_gaussian_matrix"].T  # [width / 2, 2]
    lowest = np.argsort(np.hypot(*frequencies.T))[:8]
    select = np.zeros((width, width // 2), np.float32)
    for head, frequency in enumerate(lowest):
        across = lowest[
            np.argmin(np.abs(frequencies[lowest] @ frequencies[frequency]) / np.hypot(*frequencies[lowest].T))
        ]
        for column, row in enumerate((frequency, frequency + width // 2, across, across + width // 2)):
            select[row, 4 * head + column] = 1
    project = np.linalg.qr(rng.standard_normal((width, width // 2)))[0].astype(np.float32)

    for name, sharp, gain in [
        ("layers.0/cross_attn_token_to_image", 30, 15),
        ("layers.1/cross_attn_token_to_image", 30, 2),
        ("final_attn_token_to_image", 30, 0.2),
        ("layers.0/cross_attn_image_to_token", 4, 0.2),
        ("layers.1/cross_attn_image_to_token", 4, 0.2),
    ]:
        at = f"{decoder}/{name}"
        flat[f"{at}/q_proj/kernel"], flat[f"{at}/k_proj/kernel"] = sharp**0.5 * select, sharp**0.5 * select
        flat[f"{at}/v_proj/kernel"], flat[f"{at}/out_proj/kernel"] = gain * project, project.T.copy()
    mix = f"{decoder}/layers.0/self_attn"
    flat[f"{mix}/v_proj/kernel"] = flat[f"{mix}/out_proj/kernel"] = np.eye(width, dtype=np.float32)
    flat[f"{mix}/q_proj/kernel"] *= 0.1
    for weak in ("layers.1/self_attn/out_proj", "layers.0/mlp/layers.1", "layers.1/mlp/layers.1"):
        flat[f"{decoder}/{weak}/kernel"] *= 0.1
    flat[f"{decoder}/layers.0/norm4/scale"] *= FEATURE_DEVIATION

    images, _ = zip(*[draw_labelled_clip(seed, 1, 128) for seed in range(8)])
    images = normalize(np.concatenate(images).astype(np.float32) / 255)
    coarse = build("nano", image_size=128).apply({"params": params}, images, method="encode_image")[-1]
    for name in (
        "image_encoder.neck/convs.0.conv/",
        "image_encoder.neck/convs.1.conv/",
        "no_mem_embed",
        "no_mask_embed.weight",
    ):
        for path in [path for path in flat if name in path]:
            flat[path] = flat[path] * FEATURE_DEVIATION / np.std(coarse)
    for path in [path for path in flat if "output_hypernetworks_mlps.0" in path]:
        for i in range(1, 4):
            flat[path.replace("mlps.0", f"mlps.{i}")] = flat[path].copy()
    flat["sam_mask_decoder/pred_obj_score_head/layers.2/bias"] += 3
    return unflatten(jax.tree.map(jnp.array, flat))

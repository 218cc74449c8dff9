"""SAM 2 and 2.1: image encoder, prompt encoder, mask decoder and memory (arXiv 2408.00714)."""

import math
import re
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.models.decoder import Decoded, MaskDecoder
from sam2jq.models.hiera import Hiera
from sam2jq.models.layers import MLP, Conv, Dense, declare, resize, sine_position
from sam2jq.models.memory import MemoryAttention, MemoryEncoder
from sam2jq.models.neck import Neck
from sam2jq.models.prompt import PromptEncoder
from sam2jq.models.variants import MEMORIES, NO_OBJECT, VARIANTS, VERSIONS, Variant, variant_name
from sam2jq.tree import flatten, unflatten

Array = jax.Array
LARGEST_SIZE = 8192  # pixels of an image's side, 8 times those that SAM 2 was trained on
# the parts of the model in the order of data flow
FLOW = [
    re.compile(part)
    for part in (
        r"image_encoder\.trunk\.patch_embed",
        r"image_encoder\.trunk\.blocks",
        r"image_encoder\.neck",
        r"sam_prompt_encoder|mask_downsample",
        r"sam_mask_decoder|obj_ptr_proj",
        r"memory_encoder",
        r"memory_attention|obj_ptr_tpos_proj",
    )
]
# the beginnings of the params that an image needs; all others are of the memory
IMAGE_PARTS = ("image_encoder.", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed")
TRUNK_LINEAR = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.layers\.[01])")


class ObjectOutput(NamedTuple):
    """The chosen mask of each of B objects in a frame."""

    mask: Array  # logits [B, H, W] at stride 4
    iou: Array  # [B] the IoU that the model estimates, 0..1
    pointer: Array  # [B, C]
    object_score: Array  # logits [B, 1]: whether the object is in the frame


class SAM2(nn.Module):
    """SAM 2 as pure functions of a params tree: `model.apply({"params": params}, ..., method="encode_image")`.

    Letters: B images or objects, P prompts, S the image's side in pixels, C = variant.features; channels last.
    remat: the trunk's blocks are rematerialized, which saves memory in training and costs a third more time.
    """

    variant: Variant
    version: str = "2.1"
    remat: bool = False

    def setup(self):
        v = self.variant
        self.trunk = trunk_of(v, remat=self.remat, name="image_encoder.trunk")
        self.neck = Neck(v.features, name="image_encoder.neck")
        self.sam_prompt_encoder = PromptEncoder(v.features, v.image_size)
        self.sam_mask_decoder = MaskDecoder(v.features)
        self.memory_attention = MemoryAttention(v.memory_layers, v.memory_hidden)
        self.memory_encoder = MemoryEncoder(v.memory_features)
        self.obj_ptr_proj = MLP((v.features,) * 3)
        self.mask_downsample = Conv(1, size=4, stride=4)
        self.no_mem_embed = declare(self, "no_mem_embed", 1, 1, v.features)
        if self.version == "2.1":
            self.obj_ptr_tpos_proj = Dense(v.memory_features)
        if self.is_initializing() or self.has_variable("params", "no_obj_ptr"):  # not in an image-only model
            self.maskmem_tpos_enc = declare(self, "maskmem_tpos_enc", MEMORIES, 1, 1, v.memory_features)
            self.no_mem_pos_enc = declare(self, "no_mem_pos_enc", 1, 1, v.features)  # in every checkpoint, unused
            self.no_obj_ptr = declare(self, "no_obj_ptr", 1, v.features)
            if self.version == "2.1":
                self.no_obj_embed_spatial = declare(self, "no_obj_embed_spatial", 1, v.memory_features)

    def encode_image(self, images: Array) -> list[Array]:
        """Preprocessed images [B, S, S, 3] -> maps [B, S/4, S/4, C/8], [B, S/8, S/8, C/4], [B, S/16, S/16, C]."""
        fine, middle, coarse = self.neck(self.trunk(images))
        return [*self.sam_mask_decoder.high_res_features(fine, middle), coarse]

    def add_no_memory_embed(self, features: list[Array]) -> list[Array]:
        """`features` with the embedding that the decoder expects on an image, or on a frame without memories."""
        return [*features[:-1], features[-1] + self.no_mem_embed.astype(features[-1].dtype)]

    def decode_masks(
        self,
        features: list[Array],
        points: tuple[Array, Array] | None,
        masks: Array | None = None,
        point_mask: Array | None = None,
        *,
        multimask: bool,
    ) -> Decoded:
        """Masks of P prompts.

        features: maps of one image, or one per prompt; the coarsest from `add_no_memory_embed` or `attend_memory`.
        points: (float [P, N, 2] x and y in pixels of the S x S image, int [P, N] labels). masks: logits
        [P, S/4, S/4, 1]. point_mask: bool [P, N], False where a point is ignored, as if it were not there. multimask:
        three masks per prompt instead of one.
        """
        sparse, dense, position = self.sam_prompt_encoder(points, masks)
        if point_mask is not None:
            point_mask = jnp.pad(point_mask, ((0, 0), (0, 1)), constant_values=True)  # the encoder's padding point
        return self.sam_mask_decoder(features, sparse, dense, position, multimask, point_mask)

    def decode_all_masks(
        self, features: list[Array], points: tuple[Array, Array] | None, masks: Array | None = None
    ) -> Decoded:
        """All four masks of P prompts, for training; arguments as in `decode_masks`."""
        sparse, dense, position = self.sam_prompt_encoder(points, masks)
        return self.sam_mask_decoder.decode(features, sparse, dense, position)

    def decode_object(
        self, features: list[Array], points: tuple[Array, Array] | None, masks: Array | None = None, *, multimask: bool
    ) -> ObjectOutput:
        """The best mask of each object and its pointer; the mask is NO_OBJECT where the object is absent.

        Arguments as in `decode_masks`, but masks may be of any size. Without points, one padding point is used.
        """
        if points is None:
            batch = len(features[-1])
            points = jnp.zeros((batch, 1, 2)), -jnp.ones((batch, 1), jnp.int32)
        if masks is not None:
            masks = resize(masks, (self.variant.image_size // 4,) * 2, antialias=True)
        return self.select_best_mask(self.decode_masks(features, points, masks, multimask=multimask))

    def select_best_mask(self, decoded: Decoded) -> ObjectOutput:
        """The mask with the highest estimated IoU of each object."""
        present = decoded.object_scores > 0
        best = decoded.ious.argmax(-1)[:, None]
        pick = lambda x: jnp.take_along_axis(x, best.reshape(best.shape + (1,) * (x.ndim - 2)), 1)[:, 0]
        mask = jnp.where(present[..., None], pick(decoded.masks).astype(jnp.float32), NO_OBJECT)
        pointer = self.hide_pointer(self.obj_ptr_proj(pick(decoded.tokens)), present)
        return ObjectOutput(mask, pick(decoded.ious), pointer, decoded.object_scores)

    def object_from_mask(self, features: list[Array], masks: Array) -> ObjectOutput:
        """A given mask [B, S, S, 1] of 0 and 1 as its frame's output, with a pointer from the decoder."""
        small = resize(masks * 20.0 - 10.0, (self.variant.image_size // 4,) * 2, antialias=True)
        decoded = self.decode_object(features, None, self.mask_downsample(masks), multimask=False)
        present = jnp.any(masks > 0, axis=(1, 2))
        pointer = self.hide_pointer(decoded.pointer, present)
        return ObjectOutput(small[..., 0], jnp.ones(len(masks)), pointer, present * 20.0 - 10.0)

    def hide_pointer(self, pointer: Array, present: Array) -> Array:
        """`pointer` [B, C] where the object is `present` [B, 1], else the learned no-object pointer."""
        return jnp.where(present, pointer, self.no_obj_ptr.astype(pointer.dtype))

    def encode_memory(self, coarse: Array, masks: Array, object_scores: Array, *, binarize: bool = False) -> Array:
        """The memory [B, h, w, Cm] of a frame, from its map [B, h, w, C] and mask logits [B, S, S, 1].

        binarize: threshold the mask at 0 first, as the video predictor does on frames with a user's prompt.
        """
        probability = (masks > 0).astype(masks.dtype) if binarize else jax.nn.sigmoid(masks)
        memory = self.memory_encoder(coarse, probability * 20.0 - 10.0)
        if self.version == "2.1":
            hidden = (object_scores <= 0).astype(memory.dtype)[:, None, None]
            memory = memory + hidden * self.no_obj_embed_spatial.astype(memory.dtype)
        return memory

    def attend_memory(
        self,
        coarse: Array,
        memories: Array,
        times: Array,
        pointers: Array,
        pointer_times: Array,
        key_mask: Array | None = None,
    ) -> Array:
        """`coarse` [B, h, w, C] conditioned on memories and object pointers of other frames.

        memories: [B, T, h, w, Cm] with temporal positions `times` [T]: 0 for a conditioning frame, 1..6 for six frames
        ago to the last one. pointers: [B, P, C] with `pointer_times` [B or 1, P]: frames since then (until then, in
        reverse) over the maximal such number. key_mask: bool [B, T + P], False at empty entries; None uses all.
        """
        batch, _, height, width, channels = memories.shape
        position = sine_position(height, width, channels) + self.maskmem_tpos_enc[MEMORIES - 1 - times]  # [T, h, w, Cm]
        split = pointers.shape[-1] // channels  # a pointer is cut into tokens of the memories' width
        tokens = pointers.reshape(batch, -1, channels)
        token_position = jnp.repeat(self.pointer_position(pointer_times), split, axis=1)
        token_position = jnp.broadcast_to(token_position, tokens.shape)
        position = jnp.broadcast_to(position.reshape(-1, channels), (batch, position.size // channels, channels))
        position = jnp.concatenate([position, token_position], axis=1).astype(memories.dtype)
        memory = jnp.concatenate([memories.reshape(batch, -1, channels), tokens], axis=1)
        if key_mask is not None:
            lengths = np.array([height * width] * len(times) + [split] * pointers.shape[1])
            key_mask = jnp.repeat(key_mask, lengths, axis=1, total_repeat_length=memory.shape[1])
        frame_position = sine_position(height, width, coarse.shape[-1])
        return self.memory_attention(coarse, frame_position, memory, position, tokens.shape[1], key_mask)

    def pointer_position(self, times: Array) -> Array:
        """Position encoding [B, P, Cm] of times [B, P]: in 2.1 a projected sine of the time, in 2.0 zeros."""
        if self.version == "2.0":
            return jnp.zeros((*times.shape, self.variant.memory_features))
        half = self.variant.features // 2
        angle = times[..., None] / 10000.0 ** (2 * (jnp.arange(half) // 2) / half)
        return self.obj_ptr_tpos_proj(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))

    def __call__(self, images: Array) -> ObjectOutput:
        """Runs every part once on images [B, S, S, 3], so that `init` creates all params."""
        features = self.add_no_memory_embed(self.encode_image(images))
        size = self.variant.image_size
        given = self.object_from_mask(features, jnp.ones((len(images), size, size, 1)))
        mask = resize(given.mask[..., None], (size, size))
        memory = self.encode_memory(features[-1], mask, given.object_score)[:, None]
        coarse = self.attend_memory(features[-1], memory, jnp.zeros(1, int), given.pointer[:, None], jnp.ones((1, 1)))
        return self.decode_object([*features[:-1], coarse], None, multimask=True)


def trunk_of(v: Variant, **settings) -> Hiera:
    """The trunk of a size; settings: `remat`, `name`."""
    return Hiera(v.embed_dim, v.num_heads, v.stages, v.global_blocks, v.windows, v.position_size, **settings)


def build(name: str, version: str = "2.1", image_size: int | None = None) -> SAM2:
    """The model of a size in VARIANTS; image_size: pixels, a multiple of 32, None for the size's own.

    Raises UserError if the name or the version is unknown, or for an image size that is not a multiple of 32 or above
    LARGEST_SIZE, and for settings of jax under which the model cannot be computed.
    """
    check_jax_settings()
    size = VARIANTS[variant_name(name)]
    if version not in VERSIONS:
        raise UserError(f"unknown version {version!r}; allowed: {', '.join(VERSIONS)}")
    variant = size if image_size is None else replace(size, image_size=image_size)
    if not isinstance(variant.image_size, int) or variant.image_size < 32 or variant.image_size % 32:
        raise UserError(f"image_size must be a multiple of 32 pixels, got {image_size!r}")
    if variant.image_size > LARGEST_SIZE:
        gigabytes = 4 * variant.embed_dim * (variant.image_size // 4) ** 2 / 1e9
        raise UserError(f"image_size is {LARGEST_SIZE} pixels at most, got {image_size}: one map of the image encoder "
                        f"would take {gigabytes:.0f} GB")  # fmt: skip
    return SAM2(variant, version)


def check_jax_settings() -> None:
    """Raises UserError if jax refuses sums of different dtypes or numbers of axes, which the model makes."""
    for name, refused, needed in (("dtype", "strict", "standard"), ("rank", "raise", "allow")):
        setting = f"numpy_{name}_promotion"
        if getattr(jax.config, f"jax_{setting}") == refused:
            raise UserError(f"jax_{setting} is {refused!r}: sam2jq needs {needed!r}; call it inside of "
                            f"`with jax.{setting}({needed!r}):`")  # fmt: skip


def is_image_only(params: dict) -> bool:
    """Whether a params tree is that of an image-only model, which lacks the memory that videos need."""
    return "sam_mask_decoder" in params and "memory_encoder" not in params


@cache
def abstract_params(model: SAM2) -> dict:
    """The params tree with shapes and dtypes in place of arrays."""
    small = model.clone(variant=replace(model.variant, image_size=64))  # no parameter's shape depends on it
    return jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


def image_params(model: SAM2) -> dict:
    """`abstract_params` without the memory: what an image-only model has."""
    flat = flatten(abstract_params(model))
    return unflatten({path: leaf for path, leaf in flat.items() if path.startswith(IMAGE_PARTS)})


def is_untrained(params: dict) -> bool:
    """Whether params, quantized or not, are as `init_params` and the original code draw them, never trained.

    A norm in the decoder tells it, which no transform changes: training moves every scale off 1.
    """
    norm = flatten(params["sam_mask_decoder"]["output_upscaling.1"])
    return bool(np.all(np.asarray(norm["scale"]) == 1) and np.all(np.asarray(norm["bias"]) == 0))


def init_params(model: SAM2, seed: int) -> dict:
    """A random params tree, bitwise equal on every machine.

    numpy draws it, because XLA takes most of a minute to compile hundreds of small random operations.
    """
    rng = np.random.default_rng(seed)
    flat = flatten(abstract_params(model))
    return jax.device_put(unflatten({path: _random_leaf(rng, path, leaf.shape) for path, leaf in flat.items()}))


def _random_leaf(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = partial(rng.standard_normal, shape, np.float32)
    match path.rpartition("/")[2]:
        case "kernel":
            return normal() / np.float32(math.prod(shape[:-1]) ** 0.5)
        case "bias":
            return np.zeros(shape, np.float32)
        case "scale":
            return np.ones(shape, np.float32)
        case "gamma":
            return np.full(shape, 1e-6, np.float32)
        case "pe_layer.positional_encoding_gaussian_matrix":
            return normal()
        case _:
            return normal() * np.float32(0.02)

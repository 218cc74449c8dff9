"""The sizes of SAM 2 as a table, and the constants that all have in common."""

from dataclasses import dataclass

from sam2jq.errors import UserError, suggest

VERSIONS = ("2.0", "2.1")
FLOATS = ("float32", "bfloat16", "float16")  # dtypes that a model computes in
NO_OBJECT = -1024.0  # the mask logit where the object is not in the frame
MEMORIES = 7  # temporal positions of a memory: 0 for conditioning frames, 1..6 for six frames ago to the last frame
MEMORY_BITS = (8, 4)  # that memories and pointers can be stored in, beside floats
POINTERS = 15  # frames before the current one whose object pointers are kept


@dataclass(frozen=True)
class Variant:
    """A size of SAM 2: the trunk's stages, and the widths of the other parts.

    stages: blocks per stage; global_blocks: indices of the blocks with global attention; windows: window side per
    stage, in tokens; position_size: side of the learned background position embedding, in tokens; image_size: side of
    the model's square input, in pixels.
    """

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...] = (8, 4, 14, 7)
    position_size: int = 7
    features: int = 256
    memory_features: int = 64
    memory_layers: int = 4
    memory_hidden: int = 2048
    image_size: int = 1024


VARIANTS = {
    "tiny": Variant(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": Variant(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base-plus": Variant(112, 2, (2, 3, 16, 3), (12, 16, 20), position_size=14),
    "large": Variant(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
    "nano": Variant(
        32, 1, (1, 2, 3, 1), (4,), (8, 4, 8, 4), features=64, memory_features=16, memory_layers=2, memory_hidden=256,
        image_size=256,
    ),
}  # fmt: skip


def variant_name(name: str) -> str:
    """The key of VARIANTS for `name`, in which "_" may stand for "-". Raises UserError if there is none."""
    key = name.replace("_", "-")
    if key not in VARIANTS:
        raise UserError(f"unknown model {name!r}; allowed: {', '.join(VARIANTS)}{suggest(key, VARIANTS)}")
    return key

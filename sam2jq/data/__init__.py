"""Images, clips and drawn scenes as numpy arrays: finding, reading and preprocessing them.

Names are imported when they are first used, so that reading an image needs neither jax nor scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam2jq.data.images import preprocess, read_image
    from sam2jq.data.sources import find_images
    from sam2jq.data.synthetic.scenes import Clip, Scene, draw_clip, draw_scene

_MODULES = {
    "images": ("preprocess", "read_image"),
    "sources": ("find_images",),
    "synthetic.scenes": ("Clip", "Scene", "draw_clip", "draw_scene"),
}
_NAMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
__all__ = ["Clip", "Scene", "draw_clip", "draw_scene", "find_images", "preprocess", "read_image"]


def __getattr__(name: str):
    """The object called `name` in __all__; its module is imported on first use (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value

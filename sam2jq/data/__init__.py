"""Images and drawn scenes as numpy arrays: where they lie, how they are read, what the model is fed."""

from sam2jq.data.images import find_images, preprocess, read_image
from sam2jq.data.synthetic.scenes import Clip, Scene, draw_clip, draw_scene

__all__ = ["Clip", "Scene", "draw_clip", "draw_scene", "find_images", "preprocess", "read_image"]

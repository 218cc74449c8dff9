"""Images, clips and drawn scenes as numpy arrays: finding, reading and preprocessing them."""

from sam2jq.data.images import preprocess, read_image
from sam2jq.data.sources import find_images
from sam2jq.data.synthetic.scenes import Clip, Scene, draw_clip, draw_scene

__all__ = ["Clip", "Scene", "draw_clip", "draw_scene", "find_images", "preprocess", "read_image"]

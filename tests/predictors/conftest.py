from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from converters.exports.vanilla import define_torchvision_operators
from sam2jq.data.synthetic.scenes import draw_clip

FRAMES = 12


def connected_components(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and areas [N, 1, H, W]: each pixel takes the largest number among its 8 neighbours until none changes."""
    masks = masks.bool()
    labels = torch.where(masks, torch.arange(1.0, masks[0].numel() + 1).reshape(masks[:1].shape), 0.0)
    while True:
        spread = torch.where(masks, torch.nn.functional.max_pool2d(labels, 3, 1, 1), 0.0)
        if torch.equal(spread, labels):
            break
        labels = spread
    areas = torch.stack([torch.bincount(x.flatten().int())[x.int()] for x in labels])
    return labels.int(), torch.where(masks, areas, 0)


@pytest.fixture
def sam2_operator(monkeypatch):
    """Gives sam2 the operator that it lacks on a CPU."""
    define_torchvision_operators()
    import sam2

    operator = SimpleNamespace(get_connected_componnets=connected_components)
    monkeypatch.setattr(sam2, "_C", operator, raising=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of losslessly equal frames for both: jpg files, since the original reads nothing else."""
    folder = tmp_path_factory.mktemp("clip")
    for i, frame in enumerate(draw_clip(3, FRAMES).frames):
        Image.fromarray(frame[:, :200]).save(folder / f"{i:05d}.jpg", quality=95)
    return str(folder)

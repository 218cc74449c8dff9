import numpy as np
import pytest

from sam2jq.models.layers import resize
from sam2jq.predictors.resizing import resize_maps


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (17, 30), (8, 8), (5, 4)])
def test_maps_are_resized_as_in_the_model(size, antialias):
    maps = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    expected = np.moveaxis(np.asarray(resize(np.moveaxis(maps, 0, -1)[None], size, antialias=antialias))[0], -1, 0)
    np.testing.assert_allclose(resize_maps(maps, size, antialias=antialias), expected, atol=1e-5)

import numpy as np
import pytest
import torch

from sam2jq.predictors.regions import fill_holes, remove_small_regions, small_regions

from .conftest import connected_components


@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("area", [0.5, 1, 7, 1000])
def test_small_regions_are_those_of_a_plain_search(density, area):
    masks = np.random.default_rng(0).random((3, 18, 20)) < density
    labels, areas = connected_components(torch.from_numpy(masks[:, None]))
    expected = ((labels > 0) & (areas <= area)).numpy()[:, 0]
    np.testing.assert_array_equal(small_regions(masks, area), expected)


def test_diagonal_neighbours_are_one_region_and_masks_are_apart():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, [0, 1], [0, 1]] = True
    masks[1, 1, 1] = True
    assert small_regions(masks, 1).sum((1, 2)).tolist() == [0, 1]
    assert small_regions(masks, 2).sum((1, 2)).tolist() == [2, 1]


def test_holes_and_regions_get_the_logits_of_sam2():
    logits = np.full((1, 6, 6), -3.0, np.float32)
    logits[0, 1:4, 1:4], logits[0, 2, 2], logits[0, 5, 5] = 3, -3, 3
    cleaned = remove_small_regions(logits, 0.5, 1, 1)
    assert (cleaned[0, 2, 2], cleaned[0, 5, 5], (cleaned != logits).sum()) == (10.5, -9.5, 2)
    assert fill_holes(logits, 1)[0, 2, 2] == np.float32(0.1)
    assert fill_holes(logits, 0) is logits
    assert {x.dtype for x in (cleaned, fill_holes(logits, 1))} == {np.dtype(np.float32)}

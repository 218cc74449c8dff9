"""Params that are not those of a model, as every predictor refuses them."""

import numpy as np
import pytest
import torch

from sam2jq import AutomaticMaskGenerator, ImagePredictor, VideoPredictor, build
from sam2jq.errors import UserError
from sam2jq.models.sam2 import abstract_params
from sam2jq.tree import flatten, unflatten


@pytest.mark.parametrize("of_leaf", [torch.tensor, np.int32, np.complex64, list])
def test_params_that_are_no_arrays_of_floats_are_an_error(of_leaf):
    model = build("nano", image_size=64)
    params = flatten(abstract_params(model)) | {"no_mem_embed": of_leaf([0])}
    with pytest.raises(UserError, match=r"params must be arrays of floats, .* or weight leaves: no_mem_embed \("):
        ImagePredictor(model, unflatten(params))


@pytest.mark.parametrize("predictor", [AutomaticMaskGenerator, ImagePredictor, VideoPredictor])
def test_params_of_another_model_are_an_error(predictor):
    model, params = build("nano", image_size=64), abstract_params(build("tiny"))
    for arguments, message in (
        ((model, params), f"{predictor.__name__}: the params are not those of the model: .* do not fit"),
        ((params, model), "the model must be the one that sam2jq.load returns, got dict"),
        ((model, model), "params must be the tree that sam2jq.load returns, got SAM2"),
    ):
        with pytest.raises(UserError, match=message):
            predictor(*arguments)

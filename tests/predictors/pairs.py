"""The original video predictor and ours, on the same weights, and a comparison of what they yield."""

from functools import cache

import numpy as np

from converters.exports.vanilla import build_original
from sam2jq import VideoPredictor
from tests.conftest import twin

LIMIT = 1e-3  # of the logits: float32, and memories rounded to bfloat16 in both


@cache
def predictors(version: str, name: str = "nano", image_size: int | None = None):
    """The original video predictor and ours, on the same weights."""
    weights = twin(name, version, image_size)
    original = build_original(name, version, image_size, video=True)
    original.load_state_dict(weights.torch.state_dict())
    return original, VideoPredictor(weights.model, weights.params)


def both(pair, clip, run):
    """What `run(predictor, state)` yields from both, [[(frame, ids, masks)]]."""
    results = []
    for predictor in pair:
        state = predictor.init_state(clip)
        results.append([(frame, list(ids), np.asarray(masks)) for frame, ids, masks in run(predictor, state)])
    return results


def compare(results, limit=LIMIT):
    original, ours = results
    assert [row[:2] for row in ours] == [row[:2] for row in original]
    for (frame, _, expected), (_, _, got) in zip(original, ours):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= limit, frame
        assert got.std() > max(10 * limit, LIMIT)  # there is something to compare

"""All masks of images, compared with those of a reference."""

import json
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sam2jq.cli.main import main
from sam2jq.data import draw_scene
from sam2jq.errors import UserError
from sam2jq.eval.everything_benchmark import compare_everything, paired_ious
from sam2jq.eval.metrics import iou
from tests.cli.conftest import failure


def masks(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 6, 8)) < 0.4


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("reference", range(6))
def test_pairs_are_those_of_the_largest_sum(count, reference):
    """Against all ways to pair them."""
    found, expected = masks(count, count), masks(10 + reference, reference)
    pairs = [[iou(found[i], expected[j]) if i < count else 0.0 for j in range(reference)] for i in range(6)]
    best = max(sum(pairs[i][j] for j, i in enumerate(order)) for order in permutations(range(6), reference))
    got = paired_ious(found, expected)
    assert got.shape == (reference,)
    assert got.sum() == pytest.approx(best)


def generator(by_image: dict[int, np.ndarray]):
    """A generator that finds the given masks in the image of a number."""
    return SimpleNamespace(generate=lambda image: [{"segmentation": each} for each in by_image[image[0, 0, 0]]])


def images(count: int) -> list:
    return [(str(i), lambda i=i: np.full((6, 8, 3), i, np.uint8)) for i in range(count)]


def test_scores_of_everything():
    first, second, third = masks(0, 2), masks(1, 1), masks(2, 0)
    half = first[0].copy()
    half[:, 3:] = False  # a part of a mask
    reference = generator({0: first, 1: second, 2: third})
    same = compare_everything((reference, reference), images(3))
    expected = {"recall": 1.0, "miou": 1.0, "count_mismatch": 0, "masks": 3, "reference_masks": 3, "images": 3}
    assert same == expected | {"left_out": {}}
    other = generator({0: np.stack([first[1], half]), 1: third, 2: masks(3, 4)})
    got = compare_everything((other, reference), images(3))
    part = half.sum() / first[0].sum()
    assert got["miou"] == pytest.approx((1 + part + 0) / 3)
    assert got["recall"] == pytest.approx((1 + (part >= 0.5)) / 3)
    assert (got["count_mismatch"], got["masks"], got["reference_masks"]) == (2, 6, 3)


def test_a_reference_without_masks_is_an_error():
    nothing = generator({0: masks(0, 0)})
    with pytest.raises(UserError, match="the reference finds no mask in 1 images: lower everything.pred_iou_thresh"):
        compare_everything((generator({0: masks(0, 3)}), nothing), images(1))


def test_an_image_that_cannot_be_read_is_left_out():
    def broken():
        raise UserError("a.png: broken")

    every = generator({0: masks(0, 2)})
    got = compare_everything((every, every), [*images(1), ("a.png", broken)])
    assert (got["images"], got["left_out"]) == (1, {"a.png": "a.png: broken"})


def test_a_reference_belongs_to_everything(capsys):
    data = ["evaluate", "--model.checkpoint", "demo", "--data", "scenes:0", "--num_samples", "1"]
    message = "reference: set it to the checkpoint to compare with, for task everything only"
    assert message in failure(capsys, *data, "--task", "everything")
    assert message in failure(capsys, *data, "--reference", "demo")
    assert "task image has no memory" in failure(capsys, *data, "--memory_bits", "8")
    assert "memory_bits must be 8, 4 or null, got 5" in failure(capsys, *data, "--task", "vos", "--memory_bits", "5")


@pytest.mark.slow
def test_a_model_finds_what_it_found_before(tmp_path, capsys):
    for i in range(2):
        Image.fromarray(draw_scene(i, 64).image).save(tmp_path / f"{i}.png")
    model = ["--model.checkpoint", "demo", "--model.image_size", "64", "--data", str(tmp_path)]
    thresholds = {"points_per_side": "3", "pred_iou_thresh": "0.2", "stability_score_thresh": "0.3"}
    settings = [part for key, value in thresholds.items() for part in (f"--everything.{key}", value)]
    output = ["--output.root", str(tmp_path), "--output.job", "out"]
    assert main(["evaluate", "--task", "everything", "--reference", "demo", *model, *settings, *output]) == 0
    assert "everything  mIoU 1.0000, recall 1.0000 at IoU 0.5" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (results["count_mismatch"], results["images"]) == (0, 2)

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sam2jq.data.prompts import click_grid
from sam2jq.eval.metrics import (
    VideoScores,
    boundary_iou,
    contour_accuracy,
    iou,
    mean_scores,
    region_similarity,
    video_scores,
)
from sam2jq.quant.error import cosine, relative_error, sqnr

RADII = {(40, 60): 1, (120, 160): 2, (300, 400): 4, (480, 854): 8}  # ceil(0.008 * diagonal)
NONE, LEFT, RIGHT = np.zeros((3, 10, 10), bool)  # LEFT and RIGHT do not touch, nor do their contours
LEFT[3:6, 1:3] = True
RIGHT[3:6, 6:8] = True


def box(shape, rows, columns):
    """bool [H, W], true in two half-open ranges."""
    mask = np.zeros(shape, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def blobs(shape, seed, share=0.4):
    """bool [H, W], smooth blobs that cover a share of the image and of its edges."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 5, mode="wrap")
    return noise > np.quantile(noise, 1 - share)


def slow_contour(mask):
    """The (row, column) of the pixels that differ from a neighbour inside the image: right, below or below right."""
    values = {index: bool(value) for index, value in np.ndenumerate(mask)}
    neighbours = lambda y, x: [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
    return [at for at in values if any(values.get(near, values[at]) != values[at] for near in neighbours(*at))]


def slow_contour_accuracy(got, reference):
    """2 * precision * recall / (precision + recall) from all pairs of contour pixels."""
    radius = math.ceil(0.008 * math.hypot(*got.shape))
    one, other = slow_contour(got), slow_contour(reference)
    if not one or not other:
        return float(one == other)
    (y, x), (v, u) = np.array(one).T, np.array(other).T
    near = np.subtract.outer(y, v) ** 2 + np.subtract.outer(x, u) ** 2 <= radius**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if near.any() else 0.0


def slow_video_scores(got, reference):
    """J and F by the evaluator's loop, which counts frames from the first with a mask that is not empty."""
    started, js, fs = False, [], []
    for index in range(1, len(got) - 1):
        g, r = set(zip(*got[index].nonzero())), set(zip(*reference[index].nonzero()))
        started = started or bool(g) or bool(r)
        if started:
            js.append(len(g & r) / len(g | r) if g | r else 1)
            fs.append(slow_contour_accuracy(got[index], reference[index]))
    return sum(js) / len(js), sum(fs) / len(fs)


def test_relative_error_of_known_vectors():
    assert relative_error([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)
    assert relative_error([0.0], [0.0]) == 0
    assert relative_error([1.0], [0.0]) == float("inf")


def test_sqnr_is_decibels_of_signal_over_noise_power():
    assert sqnr([10.0, 1.0], [10.0, 0.0]) == pytest.approx(20)
    assert sqnr([2.0], [1.0]) == pytest.approx(0)
    assert sqnr([1.0], [1.0]) == sqnr([0.0], [0.0]) == float("inf")
    assert sqnr([1.0], [0.0]) == -float("inf")


def test_one_more_bit_adds_6_decibels():
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    rounded = lambda bits: np.round(x * 2**bits) / 2**bits
    assert sqnr(rounded(9), x) - sqnr(rounded(8), x) == pytest.approx(20 * math.log10(2), abs=0.1)  # sampling noise


def test_cosine_of_known_vectors():
    assert cosine([1.0, 1.0], [1.0, 0.0]) == pytest.approx(math.sqrt(0.5))
    assert cosine([[1.0], [2.0]], [[-2.0], [-4.0]]) == pytest.approx(-1)
    assert cosine([0.0, 1.0], [1.0, 0.0]) == cosine([0.0], [1.0]) == cosine([1.0], [0.0]) == 0
    assert cosine([0.0], [0.0]) == 1


@pytest.mark.parametrize("overlap", [iou, region_similarity])
def test_overlap_of_known_masks(overlap):
    a = np.array([[1, 1, 0, 0]], bool)
    b = np.array([[0, 1, 1, 0]], bool)
    none = np.zeros_like(a)
    np.testing.assert_allclose(overlap(np.stack([a, a, none]), np.stack([a, b, none])), [1, 1 / 3, 1])
    assert overlap(a, none) == overlap(none, a) == 0


@pytest.mark.parametrize(("shape", "depth"), [((10, 10), 1), ((60, 64), 2), ((300, 400), 10)])
def test_boundary_iou_ignores_pixels_deeper_than_2_percent_of_the_diagonal(shape, depth):
    side = 2 * depth + 3
    whole = box(shape, (1, 1 + side), (2, 2 + side))
    pinhole, dent = whole.copy(), whole.copy()
    pinhole[1 + depth + 1, 2 + depth + 1] = False
    dent[1, 2 + depth + 1] = False
    inner = side - 2 * depth
    ring = side**2 - inner**2
    assert boundary_iou(whole, box(shape, (1, 1 + side), (2, 2 + side))) == 1
    # around the middle pixel the whole inside (inner = 3) becomes boundary
    assert boundary_iou(pinhole, whole) == pytest.approx(ring / (ring + inner**2 - 1))
    # a hole in the outermost row makes the inside's upper row boundary, as far as depth reaches to either side
    assert boundary_iou(dent, whole) == pytest.approx((ring - 1) / (ring + min(inner, 2 * depth + 1)))


def test_boundary_iou_ends_a_mask_at_the_edge_of_the_image():
    full = np.ones((10, 10), bool)
    assert boundary_iou(full, box((10, 10), (1, 9), (1, 9))) == 0
    assert boundary_iou(full, full & ~box((10, 10), (3, 7), (3, 7))) == pytest.approx(36 / (36 + 20))


def test_boundary_iou_of_each_pair_and_of_empty_masks():
    got, reference = np.stack([[NONE, NONE], [LEFT, LEFT]]), np.stack([[NONE, LEFT], [RIGHT, LEFT]])
    np.testing.assert_array_equal(boundary_iou(got, reference), [[1, 0], [0, 1]])


def test_contours_of_known_masks():
    pixel = box((10, 10), (5, 6), (5, 6))
    assert slow_contour(pixel) == [(4, 4), (4, 5), (5, 4), (5, 5)]
    assert slow_contour(box((4, 4), (0, 4), (2, 4))) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    # contours: 2 x 2 pixels, and from the same corner a ring of 12 around 4 x 4; radius 1. All of the 4 are on the ring
    # or beside it; 3 of the 12 are among the 4 and 2 beside them
    assert contour_accuracy(pixel, box((10, 10), (5, 8), (5, 8))) == pytest.approx(2 * 1 * 5 / 12 / (1 + 5 / 12))


@pytest.mark.parametrize(("shape", "radius"), RADII.items())
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_moved_by_the_radius_still_matches_and_one_pixel_more_does_not(shape, radius, axis):
    start = shape[axis] // 2
    edge = lambda at: np.broadcast_to((np.arange(shape[axis]) < at).reshape((-1, 1) if axis == 0 else (1, -1)), shape)
    assert (
        contour_accuracy(edge(start + radius), edge(start)) == contour_accuracy(edge(start), edge(start + radius)) == 1
    )
    assert contour_accuracy(edge(start + radius + 1), edge(start)) == 0


def test_the_tolerance_is_a_disk():
    shape = (300, 400)  # radius 4
    moved = lambda down, right: contour_accuracy(
        box(shape, (50, 51), (60, 61)), box(shape, (50 + down, 51 + down), (60 + right, 61 + right))
    )
    # contours are squares of 2 x 2: their nearest corners are apart by one less than the move, the others further
    assert moved(5, 0) == 0.5  # rows 4 apart, and 5
    assert moved(4, 3) == 0.25  # corners (3, 2) apart, and (3, 3), (4, 2)
    assert moved(4, 4) == 0  # corners (3, 3) apart: sqrt(18) > 4


def test_contour_accuracy_is_the_harmonic_mean_of_precision_and_recall():
    one, both = box((40, 60), (5, 10), (5, 10)), box((40, 60), (5, 10), (5, 10)) | box((40, 60), (25, 30), (30, 35))
    assert contour_accuracy(both, one) == contour_accuracy(one, both) == pytest.approx(2 / 3)  # 1 and 1/2


def test_contour_accuracy_without_contours():
    full = np.ones_like(NONE)
    assert contour_accuracy(NONE, NONE) == 1
    assert contour_accuracy(LEFT, NONE) == contour_accuracy(NONE, LEFT) == 0
    assert contour_accuracy(full, full) == contour_accuracy(full, NONE) == 1  # the image's edge is no contour
    assert contour_accuracy(full, LEFT) == contour_accuracy(LEFT, full) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(40, 60), (90, 130), (30, 490), (900, 12), (1, 50), (50, 1)])  # radii 1 to 8
def test_contour_accuracy_equals_that_of_all_pairs_of_pixels(shape, seed):
    a, b, small = blobs(shape, seed), blobs(shape, seed + 100), blobs(shape, seed + 200, share=0.05)
    for got, reference in [(a, b), (b, a), (a, np.roll(a, 2, 1)), (small, a), (a, a & ~small), (small, ~small)]:
        assert contour_accuracy(got, reference) == pytest.approx(slow_contour_accuracy(got, reference), rel=1e-12)


def test_the_first_and_the_last_annotated_frame_are_left_out():
    got, reference = np.stack([NONE, LEFT, LEFT, RIGHT]), np.stack([LEFT, LEFT, RIGHT, LEFT])
    assert video_scores(got, reference) == (0.5, 0.5)


def test_frames_before_the_first_mask_do_not_count():
    late = np.stack([LEFT, NONE, NONE, RIGHT, LEFT, LEFT])
    assert video_scores(late, late) == (1, 1)
    assert video_scores(np.stack([LEFT, NONE, NONE, LEFT, LEFT, LEFT]), late) == (0.5, 0.5)
    assert video_scores(np.stack([LEFT, NONE, RIGHT, LEFT, LEFT, LEFT]), late) == (1 / 3, 1 / 3)  # predicted too early


def test_a_later_frame_without_the_object_scores_1_and_0_if_one_is_predicted():
    gone = np.stack([LEFT, LEFT, NONE, NONE, NONE, LEFT])
    assert video_scores(np.stack([LEFT, RIGHT, NONE, NONE, NONE, LEFT]), gone) == (0.75, 0.75)
    assert video_scores(np.stack([LEFT, LEFT, LEFT, NONE, NONE, LEFT]), gone) == (0.75, 0.75)


def test_an_empty_prediction_scores_1_only_where_the_object_is_absent():
    gone = np.stack([LEFT, LEFT, RIGHT, NONE, LEFT])
    assert video_scores(np.zeros_like(gone), gone) == (1 / 3, 1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_video_scores_equal_those_of_a_slow_implementation(seed):
    shape = (80, 120)
    reference = np.stack([np.roll(blobs(shape, seed, 0.1), 3 * t, 1) for t in range(8)])
    got = np.stack([np.roll(mask, t % 3, 0) | blobs(shape, t, 0.02) for t, mask in enumerate(reference)])
    reference[[1, 2, 5]] = got[[1, 5, 6]] = False
    np.testing.assert_allclose(video_scores(got, reference), slow_video_scores(got, reference), rtol=1e-12)


def test_the_mean_score_is_over_the_objects_of_all_videos():
    scores = [VideoScores(1.0, 0.5), VideoScores(0.5, 0.5), VideoScores(0.0, 0.2)]
    assert mean_scores(scores) == pytest.approx((0.5, 0.4))
    assert mean_scores(scores).jf == pytest.approx(0.45)
    with pytest.raises(ValueError, match="no object"):
        mean_scores([])


@pytest.mark.parametrize("frames", [[LEFT], [LEFT, LEFT], [LEFT, NONE, NONE, LEFT]])
def test_an_object_without_a_visible_frame_to_score_is_an_error(frames):
    reference = np.stack(frames)
    with pytest.raises(ValueError, match="none of the .* annotated frames"):
        video_scores(np.ones_like(reference), reference)


@pytest.mark.parametrize("metric", [relative_error, sqnr, cosine])
def test_array_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="shapes differ"):
        metric(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("metric", [iou, boundary_iou, region_similarity, contour_accuracy, video_scores])
def test_mask_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="shapes differ"):
        metric(np.zeros((1, 2), bool), np.zeros((2, 1), bool))


@pytest.mark.parametrize("metric", [boundary_iou, region_similarity, contour_accuracy, video_scores])
def test_logits_are_rejected(metric):
    with pytest.raises(ValueError, match="masks must be bool.*got float"):
        metric(np.zeros((4, 4)), np.zeros((4, 4)))


def test_the_number_of_axes_must_fit():
    with pytest.raises(ValueError, match=r"bool \[H, W\], got bool \[1, 10, 10\]"):
        contour_accuracy(NONE[None], NONE[None])
    with pytest.raises(ValueError, match=r"bool \[T, H, W\], got bool \[10, 10\]"):
        video_scores(NONE, NONE)


def test_the_click_grid_covers_the_image_evenly():
    points, labels = click_grid(2, 8)
    assert points[:, 0].tolist() == [[2, 2], [6, 2], [2, 6], [6, 6]]
    assert (labels == 1).all()

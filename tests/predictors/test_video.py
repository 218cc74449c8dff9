import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sam2jq import VideoPredictor
from sam2jq.data.synthetic.scenes import draw_clip
from sam2jq.errors import UserError
from sam2jq.predictors import video_steps
from sam2jq.predictors.memory_bank import FrameInfo, condition_on_memory
from sam2jq.predictors.video_state import memory_bank

from .pairs import LIMIT, both, compare, predictors


@pytest.fixture
def pair():
    return predictors("2.1")


@pytest.fixture(scope="module")
def prompted_alone(clip):
    """prompted_alone(method, **prompt): as `both`, of the first frame of one clip without any other prompt."""
    pair = predictors("2.1")
    states = [predictor.init_state(clip) for predictor in pair]

    def run(method, **prompt):
        for predictor, state in zip(pair, states):
            predictor.reset_state(state)
            frame, ids, masks = getattr(predictor, method)(state, 0, 1, **prompt)
            yield [(frame, list(ids), np.asarray(masks))]

    return run


@pytest.mark.end_to_end
@pytest.mark.parametrize("version", ["2.1", pytest.param("2.0", marks=pytest.mark.slow)])
def test_two_objects_over_twelve_frames_match_the_original(version, clip):
    def run(predictor, state):
        yield predictor.add_new_points_or_box(state, 0, 7, points=[[60, 80]], labels=[1])
        yield predictor.add_new_points_or_box(state, 0, 3, box=[100, 90, 180, 200])
        yield from predictor.propagate_in_video(state)

    compare(both(predictors(version), clip, run))


@pytest.mark.parametrize("option", [{"fill_hole_area": 40}, {"non_overlap_masks": True}])
def test_filled_holes_and_masks_without_overlap_match_the_original(pair, clip, sam2_operator, monkeypatch, option):
    ours = VideoPredictor(pair[1].model, pair[1].params, **option)
    for name, value in ({"fill_hole_area": 0} | option).items():
        monkeypatch.setattr(pair[0], name, value)

    def run(predictor, state):
        yield predictor.add_new_points_or_box(state, 0, 7, points=[[60, 80]], labels=[1])
        yield predictor.add_new_points_or_box(state, 0, 3, box=[100, 90, 180, 200])
        yield from predictor.propagate_in_video(state, max_frame_num_to_track=1)

    expected, got, plain = both((pair[0], ours, pair[1]), clip, run)
    for (*_, theirs), (*_, masks) in zip(expected, got):  # logits of two objects that are equal but for rounding
        assert (np.abs(theirs - masks) > LIMIT).mean() < (1e-3 if ours.non_overlap_masks else 1e-9)
    changed = [masks != before for (*_, masks), (*_, before) in zip(got, plain)]
    assert [each.any() for each in changed] == [not ours.non_overlap_masks, True, True, True]
    if ours.non_overlap_masks:
        assert {(masks > 0).sum(0).max() for _, _, masks in got} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("nano", 128), ("tiny", 512)])
def test_another_image_size_matches_the_original(name, size, clip):
    """As of a package that was made at 128 pixels, and of medical checkpoints at 512."""

    def run(predictor, state):
        yield predictor.add_new_points_or_box(state, 0, 1, box=[100, 90, 180, 200])
        yield from predictor.propagate_in_video(state, max_frame_num_to_track=3)

    compare(both(predictors("2.1", name, size), clip, run))


DISC = np.hypot(*(np.mgrid[:256, :200] - [[[120]], [[90]]])) < 30


@pytest.mark.parametrize(
    "mask",
    [
        DISC,
        DISC * np.uint8(255),
        DISC * np.uint16(40000),
        DISC * 7,
        np.where(DISC, 0.4, 0.0).astype(np.float16),
        np.where(DISC, 1e-60, 0.0),
        np.asarray(Image.fromarray(DISC)),
        DISC.tolist(),
    ],
    ids=["bool", "0/255", "16 bits", "label 7", "soft", "tiny", "PIL", "list"],
)
def test_any_value_but_0_is_object_as_in_the_original(prompted_alone, mask):
    original, ours = prompted_alone("add_new_mask", mask=mask)
    compare([original, ours])
    assert (ours[0][2] > 0).sum() == (original[0][2] > 0).sum()
    assert (ours[0][2] > 0).sum() == pytest.approx(DISC.sum(), rel=0.01)  # at the resolution of the model's masks


@pytest.mark.parametrize(
    ("values", "message"),
    [((-10.0, 10.0), "looks like logits: give mask > 0"), ((-1, -3), "looks like logits"),
     ((0, np.nan), "NaN or infinite"), ((0, np.inf), "NaN or infinite"), (("no", "yes"), "not an array of numbers"),
     ((128, 255), "from 128 to 255 and no 0"), ((0.001, 0.99), "from 0.001 to 0.99 and no 0")],
)  # fmt: skip
def test_a_mask_that_is_no_mask_is_an_error(pair, values, message):
    _, predictor = pair
    state = predictor.init_state(np.zeros((2, 256, 200, 3), np.uint8))
    with pytest.raises(UserError, match=message):
        predictor.add_new_mask(state, 0, 1, np.where(DISC, *values[::-1]))
    assert state.objects == {}


def test_a_masked_array_is_an_error(pair):
    """Its mask says what it does not hold, which numpy forgets."""
    state = pair[1].init_state(np.zeros((2, 256, 200, 3), np.uint8))
    with pytest.raises(UserError, match="a masked array: give its `filled` values"):
        pair[1].add_new_mask(state, 0, 1, np.ma.masked_array(DISC, ~DISC))


@pytest.mark.parametrize("frame", [True, 1.0, "1", None, np.nan, [1]])
def test_a_frame_is_an_int(pair, frame):
    _, predictor = pair
    state = predictor.init_state(np.zeros((2, 40, 60, 3), np.uint8))
    click = {"points": [[1, 1]], "labels": [1]}
    predictor.add_new_points_or_box(state, np.int64(0), 1, **click)
    calls = [
        lambda: predictor.add_new_points_or_box(state, frame, 2, **click),
        lambda: predictor.add_new_mask(state, frame, 2, np.eye(40, 60)),
        lambda: predictor.clear_all_prompts_in_frame(state, frame, 1),
    ]
    if frame is not None:
        calls += [lambda: next(predictor.propagate_in_video(state, start_frame_idx=frame))]
        calls += [lambda: next(predictor.propagate_in_video(state, max_frame_num_to_track=frame))]
    for call in calls:
        with pytest.raises(UserError, match="must be an int"):
            call()
    assert (list(state.objects), list(state.objects[1].prompts)) == ([1], [0])


@pytest.mark.parametrize("obj_id", [[1], np.array([1]), np.nan, {"a": 1}])
def test_an_object_has_a_name_that_can_be_found_again(pair, obj_id):
    _, predictor = pair
    state = predictor.init_state(np.zeros((2, 40, 60, 3), np.uint8))
    for call in (
        lambda: predictor.add_new_points_or_box(state, 0, obj_id, points=[[1, 1]], labels=[1]),
        lambda: predictor.add_new_mask(state, 0, obj_id, np.eye(40, 60)),
        lambda: predictor.clear_all_prompts_in_frame(state, 0, obj_id),
        lambda: predictor.remove_object(state, obj_id),
    ):
        with pytest.raises(UserError, match="give each object a whole number, or another hashable name"):
            call()
    assert state.objects == {}


def test_an_object_may_be_named_by_an_array_of_one_number(pair):
    """Whose hash is not that of its value: it would name another object each time."""
    state = pair[1].init_state(np.zeros((2, 40, 60, 3), np.uint8))
    for obj_id in (1, np.int64(1), np.array(1), torch.tensor(1)):
        pair[1].add_new_points_or_box(state, 0, obj_id, points=[[1, 1]], labels=[1])
    assert state.obj_ids == [1]


BOX = np.array([100.0, 90.0, 180.0, 200.0])
NONE = {"points": np.zeros((0, 2)), "labels": np.zeros(0, np.int32)}
UNUSUAL = {
    "no points beside a box": NONE | {"box": BOX},
    "no points": NONE,
    "a box as points": {"points": BOX.reshape(2, 2), "labels": [2, 3]},
    "a box and a click as points": {"points": [[100, 90], [180, 200], [120, 100]], "labels": [2, 3, 1]},
    "box [2, 2]": {"box": BOX.reshape(2, 2)},
    "box [1, 2, 2]": {"box": BOX.reshape(1, 2, 2)},
    "points [1, N, 2] and labels [N]": {"points": BOX.reshape(1, 2, 2), "labels": [1, 0]},
    "points [N, 2] and labels [1, N]": {"points": BOX.reshape(2, 2), "labels": [[1, 0]]},
}


@pytest.mark.parametrize("prompt", UNUSUAL)
def test_prompts_that_the_original_takes(prompted_alone, prompt):
    compare(prompted_alone("add_new_points_or_box", **UNUSUAL[prompt]))


@pytest.mark.slow  # the same programs as above on more ways to call them
def test_corrections_masks_and_both_directions_match_the_original(pair, clip):
    """One long session, for each call to meet the state that all before it left.

    But no frame where an object has no pointer yet: there the original stops on a CPU, over its bfloat16 memories.
    """
    mask = np.zeros((256, 200), bool)
    mask[40:120, 30:90] = True

    def run(predictor, state):
        yield predictor.add_new_mask(state, 5, 1, mask)
        yield from predictor.propagate_in_video(state, max_frame_num_to_track=4)
        yield from predictor.propagate_in_video(state, reverse=True)
        yield predictor.add_new_points_or_box(state, 7, 1, points=[[60, 80]], labels=[1])  # corrects a tracked frame
        yield predictor.add_new_points_or_box(state, 7, 1, points=[[20, 30]], labels=[0], clear_old_points=False)
        yield predictor.add_new_points_or_box(state, 6, 2, points=[[100, 150]], labels=[1])  # later than object 1
        yield from predictor.propagate_in_video(state, start_frame_idx=6)
        yield predictor.clear_all_prompts_in_frame(state, 6, 2)
        yield predictor.add_new_points_or_box(state, 5, 2, box=[0, 0, 90, 90])
        yield from predictor.propagate_in_video(state, start_frame_idx=5, max_frame_num_to_track=3, reverse=True)
        ids, updated = predictor.remove_object(state, 1)
        yield from ((frame, ids, masks) for frame, masks in updated)
        yield from predictor.propagate_in_video(state)
        predictor.reset_state(state)
        yield predictor.add_new_points_or_box(state, 2, 9, points=[[0.3, 0.3]], labels=[1], normalize_coords=False)

    compare(both(pair, clip, run))


def test_a_whole_clip_compiles_one_step(pair):
    """The bank fills up over the first 15 frames, and nothing is compiled again; the arrays sent to the device for
    frame 17 have the shapes of those for frame 1."""
    _, predictor = pair
    state = predictor.init_state(draw_clip(4, 18).frames)
    for obj_id, x in enumerate((60, 120, 200)):
        predictor.add_new_points_or_box(state, 0, obj_id, points=[[x, 80]], labels=[1])
    frames = predictor.propagate_in_video(state)
    sizes = lambda: [step._cache_size() for step in (video_steps.condition_frame, video_steps.track_frame)]
    next(frames), next(frames)  # the first bank comes from the host, the second one from the step itself
    programs = sizes()
    assert len(list(frames)) == 16
    assert sizes() == programs
    shapes = [jax.tree.map(np.shape, memory_bank(list(state.objects.values()), frame, False)) for frame in (1, 17)]
    assert shapes[0] == shapes[1]


@pytest.mark.end_to_end
def test_another_number_of_objects_or_prompts_compiles_nothing_of_the_image_encoder(pair):
    _, predictor = pair
    state = predictor.init_state(draw_clip(4, 3).frames)
    predictor.add_new_points_or_box(state, 0, 1, points=[[60, 80]], labels=[1])
    encoders, trackers = video_steps.encode_frame._cache_size(), video_steps.track_frame._cache_size()
    for obj_id in (1, 2, 3):
        for frame in range(min(obj_id, 2)):
            predictor.add_new_points_or_box(state, frame, obj_id, points=[[60, 80]] * obj_id, labels=[1] * obj_id)
        list(predictor.propagate_in_video(state, max_frame_num_to_track=1))
    assert video_steps.encode_frame._cache_size() == encoders
    assert video_steps.track_frame._cache_size() > trackers


def test_empty_entries_of_the_bank_change_nothing(pair):
    """To 1e-5: a bank of two entries, both filled, against one of all POINTERS entries with the same two filled."""
    _, predictor = pair
    state = predictor.init_state(draw_clip(4, 4).frames)
    predictor.add_new_points_or_box(state, 0, 1, points=[[60, 80]], labels=[1])
    list(predictor.propagate_in_video(state))
    bank = memory_bank(list(state.objects.values()), 3, False)
    short = bank._replace(**{name: getattr(bank, name)[:, :2] for name in bank._fields if name.startswith("non_cond")})
    coarse = np.random.default_rng(0).standard_normal((1, 16, 16, 64)).astype(np.float32)
    condition = jax.jit(
        lambda bank: predictor.model.apply(
            {"params": predictor.params},
            coarse,
            bank,
            FrameInfo(3, 1, 3.0),
            method=condition_on_memory,
        )
    )
    assert bank.non_cond_valid.sum() == 2
    np.testing.assert_allclose(condition(short), condition(bank), atol=1e-5)


def test_bad_input_is_named(pair):
    _, predictor = pair
    state = predictor.init_state(np.zeros((2, 40, 60, 3), np.uint8))
    with pytest.raises(ValueError, match="no prompt on any object"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(ValueError, match="object 5 was never added; the objects are"):
        predictor.remove_object(state, 5, strict=True)
    with pytest.raises(ValueError, match="object 5 was never added"):
        predictor.clear_all_prompts_in_frame(state, 0, 5)
    with pytest.raises(ValueError, match=r"object 1: the mask is \[40, 61\], the frames \[40, 60\]"):
        predictor.add_new_mask(state, 0, 1, np.ones((40, 61)))
    with pytest.raises(ValueError, match="frame 2: the clip has frames 0 to 1"):
        predictor.add_new_points_or_box(state, 2, 1, points=[[1, 1]], labels=[1])
    with pytest.raises(ValueError, match="object 1: no prompt; give points and labels, or a box"):
        predictor.add_new_points_or_box(state, 0, 1)
    with pytest.raises(ValueError, match="go together"):
        predictor.add_new_points_or_box(state, 0, 1, points=[[1, 1]])
    with pytest.raises(ValueError, match="clear_old_points=True"):
        predictor.add_new_points_or_box(state, 0, 1, box=[1, 1, 5, 5], clear_old_points=False)
    with pytest.raises(UserError, match="object 1: 2 prompts for one object"):
        predictor.add_new_points_or_box(state, 0, 1, box=[[1, 1, 5, 5], [2, 2, 6, 6]])
    for prompt in (
        {"points": np.ones((2, 3, 2)), "labels": np.ones((2, 3), int)},
        {"points": np.ones((2, 1, 2)), "labels": np.ones((2, 1), int)},
        {"box": np.zeros((0, 4))},
    ):
        with pytest.raises(UserError, match="object 1: [02] prompts for one object"):
            predictor.add_new_points_or_box(state, 0, 1, **prompt)
    for prompt in ({"points": [[np.nan, 1]], "labels": [1]}, {"box": [1, 1, np.inf, 5]}):
        with pytest.raises(UserError, match="holds NaN or infinite values: give finite numbers"):
            predictor.add_new_points_or_box(state, 0, 1, **prompt)
    predictor.add_new_points_or_box(state, 0, 1, points=[[1, 1]], labels=[1])
    for frame in (-1, 2):
        with pytest.raises(UserError, match=f"frame {frame}: the clip has frames 0 to 1"):
            next(predictor.propagate_in_video(state, start_frame_idx=frame))
    predictor.reset_state(state)
    with pytest.raises(UserError, match="mask is not an array of numbers"):
        predictor.add_new_mask(state, 0, 1, [[1, 2], [3]])
    assert state.objects == {}  # nothing half entered
    assert predictor.remove_object(state, 5) == ([], [])
    with pytest.raises(ValueError, match=r"a clip must be uint8 \[T, H, W, 3\]"):
        predictor.init_state(np.zeros((0, 40, 60, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        predictor.init_state("nowhere.mp4")

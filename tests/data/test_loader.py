from itertools import islice

import numpy as np
import pytest
from PIL import Image

from sam2jq.data.loader import check_disjoint, find_items, order, prefetched, read_item, split_of
from sam2jq.errors import UserError


def frame(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def sav(tmp_path):
    for split, count in {"sav_train": 10, "sav_val": 5}.items():
        for i in range(count):
            frame(tmp_path / split / "JPEGImages_24fps" / f"{split}_1" / f"{i:05d}.png", 10 * i)
    return tmp_path


def test_split_of_finds_the_folder_of_each_split(sav):
    train, val = (find_items(split_of(str(sav), split), None, 0) for split in ("sav_train", "sav_val"))
    assert (len(train), len(val)) == (10, 5)
    check_disjoint(train, val)


def test_splits_that_share_a_frame_are_an_error(sav):
    whole, part = find_items(str(sav), None, 0), find_items(str(sav / "sav_val"), None, 0)
    with pytest.raises(ValueError, match="share 5 frames"):
        check_disjoint(whole, part)


def test_clips_do_not_overlap(sav):
    clips = find_items(str(sav / "sav_train"), None, 0, frames=2, stride=3)
    assert [[name[-9:-4] for name in clip.frames] for clip in clips] == [["00000", "00003"], ["00004", "00007"]]
    assert read_item(clips[1], 8).shape == (2, 8, 8, 3)
    assert not np.array_equal(*read_item(clips[1], 8))
    with pytest.raises(ValueError, match="fewer than num_samples 3"):
        find_items(str(sav / "sav_train"), 3, 0, frames=2, stride=3)


def test_foreign_and_empty_folders_beside_clips_are_passed_over(tmp_path):
    for clip in ("a", "b"):
        for i in range(9):
            frame(tmp_path / clip / f"{i:05d}.jpg")
    expected = [item.name for item in find_items(str(tmp_path), None, 0, frames=3, stride=2)]
    assert len(expected) == 2
    for name in (".ipynb_checkpoints", "__MACOSX", "empty", "notes"):
        (tmp_path / name).mkdir()
    for name in (".DS_Store", "Thumbs.db", "notes/readme.txt", "__MACOSX/._00000.jpg", "a/Thumbs.db"):
        (tmp_path / name).touch()
    frame(tmp_path / ".ipynb_checkpoints/00000.jpg")
    assert [item.name for item in find_items(str(tmp_path), None, 0, frames=3, stride=2)] == expected
    frame(tmp_path / "deep/c/00000.jpg")
    with pytest.raises(UserError, match=r"deep: holds no frame, but .*deep/c/00000.jpg lies below it"):
        find_items(str(tmp_path), None, 0, frames=3, stride=2)


def test_every_epoch_has_each_item_at_most_once_in_another_order():
    batches = list(islice(order(10, 3, seed=1, first=0), 9))
    for epoch in range(3):
        taken = np.concatenate(batches[3 * epoch : 3 * epoch + 3])
        assert len(set(taken)) == 9
    assert not np.array_equal(batches[0], batches[3])


def test_the_order_can_be_resumed_at_any_step():
    whole = list(islice(order(10, 3, seed=1, first=0), 9))
    for cut in (0, 4, 6):
        np.testing.assert_array_equal(list(islice(order(10, 3, seed=1, first=cut), 9 - cut)), whole[cut:])


def test_prefetching_keeps_the_order():
    assert list(prefetched(lambda x: x * x, iter(range(20)), workers=3)) == [x * x for x in range(20)]
    assert list(islice(prefetched(lambda x: x, iter(range(10**9))), 3)) == [0, 1, 2]


def test_too_few_items_for_a_batch_are_an_error():
    with pytest.raises(ValueError, match="do not fill a batch of 4"):
        next(order(3, 4, 0, 0))

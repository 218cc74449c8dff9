import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import build
from sam2jq.ptq.calibration import collect
from sam2jq.ptq.stats_cache import SAVE_EVERY, accumulate
from sam2jq.tree import fingerprint


def clips(count: int):
    """(clips for `accumulate`, a list of the indices of clips that it reads)."""
    read = []

    def after(n: int, step: int = 1):
        for i in range(n, count, step):
            read.append(i)
            yield np.random.default_rng(i).standard_normal((5, 3)).astype(np.float32)

    return after, read


@jax.jit
def fold(sums, clip):
    return {"gram": sums["gram"] + clip.T @ clip, "count": sums["count"] + len(clip)}


ZEROS = {"gram": jnp.zeros((3, 3)), "count": jnp.zeros((), jnp.int32)}


def test_a_killed_calibration_goes_on_where_it_was_to_the_same_bits(tmp_path):
    count, kept = SAVE_EVERY + 3, tmp_path / "sums.npz"
    whole = accumulate(fold, ZEROS, clips(count)[0], None)

    def killed(n: int):
        for i, clip in enumerate(clips(count)[0](n), n):
            if i == SAVE_EVERY + 1:
                raise KeyboardInterrupt
            yield clip

    with pytest.raises(KeyboardInterrupt):
        accumulate(fold, ZEROS, killed, kept)
    for expected in ([*range(SAVE_EVERY, count)], []):  # what was left; and nothing, once all is there
        after, read = clips(count)
        resumed = accumulate(fold, ZEROS, after, kept)
        assert read == expected
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))
    assert [path.name for path in tmp_path.iterdir()] == ["sums.npz"]


def test_memory_holds_the_next_clip_and_no_more():
    """Clips that are read faster than folded wait outside."""
    sums, slow = [], jax.jit(lambda total, clip: jax.lax.fori_loop(0, 20, lambda _, x: jnp.cos(x @ clip), total))

    def clips(_: int):
        for _ in range(5):
            assert all(total.is_ready() for total in sums[:-1])
            yield np.ones((512, 512), np.float32)

    def fold(total, clip):
        sums.append(slow(total, clip))
        return sums[-1]

    accumulate(fold, jnp.zeros((512, 512)), clips, None)
    assert len(sums) == 5


def test_without_clips_there_is_nothing_to_calibrate_on():
    with pytest.raises(ValueError, match="calibration got no clip or image"):
        collect(build("nano"), {}, clips(0)[0], [])


def test_a_fingerprint_tells_every_bit():
    params, marks = {"a": {"kernel": np.zeros((2, 2), np.float32)}}, set()
    marks.add(fingerprint(params, ["gram"], b"image"))
    marks.add(fingerprint(params, ["gram"], b"imagf"))
    marks.add(fingerprint(params, ["tokens"], b"image"))
    marks.add(fingerprint({"a": {"kernel": np.float32([[0, 0], [0, 1e-30]])}}, ["gram"], b"image"))
    assert len(marks) == 4
    assert fingerprint(params, ["gram"], b"image") in marks

"""Settings as flags, and the values of a sweep."""

import pytest

from sam2jq.config import loader
from sam2jq.config.flags import sweep_combinations
from sam2jq.config.run import Config
from sam2jq.errors import UserError
from tests.flags import override

NEEDED = ["--model.checkpoint", "random:0", "--quant.calib.path", "scenes:0"]


def load(*flags: str) -> Config:
    return loader.load(None, override(NEEDED, *flags))


def combinations(*overs: str) -> list[dict]:
    return sweep_combinations(list(overs), Config)


def test_a_grid_is_every_combination():
    assert combinations("a.b=sint8,sint4", "seed=1,2") == [
        {"a.b": bits, "seed": seed} for bits in ("sint8", "sint4") for seed in (1, 2)
    ]
    assert combinations("x=[[1, 32]],[[1, -1]]") == [{"x": [[1, 32]]}, {"x": [[1, -1]]}]
    assert combinations("x=null,{rank: 4, num_iters: 2}") == [
        {"x": None},
        {"x": {"rank": 4, "num_iters": 2}},
    ]
    with pytest.raises(ValueError, match="give all values of a key in one --over"):
        combinations("x=1", "x=2")


TEXTS = [
    *("my #1.pt", "1.10", "007", "1e3", "yes", "2026-01-01", "null", "a: b", "[a", "{a}", "- a", "*.png", "@a", "!a"),
    *(" a ", "'", "'a' or 'b'", "100%", "1_000", "+5", ".inf", "scenes:"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_flag_for_text_takes_its_argument_as_it_is(text):
    assert load("--output.job", text).output.job == load(f"--output.job={text}").output.job == text
    assert load("--measure.split", f'"{text}"').measure.split == text


def test_null_and_quotes_in_a_flag_for_text():
    assert load("--quant.wgts.rounding", "null").quant.wgts.rounding is None
    assert load("--output.job", "'it''s'").output.job == "it's"
    assert load("--output.job", r'"\u00e9"').output.job == "é"
    assert load("--output.job", '""').output.job == ""


def test_a_section_and_a_key_in_it_are_both_taken_in_any_order():
    for flags in (["--output", "{root: r}", "--output.job", "j"], ["--output.job", "j", "--output", "{root: r}"]):
        loaded = load(*flags).output
        assert (loaded.root, loaded.job) == ("r", "j")


def test_values_of_a_sweep_are_read_as_flags():
    assert combinations("output.job=1.10,007, yes,'a,b',\"c\"") == [
        {"output.job": text} for text in ("1.10", "007", "yes", "a,b", "c")
    ]
    assert combinations("model.name=null,tiny") == [{"model.name": None}, {"model.name": "tiny"}]
    assert combinations("quant.calib.num-samples=1") == [{"quant.calib.num_samples": 1}]
    for values in ("", "a,,b", ",a", "a,"):
        with pytest.raises(UserError, match="write key=value,value"):
            combinations(f"output.job={values}")

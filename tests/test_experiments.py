import itertools

import numpy as np
import pytest

from experiments.cdpq import table as cdpq
from experiments.peers import table as peers
from experiments.peers.libraries import METHODS, Method
from experiments.ptq import table as ptq
from sam2jq.config.loader import load
from sam2jq.eval.image_benchmark import PROMPTS
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats


@pytest.mark.parametrize(("name", "kind"), cdpq.ROWS)
def test_every_row_of_the_distillation_table_is_a_config(name, kind):
    made = [cdpq.config_of(name, seed, kind) for seed in cdpq.SEEDS]
    assert len({config.data.train for config in made}) == len(cdpq.SEEDS)
    for config in made:
        assert (config.ptq is not None) == (kind == "PTQ")
        if config.ptq:
            assert (config.ptq.wgts.dtype, config.ptq.ipts) == (config.quant.wgts.dtype, config.quant.ipts)


@pytest.mark.parametrize("grid", ptq.GRIDS)
def test_the_rows_of_the_ptq_table_add_one_technique_each_up_to_the_config(grid):
    quant = load(f"experiments/nano_{grid}.yaml", []).quant
    made = list(ptq.rows(quant).values())
    assert quant in made
    assert all(one != other for one, other in itertools.combinations(made, 2))


def test_a_change_of_miou_is_that_over_all_objects_and_its_interval_is_paired():
    full = {prompt: [90.0, 60.0, 70.0] for prompt in PROMPTS} | {"objects": [1, 1, 8]}
    less = full | {prompt: [89.0, 59.0, 69.0] for prompt in PROMPTS}
    assert peers.bootstrap(full, [full]) == [(0, 0, 0)] * 3
    np.testing.assert_allclose(peers.bootstrap(full, [less]), [(-1, -1, -1)] * 3)  # images differ by 30, pairs do not
    one_image = full | {"box": [90.0, 60.0, 60.0]}
    np.testing.assert_allclose(peers.bootstrap(full, [one_image])[0][0], -8)
    np.testing.assert_allclose(peers.bootstrap(full, [full, less, one_image])[0][0], -1)  # the median of three runs


def test_a_library_gets_whole_groups_and_gives_back_the_kernel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    stats = {"conv": Stats(*np.zeros((3, 18)), tokens=np.ones((4, 18), np.float32))}
    seen = []

    def library(w, x):
        seen.append((w.shape, x.shape))
        return w, 16 * w.size // 8

    method = Method("W4A8", "library", "groups", 4, 8, library, QuantSpec(8))
    quantized, bits = peers.quantize_by(method, {"conv": {"kernel": kernel, "bias": np.zeros(5)}}, stats)
    assert seen == [((5, 24), (4, 24))]
    assert isinstance(quantized["conv"]["kernel"], ActQuantized)
    np.testing.assert_array_equal(quantized["conv"]["kernel"].inner, kernel)
    np.testing.assert_allclose(bits, 4 + 3 * 16 / 18)  # three groups for 18 inputs


def test_every_method_of_a_library_is_in_the_table():
    assert {method.scheme for method in METHODS} <= set(peers.OURS)
    labels = [peers.label(method) for method in METHODS]
    assert len(set(labels)) == len(labels)

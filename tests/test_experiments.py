import itertools

import pytest

from experiments.cdpq import table as cdpq
from experiments.ptq import table as ptq
from sam2jq.config.loader import load


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

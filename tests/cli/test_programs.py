"""How many programs a run compiles: each costs time in a first run, and to read it in every later one."""

import pytest

from experiments.bench.startup import run


@pytest.mark.slow  # 1.5 to 4 minutes each
@pytest.mark.parametrize(("job", "limit"), [("quantize", 120), ("distill", 250)])
def test_a_run_compiles_few_programs(job, limit, tmp_path):
    assert 0 < run(job, tmp_path)[1] <= limit

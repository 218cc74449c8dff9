"""The parts of `make compile-check` that need no compiler for accelerators."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import compile as check
from experiments.bench.compile_programs import PROGRAMS
from experiments.bench.cost_model import arithmetic, estimated_cycles
from sam2jq.training.sharding import make_mesh

HLO = """HloModule jit_f, is_scheduled=true

%fused.1 (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  ROOT %add.0 = f32[8]{0} add(%p.0, %p.0)
}

%body.1 (arg.0: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg.0 = (s32[], f32[8]) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%arg.0), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"100"}
}

%condition.1 (arg.1: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[] compare(%arg.1, %constant.1), direction=LT
}

ENTRY %main.1 (x.1: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%x.1), backend_config={"estimated_cycles":"7"}
  %while.1 = (s32[], f32[8]) while(%copy.1), condition=%condition.1, body=%body.1
}
"""


def test_a_loop_is_estimated_as_often_as_it_runs():
    assert estimated_cycles(HLO) == 7 + 5 * 100


@jax.default_matmul_precision("default")
def test_arithmetic_counts_loops_branches_of_the_platform_and_passes_of_float32():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 3))
    product = lambda precision: lambda a, b: jnp.matmul(a, b, precision=precision)
    count = lambda f, *args, platform="tpu": arithmetic(jax.make_jaxpr(f)(*args), platform)
    assert count(product(None), a, b) == (2 * 4 * 8 * 3, 2 * 4 * 8 * 3)
    assert count(product("highest"), a, b) == (192, 6 * 192)
    int8 = a.astype(jnp.int8), b.astype(jnp.int8)
    assert count(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.int32), *int8) == (192, 96)
    assert count(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(5)), a, b)[0] == 5 * 192
    by_platform = lambda a, b: jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: a @ b, default=lambda a, b: (a @ b) * (a @ b)
    )
    assert [count(by_platform, a, b, platform=name)[0] for name in ("cpu", "tpu")] == [192, 2 * 192]
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count(conv, jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 5)))[0] == 2 * (4 * 4 * 5) * (3 * 3 * 2)


def test_rows_that_were_not_compiled_again_are_kept(tmp_path):
    path = tmp_path / "table.md"
    row = lambda name, result: (name, "v5e", "1", result, *"12345")
    rows = {("a", "v5e"): row("a", "OK"), ("b", "v5e"): row("b", "exit code -6: F1128 Check failed")}
    check.write_rows(path, rows, list(rows))
    assert check.read_rows(path) == rows


def test_an_abort_is_told_by_its_first_line_that_says_what_failed():
    stderr = "warning: x\nF1128 12:00:00.0 7 space_to_batch_converter.cc:2007] Check failed: a | b\n@ 0x7f\n"
    assert "space_to_batch_converter.cc:2007] Check failed: a / b" in check.failure(-6, stderr)


SMALL = [name for name in PROGRAMS if not re.search("1024|video step tiny", name)]
MODELS = [pytest.param(name, marks=pytest.mark.slow) for name in SMALL if not name.startswith("4096")]


@pytest.mark.parametrize("name", [*(name for name in SMALL if name.startswith("4096")), *MODELS])
def test_a_program_is_lowered_for_a_tpu_on_a_machine_without_one(name):
    traced = PROGRAMS[name].trace(make_mesh(jax.devices()[:1]))
    assert "stablehlo" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert arithmetic(traced.jaxpr, "tpu")[0] > 0


@pytest.mark.parametrize(("target", "name"), [("v5e", "libtpu"), ("h100", "CUDA plugin")])
def test_a_missing_compiler_is_one_line(target, name, monkeypatch, capsys):
    monkeypatch.setattr(check, "find_spec", lambda module: None)
    monkeypatch.setattr(sys, "argv", ["compile.py", "--targets", target])
    with pytest.raises(SystemExit, match="2"):
        check.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert "make compile-check" in line

"""What a program costs on an accelerator: by its arithmetic, and by the TPU compiler's own estimate."""

import math
import re

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

PASSES = {lax.Precision.HIGHEST: 6, lax.Precision.HIGH: 3}  # bfloat16 products that a TPU takes for one of float32
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:body|to_apply|branch_computations|(?:true|false)_computation)=\{?((?:%[\w.-]+(?:, )?)+)")


def arithmetic(jaxpr: ClosedJaxpr | Jaxpr, platform: str) -> tuple[float, float]:
    """(floating point or integer operations of all matrix products and convolutions, the same in bfloat16 passes).

    A float32 product counts as the bfloat16 products that a TPU takes for it, an int8 product as half of one. Loops
    count as often as they run, where that is known; of branches the most expensive one, or that of `platform`.
    """
    total = passes = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        params, times = eqn.params, 1
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            count = 2.0 * math.prod(eqn.outvars[0].aval.shape) * reduced_size(eqn)
            total, passes = total + count, passes + count * relative_cost(eqn)
            continue
        nested = jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr)
        inner = [arithmetic(x, platform) for x in nested if is_jaxpr(x)]
        if eqn.primitive.name == "scan":
            times = params["length"]
        elif eqn.primitive.name == "cond":
            platforms = params.get("branches_platforms")
            chosen = [x for x, names in zip(inner, platforms or ()) if names is None or platform in names]
            inner = [chosen[0] if platforms else max(inner)]
        total, passes = total + times * sum(a for a, _ in inner), passes + times * sum(b for _, b in inner)
    return total, passes


def is_jaxpr(x) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def reduced_size(eqn) -> int:
    """The number of products that are summed for one output of a product or convolution."""
    left, right = (x.aval.shape for x in eqn.invars)
    if eqn.primitive.name == "dot_general":
        return math.prod(left[axis] for axis in eqn.params["dimension_numbers"][0][0])
    return math.prod(right) // right[eqn.params["dimension_numbers"].rhs_spec[0]]


def relative_cost(eqn) -> float:
    """The time of a product on a TPU, relative to one of bfloat16 numbers."""
    if eqn.invars[0].aval.dtype.itemsize == 1:
        return 0.5
    precision = eqn.params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    return PASSES.get(precision, 1) if eqn.invars[0].aval.dtype == "float32" else 1


def estimated_cycles(hlo: str) -> float:
    """The cycles that the TPU compiler expects of an optimized program; a loop counts as often as it runs.

    The compiler writes its expectation beside each fusion and copy. Communication between devices has none, and loops
    whose number of turns depends on data count once.
    """
    lines: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if header := COMPUTATION.match(line):
            current = lines.setdefault(header[1], [])
        elif line.startswith("  "):
            current.append(line)
    found: dict[str, float] = {}

    def turns(condition: str) -> int:
        constants = [int(n) for line in lines[condition] for n in re.findall(r" s32\[\][^ ]* constant\((\d+)\)", line)]
        return max(constants, default=1)

    def cycles(name: str) -> float:
        if name not in found:
            found[name] = sum(map(of_line, lines[name]))
        return found[name]

    def of_line(line: str) -> float:
        own = sum(map(float, re.findall(r'"estimated_cycles":"(\d+)"', line)))
        called = [cycles(name) for group in CALLED.findall(line) for name in re.findall(r"%([\w.-]+)", group)]
        if " while(" in line:
            return own + called[0] * turns(re.search(r"condition=%([\w.-]+)", line)[1])
        return own + (max(called, default=0) if " conditional(" in line else sum(called) if " call(" in line else 0)

    return cycles(next(line for line in hlo.splitlines() if line.startswith("ENTRY")).split()[1].strip("%"))

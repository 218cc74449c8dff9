"""Compiles the programs that users run for accelerators that are not here, and writes a table.

make compile-check [ARGS="--quick"]
python experiments/bench/compile.py [--quick] [--targets v5e v6e h100] [--only REGEX] [--out compile.md]

Each program is compiled in a process of its own, since a compiler that fails may abort. Rows of the table that are not
compiled again are kept. Exits with code 1 if a program does not compile, and with 2 if a compiler is missing.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sam2jq.files import atomic_write

HEAD = """\
# What the compilers for TPUs and GPUs say of each program

`make compile-check` on a machine without an accelerator: nothing here was measured on one. Peak memory is that of one
device, with arguments and results. GFLOP are those of matrix products and convolutions. The estimate is the TPU
compiler's own count of cycles (v5e at 1.5 GHz, v6e at 1.75 GHz), without communication between devices. The floor is
the time of the products alone at the maker's rate (v5e 197, v6e 918 TFLOP/s in bfloat16, twice that in int8, a sixth in
float32 `highest`). GPU compilers estimate no time. The H100's programs are compiled without cuDNN. Seconds of compiling
are of two cores that others used, too.

"""
COLUMNS = (
    "program",
    "for",
    "devices",
    "result",
    "peak MiB",
    "GFLOP",
    "estimated ms",
    "share of floor",
    "compile s",
)
LIMIT = 3000  # seconds that one program may take
GPU = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 10 patch: 2 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" cuda_compute_capability { major: 9 minor: 0 } clock_rate_ghz: 1.98
  core_count: 132 fpus_per_core: 128 threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 l2_cache_size: 52428800 memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""


class Target(NamedTuple):
    """An accelerator. topology: arguments of jax's `get_topology_desc`; rate: bfloat16 operations a second, by its
    maker; clock: Hz, by which the compiler's cycles become seconds."""

    platform: str
    topology: dict[str, str]
    rate: float
    clock: float = 0.0


# A v5e has 4 units of 128 x 128 multipliers, a v6e 4 of 256 x 256: at these clocks they reach the makers' rates.
TARGETS = {
    "v5e": Target("tpu", {"topology_name": "v5e:2x2"}, 197e12, 1.5e9),
    "v6e": Target("tpu", {"topology_name": "v6e:2x2"}, 918e12, 1.75e9),
    "h100": Target("cuda", {"topology_name": "h100", "topology": "1x1x4", "target_config": GPU}, 989e12),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # libtpu asks the cloud for these where they are not set
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


def missing_compiler(platform: str) -> str | None:
    """What is missing to compile for a platform, and how to get it; None if nothing is."""
    if platform == "tpu":
        return None if find_spec("libtpu") else "no libtpu here, so no TPU program can be compiled: make compile-check"
    if not find_spec("jax_cuda12_plugin"):
        return "no CUDA plugin here, so no GPU program can be compiled: make compile-check CUDA=1"
    return None if cuda_folder() else "no ptxas here, so no GPU program can be compiled: make compile-check CUDA=1"


def cuda_folder() -> Path | None:
    """The folder of NVIDIA's compiler in this environment."""
    folders = [Path(folder, "nvidia", "cuda_nvcc") for folder in sys.path]
    return next((folder for folder in folders if (folder / "bin" / "ptxas").is_file()), None)


def compile_alone(name: str, target_name: str) -> None:
    """Compiles one program and prints the cells of its row, from "peak MiB" on."""
    from compile_programs import PROGRAMS
    from cost_model import arithmetic, estimated_cycles
    from jax.experimental.topologies import get_topology_desc

    from sam2jq.training.sharding import make_mesh

    program, target = PROGRAMS[name], TARGETS[target_name]
    devices = get_topology_desc(platform=target.platform, **target.topology).devices
    traced = program.trace(make_mesh(devices[: program.devices]))
    operations, passes = (total / program.devices for total in arithmetic(traced.jaxpr, target.platform))
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    estimate = share = "-"
    if target.clock:
        took = estimated_cycles(compiled.as_text()) / target.clock
        estimate, share = f"{1e3 * took:.3f}", f"{passes / target.rate / took:.2f}"
    peak = (sum(sizes) - memory.alias_size_in_bytes) / 2**20
    print("\t".join((f"{peak:.0f}", f"{operations / 1e9:.1f}", estimate, share, f"{seconds:.0f}")))


def row(name: str, target: str, devices: int) -> tuple[str, ...]:
    """The cells of one program's row; "result" is OK, or the first line of what the compiler said."""
    folder = cuda_folder()
    environment = os.environ | ENVIRONMENT
    if TARGETS[target].platform == "cuda":
        environment |= {"XLA_FLAGS": f"--xla_gpu_cuda_data_dir={folder}", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = [sys.executable, __file__, "--alone", name, "--targets", target]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return name, target, str(devices), f"not done in {LIMIT} s", *["-"] * 5
    if done.returncode == 0:
        return name, target, str(devices), "OK", *done.stdout.splitlines()[-1].split("\t")
    return name, target, str(devices), failure(done.returncode, done.stderr), *["-"] * 5


def failure(code: int, stderr: str) -> str:
    """The first line of an error that says what it is, and the exit code."""
    lines = [line.strip() for line in stderr.splitlines()]
    is_error = re.compile(r"^F\d{4} |^[\w.]*(Error|Exception|RuntimeError)\b|Check failed|RESOURCE_EXHAUSTED")
    found = next(filter(is_error.search, lines), lines[-1] if lines else "no message")
    return f"exit code {code}: {found[:160]}".replace("|", "/")


def read_rows(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(program, target): its cells} of a table that an earlier run wrote."""
    lines = path.read_text().splitlines() if path.is_file() else []
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    return {row[:2]: row for row in cells[1:] if len(row) == len(COLUMNS)}


def write_rows(path: Path, rows: dict[tuple[str, str], tuple[str, ...]], order: list[tuple[str, str]]) -> None:
    """Writes the table, in the order of `order`; rows that are not in it are left out."""
    line = lambda cells: f"| {' | '.join(cells)} |\n"
    table = [line(COLUMNS), "|---" * len(COLUMNS) + "|\n", *(line(rows[key]) for key in order if key in rows)]
    with atomic_write(path) as temporary:
        temporary.write_text(HEAD + "".join(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the programs that CI compiles, in under 4 minutes")
    parser.add_argument("--targets", nargs="+", default=["v5e", "v6e"], choices=list(TARGETS))
    parser.add_argument("--only", default="", metavar="REGEX", help="only programs whose name this matches")
    parser.add_argument("--out", type=Path, help="the table, in which rows are replaced")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        compile_alone(args.alone, args.targets[0])
        return
    for platform in dict.fromkeys(TARGETS[name].platform for name in args.targets):
        if what := missing_compiler(platform):
            print(f"compile-check: error: {what}", file=sys.stderr)
            sys.exit(2)
    from compile_programs import PROGRAMS

    order = [(name, target) for name in PROGRAMS for target in TARGETS]
    rows, failed = read_rows(args.out) if args.out else {}, 0
    for name, program in PROGRAMS.items():
        wanted = (program.quick or not args.quick) and re.search(args.only, name)
        for target in args.targets if wanted else ():
            cells = rows[name, target] = row(name, target, program.devices)
            failed += cells[3] != "OK"
            print(" | ".join(cells), flush=True)
            if args.out:
                write_rows(args.out, rows, order)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

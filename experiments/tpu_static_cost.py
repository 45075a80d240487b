"""What the TPU kernels cost by the compiler's own schedule: `python -m experiments.tpu_static_cost`. Needs libtpu, no TPU.

Compiles every kernel ahead of time at 4096 x 4096 and writes experiments/results/tpu_static_cost.json: instruction
bundles (about cycles), the microseconds that these take at the chip's clock, fast memory, spills. The kernel alone
counts, not what XLA does around it. Waits for memory are left out, so a figure is a bound from below; it is there to
notice when a kernel gets slower, and is no measured time.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from jaxquant.checkpoint import write_json
from jaxquant.kernels.codebook_matmul import tpu as codebook
from jaxquant.kernels.uniform_matmul import layout
from jaxquant.kernels.uniform_matmul import tpu as scalar

RESULT = Path(__file__).parent / "results" / "tpu_static_cost.json"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CLOCK = 1500.0  # cycles per microsecond of v5e; for other generations cycles alone are given
SIZE = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and its arguments.

    Attributes:
      function: (*arguments) -> product.
      arguments: shapes and dtypes.
      loops: trip counts of the kernel's loops at 4096 x 4096, outermost first; ones may stay out.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[tuple[tuple[int, ...], str] | None, ...]
    loops: tuple[int, ...]


def uniform(bits: int, size: int, tokens: int, group: int | None = None) -> Case:
    """A product with a uniform grid of `size` rows and columns."""
    lines = layout.num_lines(size, bits, math.lcm(64, group or 1))
    chunk = scalar.chunk_lines(lines, group)
    groups = 1 if group is None else size // group
    words = ((lines // 2, size), "uint32")
    arguments = (((tokens, size), "float32"), words, ((size, groups), "float16"), None)
    loops = -(-size // 512), lines // chunk // scalar.unrolled(lines // chunk, chunk)
    return Case(functools.partial(scalar.uniform_matmul, bits=bits), arguments, loops)


def levels(bits: int, size: int, tokens: int) -> Case:
    """A product with a table of levels per row."""
    lines = layout.num_lines(size, bits, 64)
    chunk = scalar.chunk_lines(lines, None)
    words = ((lines // 2, size), "uint32")
    arguments = (((tokens, size), "float32"), words, ((size, 2**bits), "float16"), None)
    loops = size // 128, lines // chunk // scalar.unrolled(lines // chunk, chunk)
    return Case(functools.partial(scalar.level_matmul, bits=bits), arguments, loops)


def additive(size: int, tokens: int, num_bytes: int | None = 2) -> Case:
    """A product with two codebooks of 256 vectors of 8: by a table of partial products, or decoded (None)."""
    settings: dict[str, Any] = {"blocks": (1, 1), "dimension": 8, "out": size}
    slots, books = ((size // 4, size), "uint8"), ((2, 2048), "float16")
    arguments = (((tokens, size), "float32"), slots, books, ((size, 1), "float16"))
    if num_bytes is None:
        return Case(functools.partial(codebook.decode_matmul, **settings), arguments, (size // 128, size // 4 // 64))
    steps = -(-size // 4 // codebook.slot_step(size // 4, num_bytes * tokens))
    function = functools.partial(codebook.lookup_matmul, num_bytes=num_bytes, **settings)
    return Case(function, arguments, (steps, size // 256))


def cases(size: int = SIZE) -> dict[str, Case]:
    """All kernels, by format and tokens."""
    return {
        "2x8, two bytes, 1 token": additive(size, 1),
        "2x8, one byte, 1 token": additive(size, 1, 1),
        "2x8, two bytes, 4 tokens": additive(size, 4),
        "2x8, decoded, 8 tokens": additive(size, 8, None),
        "2x8, decoded, 128 tokens": additive(size, 128, None),
        "uniform 4-bit, 1 token": uniform(4, size, 1),
        "uniform 4-bit g128, 1 token": uniform(4, size, 1, 128),
        "uniform 3-bit, 1 token": uniform(3, size, 1),
        "uniform 2-bit, 1 token": uniform(2, size, 1),
        "uniform 8-bit, 1 token": uniform(8, size, 1),
        "uniform 4-bit, 128 tokens": uniform(4, size, 128),
        "16 levels per row, 1 token": levels(4, size, 1),
        "8 levels per row, 1 token": levels(3, size, 1),
        "4 levels per row, 1 token": levels(2, size, 1),
    }


def prepare() -> Path:
    """Tells libtpu to dump its schedules; before anything has loaded it. Returns the folder."""
    dump = tempfile.mkdtemp()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else two processes at once abort on a lock file
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true"
    return Path(dump)


def compile_for(generation: str, case: Case) -> Any:
    """Compiles a kernel for a TPU that is not there; returns the executable."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    placed = SingleDeviceSharding(device)
    arguments = [
        None if a is None else jax.ShapeDtypeStruct(a[0], jnp.dtype(a[1]), sharding=placed) for a in case.arguments
    ]
    cores = getattr(device, "num_cores", 1)
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=abstract)):
        return jax.jit(case.function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def _bundles(file: Path) -> list[int]:
    """Bundles at each loop depth."""
    pattern = re.compile(r"^ *(?:0x[0-9a-f]+|\d+) +(?:[A-Z]{2})?:? *(>*) *\{")
    depths = [len(m[1]) for m in map(pattern.match, file.read_text(errors="replace").splitlines()) if m]
    return [depths.count(depth) for depth in range(max(depths) + 1)]


def _spills(file: Path) -> int:
    """Stores to memory for want of registers."""
    lines = file.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line)
    return sum(int(line.split()[names.index("VSTORE:SPILL")]) for line in lines[start + 1 :] if line.strip())


def measure(generation: str, case: Case, dump: Path) -> dict[str, Any]:
    """Compiles a kernel and reads its schedule.

    Raises:
      ValueError: the schedule has other loops than the case says.
    """
    before = set(dump.iterdir())
    program = compile_for(generation, case).as_text()
    new = [f for f in set(dump.iterdir()) - before if "_matmul." in f.name]
    (schedule,) = (f for f in new if f.name.endswith("final_bundles.txt") and "analysis" not in f.name)
    (use,) = (f for f in new if f.name.endswith("final_hlo-static-per-bundle-utilization.txt"))
    bundles, loops = _bundles(schedule), [n for n in case.loops if n > 1]
    if len(bundles) != len(loops) + 1:
        raise ValueError(f"{schedule}: expected {len(loops)} nested loops, got bundles {bundles} by depth")
    cycles = sum(n * math.prod(loops[:depth]) for depth, n in enumerate(bundles))
    scoped = re.findall(r'"used_scoped_memory_configs":\[[^\]]*?"size":"(\d+)"', program)
    figures = {"cycles": cycles, "vmem_bytes": max(map(int, scoped), default=0), "spills": _spills(use)}
    return figures | ({"microseconds": round(cycles / CLOCK, 2)} if generation == "v5e" else {})


def main(generations: Sequence[str]) -> int:
    """Measures all kernels, prints and stores the figures."""
    dump = prepare()
    result: dict[str, Any] = {"size": SIZE, "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    for generation in generations or TOPOLOGIES:
        result[generation] = {}
        for name, case in cases().items():
            result[generation][name] = measure(generation, case, dump)
            print(generation, name, result[generation][name], flush=True)
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

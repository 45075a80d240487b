"""Times products with quantized weights: `python -m experiments.bench_kernels`. A row per measurement, as JSON.

For each shape, batch and format: a dense product, making the weight dense and multiplying, and our kernel, with the time
that reading the weight's bytes takes at the memory's bandwidth. Weights rotate through copies that together outgrow the
caches, because a model's layers do. Many calls are one program, as a model's are, with a loop over them whose launches
the device has at hand after the first round, and several programs are queued: so the host's part does not count. A figure
is the median over passes, divided by their calls.

Runs with other arguments add their rows to the device's file; a row that was there is replaced.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.run import commit
from jaxquant import CodebookTensor, GPTVQConfig, UniformTensor, matmul, pack
from jaxquant.checkpoint import environment, write_json
from jaxquant.codebook_tensor import ColumnTensor, log_scale
from jaxquant.ops import choose, supports
from jaxquant.serving import for_serving
from jaxquant.tensors import QuantizedTensor

RESULTS = Path(__file__).parent / "results" / "kernels"
SHAPES = ((4096, 4096), (4096, 14336), (8192, 28672))
KEY = ("format", "k", "n", "batch", "implementation", "dtype")  # of a row
BANDWIDTH = {
    "NVIDIA H200": 4.3e12,
    "NVIDIA H100 80GB HBM3": 3.0e12,
    "TPU v5 lite": 8.19e11,
    "TPU v6 lite": 1.64e12,
}  # bytes per second


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time products with quantized weights.

    Attributes:
      shapes: K x N, inputs and outputs, such as 4096x4096.
      batches: tokens.
      formats: names of FORMATS.
      implementations: of "dense", "reference" and "kernel", the device's own.
      cache: bytes that the copies of a weight must exceed together.
      calls: products in a program, at least; it goes through the copies as often as that takes.
      seconds: length of a pass, for which programs are queued; at least one is.
      passes: timed passes.
      bandwidth: bytes per second of the memory; by default that of known devices, else no floor is given.
      results: folder for the result.
    """

    shapes: tuple[str, ...] = tuple(f"{k}x{n}" for k, n in SHAPES)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    formats: tuple[str, ...] = ("2x8", "uniform 4-bit", "uniform 3-bit", "uniform 2-bit", "16 levels")
    implementations: tuple[str, ...] = ("dense", "reference", "kernel")
    cache: int = 2**28
    calls: int = 256
    seconds: float = 0.02
    passes: int = 10
    bandwidth: float | None = None
    results: Path = RESULTS


def additive(count: int, key: jax.Array, k: int, n: int) -> CodebookTensor:
    """Random additive codes: codebooks of 256 vectors of 8."""
    codes = jax.random.bits(key, (count, n, k // 8), jnp.uint8)
    books = jax.random.normal(key, (count, 256 * 8), jnp.float16)
    return CodebookTensor(pack(codes, 8), books, jnp.ones((n, 1), jnp.float16), (1, 1), (1, 8))


def uniform(bits: int, key: jax.Array, k: int, n: int) -> UniformTensor:
    """Random codes on one grid per row."""
    zero = jnp.full((1, n), 2 ** (bits - 1))
    codes = pack(jax.random.bits(key, (n, k), jnp.uint8), bits)
    return UniformTensor(codes, jnp.ones((n, 1), jnp.float16), pack(zero, bits))


def levels(bits: int, key: jax.Array, k: int, n: int) -> CodebookTensor:
    """Random codes and a random table of levels per row."""
    table = jax.random.normal(key, (n, 2**bits), jnp.float16)
    return CodebookTensor(pack(jax.random.bits(key, (1, n, k), jnp.uint8), bits), table, None, (n, 1), (1, 1))


def vectors(bits: int, dimension: int, key: jax.Array, k: int, n: int) -> ColumnTensor:
    """Random codes and tables of integers, of the sizes that GPTVQ has, with its scales of rows and columns."""
    down, across = GPTVQConfig(bits, dimension).blocks(n, k)
    width = bits * dimension
    books = jax.random.bits(key, (down * across, 2**width * dimension), jnp.uint8)
    spacing = jnp.full((down * across, 1), 2**-6, jnp.float16)
    codes = pack(jax.random.bits(key, (1, n, k // dimension), jnp.uint8), width)
    rows, scale = jnp.ones((n, 1), jnp.float16), log_scale(jnp.ones(k))
    books = UniformTensor(pack(books, 8), spacing, None)
    return ColumnTensor(CodebookTensor(codes, books, rows, (down, across), (1, dimension)), scale, None)


FORMATS: dict[str, Callable[..., QuantizedTensor]] = {
    "1x8": functools.partial(additive, 1),
    "2x8": functools.partial(additive, 2),
    "4x8": functools.partial(additive, 4),
    "uniform 4-bit": functools.partial(uniform, 4),
    "uniform 3-bit": functools.partial(uniform, 3),
    "uniform 2-bit": functools.partial(uniform, 2),
    "16 levels": functools.partial(levels, 4),
    "gptvq 1D 2-bit": functools.partial(vectors, 2, 1),
    "gptvq 2D 2-bit": functools.partial(vectors, 2, 2),
    "gptvq 2D 3-bit": functools.partial(vectors, 3, 2),
    "gptvq 4D 2-bit": functools.partial(vectors, 2, 4),
}


def microseconds(function: Callable[..., Any], x: jax.Array, weights: list[Any], args: Arguments) -> float:
    """Median time of one call of `function(x, weight)`."""
    rounds = -(-args.calls // len(weights))

    @jax.jit
    def run(x, weights):
        def one_round(_, carry):
            x, results = carry[0], []
            for weight in weights:
                # Inputs wait for the result before: calls do not run at once.
                x, y = jax.lax.optimization_barrier((x, function(x, weight)))
                results.append(y)
            # They change with it, so that no call can be taken out of the loop.
            return x + 0 * results[-1][:, :1].astype(x.dtype), results

        results = jax.eval_shape(lambda x, weights: [function(x, weight) for weight in weights], x, weights)
        zeros = [jnp.zeros(result.shape, result.dtype) for result in results]
        return jax.lax.fori_loop(0, rounds, one_round, (x, zeros))

    def took(programs: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready([run(x, weights) for _ in range(programs)])
        return time.perf_counter() - began

    took(1)  # compiles
    programs = max(1, round(args.seconds / took(1)))
    seconds = statistics.median(took(programs) for _ in range(args.passes))
    return seconds / (programs * rounds * len(weights)) * 1e6


def rows(args: Arguments) -> Iterator[dict[str, Any]]:
    """Measures and yields a row per shape, batch, format and implementation."""
    device, platform = jax.devices()[0].device_kind, jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    bandwidth = args.bandwidth or BANDWIDTH.get(device)
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        for name in args.formats:
            make = jax.jit(lambda key, make=FORMATS[name], k=k, n=n: for_serving(make(key, k, n)))
            held = jax.eval_shape(make, jax.random.key(0)).storage_bits() // 8
            packed = [make(jax.random.key(i)) for i in range(_copies(args.cache, held))]
            dense = [
                jax.random.normal(jax.random.key(i), (n, k), dtype)
                for i in range(_copies(args.cache, k * n * jnp.dtype(dtype).itemsize))
            ]
            for batch in args.batches:
                x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, k)), dtype)
                cases: dict[str, list[Any]] = {"dense": dense, "reference": packed}
                if supports(packed[0], platform, tokens=batch) is None:
                    cases["kernel"] = packed
                for case in (case for case in args.implementations if case in cases):
                    implementation, weights = platform if case == "kernel" else case, cases[case]
                    chosen: Any = "reference" if case == "dense" else implementation
                    function = functools.partial(matmul, implementation=chosen)
                    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
                    yield {
                        "format": name,
                        "k": k,
                        "n": n,
                        "batch": batch,
                        "implementation": implementation,
                        "default": implementation == choose(packed[0], tokens=batch),
                        "microseconds": microseconds(function, x, weights, args),
                        "floor_microseconds": None if bandwidth is None else size / bandwidth * 1e6,
                        "bytes": size,
                        "dtype": x.dtype.name,
                    }


def _copies(cache: int, size: int) -> int:
    return max(2, -(-cache // size))


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of both, new ones in place of old ones of the same measurement, in order."""
    by_key = {tuple(row[name] for name in key): row for row in [*old, *new]}
    return [by_key[values] for values in sorted(by_key)]


def store(results: Path, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Adds a row to the device's file in a folder, in place of one of the same measurement: equal in all of `key`."""
    name = jax.devices()[0].device_kind.replace(" ", "_").replace("/", "_")
    file = results / f"{name}.json"
    results.mkdir(parents=True, exist_ok=True)
    held = json.loads(file.read_text())["rows"] if file.exists() else []
    write_json(file, {"rows": merged(held, [row], key)})


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and stores."""
    args = tyro.cli(Arguments, args=arguments)
    if unknown := set(args.formats) - set(FORMATS):
        print(f"error: formats: expected some of {', '.join(FORMATS)}, got {sorted(unknown)}", file=sys.stderr)
        return 1
    origin = {"environment": environment(), "commit": commit()}
    for row in rows(args):
        store(args.results, row | origin, KEY)  # at once: a run may be cut short
        floor = "" if row["floor_microseconds"] is None else f"   floor {row['floor_microseconds']:.1f} us"
        what = f"{row['format']:14} {row['k']} x {row['n']} batch {row['batch']:3} {row['implementation']:10}"
        print(f"{what} {row['microseconds']:10.1f} us{floor}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

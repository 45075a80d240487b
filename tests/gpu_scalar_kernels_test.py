"""GPU kernels for scalar codes without a GPU: the program of their threads in numpy, and that they can be lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.kernels.uniform_matmul import tiles
from tests.ops_test import dequantize, relative, uniform_tensor
from tests.simt import Threads
from tests.tensors_test import codebook_tensor

gpu = pytest.importorskip(
    "jaxquant.kernels.uniform_matmul.gpu", reason="needs Mosaic GPU, of JAX 0.11", exc_type=ImportError
)

to_tiles = jax.jit(tiles.to_tiles, static_argnums=1, static_argnames="table")
from_tiles = jax.jit(tiles.from_tiles, static_argnums=(1, 2, 3), static_argnames="table")


def levels(out, n, bits, **options):
    """A random CodebookTensor with a table per row."""
    return codebook_tensor(out, n, 1, 2**bits, (out, 1), (1, 1), **options)[0]


@pytest.fixture
def in_numpy(monkeypatch):
    """Runs the program of the threads in numpy."""

    def call(plan, arrays):
        threads = Threads(32 * plan.warps)
        for module in ("gpu_thread", "gpu_weights"):
            for name in "th":
                monkeypatch.setattr(f"jaxquant.kernels.uniform_matmul.{module}.{name}", threads)
        memory = {name: np.array(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
        memory["y"] = np.full(plan.tokens * plan.out * plan.size("y"), 255, np.uint8)
        for block in range(plan.grid):
            for name, (count, dtype) in plan.scratch().items():
                memory[name] = np.full(count * jnp.dtype(dtype).itemsize, 255, np.uint8)
            refs = {name: (buffer, 0) for name, buffer in memory.items()}
            gpu.gpu_thread.Thread(plan, threads.i32(block), refs).run()
        return jnp.asarray(memory["y"].view(plan.dtypes["y"]).reshape(plan.tokens, plan.out))

    monkeypatch.setattr(gpu, "_call", call)


def product(x, weight, config=None):
    """What `ops` does with a weight of one format."""
    table = not hasattr(weight, "bits")
    codes = weight.codes.unpack()[0] if table else weight.codes.unpack()
    words = to_tiles(codes, weight.codes.bits, table=table)
    options = {"bits": weight.codes.bits, "dtype": x.dtype, "config": config}
    if table:
        return gpu.level_matmul(x, words, weight.codebooks, weight.scale, **options)
    zero = None if weight.zero is None else weight.zero.words
    return gpu.uniform_matmul(x, words, weight.scale.T, zero, **options)


SMALL = gpu.BlockConfig(warpgroups=2, ahead=2)
CASES = {
    "4-bit": (uniform_tensor(136, 136, 4), 1, None),
    "4-bit, turns": (uniform_tensor(40, 2600, 4), 1, SMALL),
    "3-bit symmetric": (uniform_tensor(50, 1528, 3, zero=False), 3, SMALL),
    "3-bit": (uniform_tensor(33, 600, 3), 1, None),
    "2-bit": (uniform_tensor(5, 520, 2), 1, None),
    "8-bit": (uniform_tensor(36, 135, 8), 1, None),
    "4-bit groups": (uniform_tensor(40, 1152, 4, 96), 2, SMALL),
    "3-bit groups": (uniform_tensor(37, 640, 3, 64), 1, None),
    "2-bit groups of many blocks": (uniform_tensor(20, 2048, 2, 1024, zero=False), 1, None),
    "8-bit groups": (uniform_tensor(30, 192, 8, 32), 5, None),
    "many tiles": (uniform_tensor(2200, 64, 4), 1, gpu.BlockConfig(1, 1)),
    "16 levels": (levels(40, 136, 4), 1, None),
    "8 levels, turns": (levels(36, 2600, 3, scaled=False), 4, SMALL),
    "4 levels": (levels(12, 100, 2), 2, None),
    "16 levels, many tiles": (levels(2200, 64, 4), 1, gpu.BlockConfig(2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_makes_the_product(name, in_numpy):
    weight, tokens, config = CASES[name]
    x = np.random.default_rng(1).standard_normal((tokens, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y = product(jnp.asarray(x), weight, config)
    assert y.shape == expected.shape
    assert relative(y, expected) < 2e-5

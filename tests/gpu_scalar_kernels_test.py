"""GPU kernels for scalar codes without a GPU: the program of their threads in numpy, and that they can be lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import ConcatTensor, UniformTensor, matmul
from jaxquant.book_tensor import BookTileTensor, book_tensor
from jaxquant.grid import symmetric_scale, symmetric_tensor
from jaxquant.kernels.uniform_matmul import api, tiles
from jaxquant.ops import choose, supports
from jaxquant.serving import for_serving, from_serving
from jaxquant.tile_tensors import LevelTileTensor, UniformTileTensor, tile_tensor
from tests.formats import in_float32
from tests.ops_test import dequantize, outliers, relative, uniform_tensor
from tests.simt import Threads
from tests.tensors_test import random_codebook_tensor

gpu = pytest.importorskip(
    "jaxquant.kernels.uniform_matmul.gpu", reason="needs Mosaic GPU, of JAX 0.11", exc_type=ImportError
)

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")

gpu_grid = gpu.gpu_thread.gpu_grid
to_tiles = jax.jit(tiles.to_tiles, static_argnums=1, static_argnames="table")
from_tiles = jax.jit(tiles.from_tiles, static_argnums=(1, 2, 3), static_argnames="table")


def levels(out, n, bits, **options):
    """A random CodebookTensor with a table per row."""
    return random_codebook_tensor(out, n, 1, 2**bits, (out, 1), (1, 1), **options)


def tables(out, n, bits, d, blocks):
    """A random CodebookTensor with a table per block."""
    return random_codebook_tensor(out, n, 1, 2**bits, blocks, (1, d))


@pytest.fixture
def in_numpy(monkeypatch):
    """Runs the program of the threads in numpy."""

    def call(plan, arrays):
        threads = Threads(32 * plan.warps)
        for module in ("gpu_thread", "gpu_grid", "gpu_table", "gpu_entries"):
            for name in "tw":
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
    words = to_tiles(codes, weight.codes.bits, table=table) if weight.codes.bits in (2, 3, 4, 8) else None
    options = {"bits": weight.codes.bits, "dtype": x.dtype, "config": config}
    if table and weight.blocks != (weight.shape[0], 1):
        tensor = book_tensor(weight)
        sizes = {"dimension": tensor.dimension, "block": tensor.block, "out": tensor.rows}
        options |= sizes | {"bits": tensor.bits}
        return gpu.book_matmul(x, tensor.words, tensor.tables, tensor.factor, **options)
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
    "16 levels, warps for half of a table": (levels(20, 256, 4), 1, gpu.BlockConfig(8, 1)),
    "tables of 16 pairs": (tables(64, 1024, 4, 2, (4, 4)), 1, None),
    "tables of 16 pairs, turns": (tables(40, 2600, 4, 2, (4, 13)), 3, SMALL),
    "tables of 64 pairs": (tables(60, 288, 6, 2, (6, 2)), 1, None),
    "tables of 256 pairs": (tables(48, 320, 8, 2, (1, 4)), 1, None),
    "tables of 256 quadruples": (tables(40, 480, 8, 4, (1, 5)), 1, None),
    "tables of 4 levels": (tables(36, 520, 2, 1, (12, 1)), 2, None),
    "tables of 8 levels": (tables(36, 480, 3, 1, (2, 2)), 1, None),
    "tables of 16 levels, many tiles": (tables(2200, 64, 4, 1, (550, 1)), 1, gpu.BlockConfig(2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_makes_the_product(name, in_numpy):
    weight, tokens, config = CASES[name]
    x = np.random.default_rng(1).standard_normal((tokens, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y = product(jnp.asarray(x), weight, config)
    assert y.shape == expected.shape
    assert relative(y, expected) < 2e-5


def test_one_sum_for_a_large_and_a_small_token(in_numpy):
    weight = uniform_tensor(20, 64, 4)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32) * np.float32([[1e30], [0], [1e-30]])
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y = np.asarray(product(jnp.asarray(x), weight))
    for row in (0, 2):
        assert relative(y[row], expected[row]) < 2e-5
    np.testing.assert_array_equal(y[1], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_exact(dtype, in_numpy):
    weight = uniform_tensor(20, 64, 3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 64)), dtype)
    y = product(x, weight)
    assert y.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(y, expected) < float(jnp.finfo(dtype).eps)  # the result alone is rounded


def test_levels_of_any_dtype_and_size(in_numpy):
    weight = levels(20, 64, 4)
    table = weight.codebooks.astype(jnp.float32) * jnp.float32(1e-9) * (1 + jnp.arange(20.0)[:, None])
    words = to_tiles(weight.codes.unpack()[0], 4, table=True)
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    codes = np.asarray(weight.codes.unpack()[0])
    expected = x @ np.take_along_axis(np.asarray(table, np.float64), codes.astype(int), 1).T
    assert relative(gpu.level_matmul(jnp.asarray(x), words, table, None, bits=4), expected) < 4e-4  # 11 bits
    column = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, (1, 64)), jnp.float32)
    expected = (x * np.asarray(column)) @ np.take_along_axis(np.asarray(table, np.float64), codes.astype(int), 1).T
    assert relative(gpu.level_matmul(jnp.asarray(x), words, table, column, bits=4), expected) < 4e-4


@pytest.mark.parametrize("table", [False, True])
def test_what_is_not_finite_stays_so(table, in_numpy):
    weight = levels(20, 64, 4) if table else uniform_tensor(20, 64, 4)
    x = np.ones((4, 64), np.float32)
    x[1, 3], x[2, 5] = np.inf, np.nan
    with np.errstate(all="ignore"):
        y = np.asarray(product(jnp.asarray(x), weight))
    assert np.isnan(y[1:3]).all()
    assert np.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_registers_hold_every_column_once(bits):
    held = gpu_grid.registers(bits)
    columns = [column for _, four in held for column in four]
    assert sorted(columns) == list(range(tiles.chunk_columns(bits) // 4))
    for (first, _), (second, _) in zip(held[::2], held[1::2], strict=True):
        assert first == second  # of one product, in one place


@settings(max_examples=8)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 600), st.booleans())
def test_tiles_hold_the_codes(bits, out, columns, table):
    table = table and bits < 8
    codes = np.random.default_rng(0).integers(0, 2**bits, (out, columns))
    words = to_tiles(jnp.asarray(codes), bits, table=table)
    assert 32 * words.size == bits * tiles.padded_size(out, columns, bits)
    np.testing.assert_array_equal(from_tiles(words, bits, out, columns, table=table), codes)


SERVED = {
    "4-bit": uniform_tensor(48, 1024, 4),
    "3-bit groups": uniform_tensor(40, 512, 3, 128),
    "2-bit symmetric": uniform_tensor(60, 500, 2, zero=False),
    "16 levels": levels(48, 256, 4),
    "8 levels": levels(40, 1000, 3, scaled=False),
}


@needs_mosaic
@pytest.mark.parametrize("name", SERVED)
def test_the_layout_is_reversible_and_counted(name):
    weight = SERVED[name]
    served = jax.jit(lambda weight: for_serving(weight, "gpu"))(weight)
    assert isinstance(served, (UniformTileTensor, LevelTileTensor))
    for a, b in zip(jax.tree.leaves(from_serving(served)), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(a, b)
    out, columns = weight.shape
    padding = weight.codes.bits * tiles.padded_size(out, columns, weight.codes.bits) - 32 * weight.codes.words.size
    assert served.shape == weight.shape
    assert served.storage_bits() == weight.storage_bits() + padding
    assert choose(served) == ("gpu" if jax.default_backend() == "gpu" else "reference")


def with_integers(weight, bits=8):
    """The weight with codebooks of integers, whose spacings are very different."""
    books = weight.codebooks.astype(jnp.float32)
    factor = jnp.exp2(jnp.asarray(np.random.default_rng(3).integers(-12, 12, (len(books), 1)), jnp.float32))
    books = books * factor
    return dataclasses.replace(weight, codebooks=symmetric_tensor(books, symmetric_scale(books, bits, "float16"), bits))


TABLES = {
    "float16": tables(48, 512, 4, 2, (3, 2)),
    "integers": with_integers(tables(48, 512, 4, 2, (3, 2))),
    "5-bit integers": with_integers(tables(96, 512, 6, 2, (2, 2)), 5),
    "odd tables of 4 levels": with_integers(tables(45, 504, 2, 1, (9, 1))),
    "no scale": dataclasses.replace(with_integers(tables(64, 512, 8, 4, (1, 2))), scale=None),
    "scale of columns": dataclasses.replace(
        tables(48, 512, 4, 2, (3, 2)), scale=jnp.linspace(0.5, 2, 256, dtype=jnp.float16)[None]
    ),
}


@needs_mosaic
@pytest.mark.parametrize("name", TABLES)
def test_the_layout_of_tables_is_reversible_and_right(name, in_numpy):
    weight = TABLES[name]
    served = jax.jit(lambda weight: for_serving(weight, "gpu"))(weight)
    assert isinstance(served, BookTileTensor)
    back = jax.jit(from_serving)(served)
    assert jax.tree.structure(back) == jax.tree.structure(weight)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(weight), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert served.format == weight.format + ", kernel layout"
    assert served.storage_bits() == sum(8 * leaf.nbytes for leaf in jax.tree.leaves(served))
    x = np.random.default_rng(1).standard_normal((2, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    with jax.disable_jit():
        assert relative(matmul(jnp.asarray(x), served, "gpu"), expected) < 5e-4


@needs_mosaic
def test_tables_of_integers_are_exact_to_float16(in_numpy):
    weight = with_integers(tables(48, 512, 4, 2, (3, 2)))
    tensor = book_tensor(weight)
    dense = np.asarray(dequantize(weight), np.float64)
    rows = np.abs(dense).max(1)
    back = tiles.from_units(tensor.tables, 3, 32)
    assert float(jnp.abs(back.astype(jnp.float32)).max()) <= 2**15
    for row in range(48):
        table = np.asarray(back[row // 16], np.float64) * float(tensor.factor[row])
        assert np.isclose(np.abs(table).max(), rows[row], rtol=1e-3)


@needs_mosaic
def test_few_columns_are_not_padded_to_many():
    assert isinstance(for_serving(uniform_tensor(48, 64, 3), "gpu"), UniformTensor)
    assert isinstance(for_serving(uniform_tensor(48, 1040, 4, 16), "gpu"), UniformTensor)  # no kernel for such groups


@pytest.mark.parametrize("implementation", ["reference", "tpu"])
def test_other_implementations_take_the_layout(implementation):
    weight = uniform_tensor(36, 96, 3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 96)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(jax.jit(matmul, static_argnums=2)(x, tile_tensor(weight), implementation), expected) < 2e-5


LOWERED = {
    "4-bit": (uniform_tensor(136, 320, 4), 1, jnp.bfloat16),
    "3-bit groups, 5 tokens": (uniform_tensor(40, 640, 3, 64), 5, jnp.float32),
    "2-bit symmetric": (uniform_tensor(40, 4000, 2, zero=False), 8, jnp.float16),
    "8-bit": (uniform_tensor(40, 100, 8), 2, jnp.bfloat16),
    "16 levels": (levels(136, 320, 4), 1, jnp.bfloat16),
    "4 levels": (levels(20, 77, 2), 3, jnp.float32),
    "outliers": (outliers(uniform_tensor(40, 64, 4)), 1, jnp.bfloat16),
    "joined": (ConcatTensor((uniform_tensor(40, 64, 4), levels(40, 32, 3)), None, 1), 1, jnp.bfloat16),
}


@needs_mosaic
@pytest.mark.parametrize("name", LOWERED)
def test_the_kernel_lowers_for_cuda(name):
    weight, tokens, dtype = LOWERED[name]
    assert supports(weight, "gpu", tokens=tokens) is None
    x = jax.ShapeDtypeStruct((tokens, weight.shape[1]), dtype)
    program = jax.jit(functools.partial(matmul, implementation="gpu"))
    assert "mosaic_gpu" in program.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    gradient = jax.jit(jax.grad(lambda x, w: matmul(x, w, "gpu").astype(jnp.float32).sum()))
    gradient.trace(x, weight).lower(lowering_platforms=("cuda",))


REFUSALS = [
    (uniform_tensor(bits=5), 1, "expected codes of 2, 3, 4 or 8 bits, got 5"),
    (uniform_tensor(n=48, group=16), 1, "expected groups of a multiple of 32 columns, got 16"),
    (uniform_tensor(1, 2**16, 2), 1, "expected at most 49152 columns for up to 8 tokens, got 65536"),
    (levels(4, 2**15, 2), 1, "expected at most 18432 columns for up to 8 tokens, got 32768"),
    (random_codebook_tensor(16, 64, 1, 12, (2, 1), (1, 2)), 1, "expected 16 entries for codes of 4 bits, got 12"),
    (tables(16, 64, 5, 2, (2, 1)), 1, "expected one codebook per block with codes of 2 bits for 1 x 1"),
    (tables(16, 64, 4, 2, (1, 16)), 1, "expected blocks of a multiple of 8 columns, got 4"),
    (tables(64, 64, 8, 4, (64, 8)), 1, "expected at most 16384 values in the tables of 256 x 128 weights, got"),
    (in_float32(tables(16, 64, 4, 2, (2, 1))), 1, "expected codebooks of float16 or of integers with a scale each"),
]


@needs_mosaic
@pytest.mark.parametrize(("weight", "tokens", "reason"), REFUSALS)
def test_refusals(weight, tokens, reason):
    assert reason in supports(weight, "gpu", tokens=tokens)
    with pytest.raises(ValueError, match=reason):
        matmul(jnp.ones((tokens, weight.shape[1])), weight, "gpu")


# What the kernel for many tokens would round to float16 is read in several calls.
FEW = [(8, 4096, "bfloat16", True), (8, 8192, "bfloat16", False), (8, 8192, "float32", True), (9, 64, "float32", False)]


@needs_mosaic
@pytest.mark.parametrize(("tokens", "columns", "dtype", "few"), FEW)
def test_codes_are_read_once_for_few_tokens(tokens, columns, dtype, few, monkeypatch):
    from jaxquant.kernels.uniform_matmul import gpu_batch

    monkeypatch.setattr(gpu, "level_matmul", lambda x, *_, **__: x)
    monkeypatch.setattr(gpu_batch, "level_matmul", lambda x, *_, **__: x[:0])
    weight = jax.eval_shape(tile_tensor, levels(16, columns, 4))
    x = jax.ShapeDtypeStruct((tokens, columns), dtype)
    jax.clear_caches()
    y = jax.eval_shape(
        functools.partial(api.level_tile_matmul, bits=4, dtype=x.dtype), x, weight.words, weight.levels, None
    )
    jax.clear_caches()
    assert bool(len(y)) == few


@pytest.mark.parametrize("table", [False, True])
def test_what_is_supported_fits_in_shared_memory(table):
    columns = api.GPU_LEVEL_COLUMNS if table else api.GPU_COLUMNS
    for bits in (2, 3, 4) if table else (2, 3, 4, 8):
        assert gpu.shared_bytes(bits=bits, columns=columns, table=table) <= gpu.SHARED_BYTES


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="for older JAX")
def test_older_jax_is_told():
    assert "expected JAX 0.11 or newer" in supports(uniform_tensor(), "gpu")

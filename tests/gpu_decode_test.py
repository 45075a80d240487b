"""GPU kernels for several tokens: the decoders, run by numpy, against float64; how work is shared; lowering for a GPU."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant import matmul, pack
from jaxquant.grid import symmetric_scale, symmetric_tensor
from jaxquant.kernels.codebook_matmul import layout as slot_layout
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.ops import supports
from jaxquant.serving import for_serving
from tests import ops_test as tensors
from tests.gpu_model import Model
from tests.tensors_test import random_codebook_tensor

gpu_decode, gpu_fields, gpu_inputs, gpu_plan = (
    importlib.import_module(f"jaxquant.kernels.{name}")
    for name in ("gpu_decode", "gpu_fields", "gpu_inputs", "gpu_plan")
)
additive = importlib.import_module("jaxquant.kernels.codebook_matmul.gpu_batch")
scalar = importlib.import_module("jaxquant.kernels.uniform_matmul.gpu_batch")
api = importlib.import_module("jaxquant.kernels.uniform_matmul.api")

BOUND = 1e-3


class Threads:
    """`gpu_registers.Registers` of 128 threads, in numpy, with a shared memory."""

    def __init__(self, size):
        self.memory = np.zeros(size, np.uint8)

    def constant(self, value):
        return np.full(128, value, np.uint32)

    def thread(self):
        return np.arange(128, dtype=np.uint32)

    def row(self, block, h):
        warp, lane = np.divmod(self.thread(), np.uint32(32))
        return warp * np.uint32(16) + lane // np.uint32(4) + np.uint32(64 * block + 8 * h)

    def add(self, a, b):
        return a + b

    def subtract(self, a, b):
        return a - b

    def times(self, a, factor):
        return a * np.uint32(factor)

    def divide(self, a, divisor):
        return a // np.uint32(divisor)

    def shift(self, a, right):
        return a >> np.uint32(right) if right >= 0 else a << np.uint32(-right)

    def mask(self, a, mask):
        return a & np.uint32(mask)

    def either(self, a, b):
        return a | b

    def differ(self, a, b):
        return a ^ b

    def load_byte(self, address):
        return self.memory[address.astype(np.int64)].astype(np.uint32)

    def least(self, a, most):
        return np.minimum(a, np.uint32(most))

    def packed(self, operation, a, b):
        name, *_, kind = operation.split(".")
        dtype = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}[kind]
        function = {"add": np.add, "sub": np.subtract}[name]
        return function(a.view(dtype), b.view(dtype)).view(np.uint32)

    def permute(self, a, b, selector):
        source = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
        nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        assert nibbles.max() < 8
        return np.take_along_axis(source, nibbles.astype(np.int64), 1).copy().view(np.uint32)[:, 0]

    def load(self, address, words, offset, *, constant=False):
        del constant
        size = 4 * words or 2
        assert not ((address + np.uint32(offset)) % np.uint32(size)).any()
        place = (address + np.uint32(offset))[:, None].astype(np.int64) + np.arange(size)
        got = self.memory[place]
        if not words:
            got = np.pad(got, ((0, 0), (0, 2)))
        return [word.copy() for word in got.copy().view(np.uint32).T]

    def store(self, address, values):
        self.memory[address[:, None].astype(np.int64) + np.arange(16)] = np.stack(values, 1).view(np.uint8)

    def load_global(self, array, offset, words):
        place = offset[:, None].astype(np.int64) + np.arange(4 * words)
        return [word.copy() for word in np.asarray(array).reshape(-1).view(np.uint8)[place].copy().view(np.uint32).T]


def unpack(pairs, dtype):
    """The weights [64 * blocks, columns] of fragments, rows in the order of the outputs."""
    blocks, eights = len(pairs), len(pairs[0])
    weight = np.zeros((64 * blocks, 8 * eights))
    thread = np.arange(128)
    for b, k, h in np.ndindex(blocks, eights, 2):
        values = np.ascontiguousarray(pairs[b][k][h]).view(dtype).astype(np.float64).reshape(128, 2)
        for e in range(2):
            weight[Threads(0).row(b, h), 8 * k + thread % 4 * 2 + e] = values[:, e]
    return weight


def permuted(x):
    """Inputs [tokens, in] in the order of fragments: 16 of 4 octets' pairs, all first ones first; in float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (0, -x.shape[1] % 64)))
    return x.reshape(len(x), -1, 4, 4, 2).swapaxes(2, 3).reshape(x.shape)


def emulate(x, streams, tables, decoder, *, out, config, factor, dtype):
    """`gpu_decode.matmul` by numpy."""
    half = np.float16 if decoder.dtype == jnp.float16 else ml_dtypes.bfloat16
    tables = [np.asarray(table) for table in tables]
    sizes = [s.copies * s.bytes for s in streams]
    starts = np.cumsum([0, *sizes])
    table_size = sum(int(np.prod(t.shape)) * jnp.dtype(t.dtype).itemsize for t in decoder.shared())
    r = Threads(starts[-1] + table_size)
    shared = [r.constant(starts[-1])] if table_size else []
    for first in range(0, 128 * config.warpgroups, 128):
        decoder.fill(r, tables, shared, r.thread() + np.uint32(first), 128 * config.warpgroups)
    assert (decoder.steps - 1) * decoder.calls * decoder.fragments * decoder.width < x.shape[1]
    x = permuted(x)
    y = np.zeros((len(x), out))
    columns = decoder.calls * decoder.fragments * decoder.width
    x = np.pad(x, ((0, 0), (0, max(0, decoder.steps * columns - x.shape[1]))))
    for tile in range(0, out, config.rows):
        for step in range(decoder.steps):
            for number, s in enumerate(streams):
                for copy in range(s.copies):
                    begin = decoder.source(number, copy, step, tile)
                    box = np.zeros(s.box, s.array.dtype)
                    part = np.asarray(s.array)[tuple(slice(i, i + size) for i, size in zip(begin, s.box, strict=True))]
                    box[tuple(map(slice, part.shape))] = part
                    place = starts[number] + copy * s.bytes
                    r.memory[place : place + s.bytes] = box.reshape(-1).view(np.uint8)
            rows = 64 * config.blocks
            addresses = [r.constant(start) for start in starts[:-1]]
            for inner in range(0, config.rows, rows):
                first = tile + inner
                state = gpu_plan.Step(addresses, shared, tables, *map(r.constant, (first, inner, step)))
                for call in range(decoder.calls):
                    for i, pairs in enumerate(decoder.decode(r, call, config.blocks, state)):
                        f = call * decoder.fragments + i
                        column = step * columns + f * decoder.width
                        part = x[:, column : column + decoder.width] @ unpack(pairs, half).T
                        if decoder.scaled:
                            scale = np.asarray(streams[-1].array, np.float64)
                            line = column // decoder.group
                            scale = scale[line, first : first + rows] if line < len(scale) else np.zeros(rows)
                            part = part[:, : len(scale)] * scale
                        width = max(0, min(rows, out - first))
                        y[:, first : first + width] += part[:, :width]
    return jnp.asarray(y if factor is None else y * np.asarray(factor, np.float64), dtype)


def relative(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


def inputs(tokens, columns, dtype):
    return jnp.asarray(np.random.default_rng(1).standard_normal((tokens, columns)), dtype)


@pytest.mark.parametrize(
    ("count", "blocks", "groups", "d"),
    [(2, 1, 40, 8), (2, 2, 9, 8), (1, 1, 16, 8), (1, 2, 80, 8), (4, 2, 8, 8), (1, 1, 70, 16), (2, 1, 35, 16)],
)
@pytest.mark.parametrize("scaled", [None, "rows", "columns"])
def test_additive_codes(monkeypatch, count, blocks, groups, d, scaled):
    monkeypatch.setattr(gpu_decode, "matmul", emulate)
    rng = np.random.default_rng(0)
    out, columns = 300, d * groups
    codes = rng.integers(0, 256, (count, out, groups))
    books = rng.standard_normal((count * 256, d)).astype(np.float16)
    scale = {None: None, "rows": rng.uniform(1, 2, (out, 1)), "columns": rng.uniform(1, 2, (1, groups))}[scaled]
    weight = sum(books.astype(np.float64)[256 * m + codes[m]] for m in range(count))
    weight = (weight if scale is None else weight * scale[..., None]).reshape(out, columns)
    x = inputs(3, columns, jnp.bfloat16)
    words = slot_layout.banked_words(jnp.asarray(codes))
    config = gpu_plan.BlockConfig(2, blocks, 8 if groups < 40 else 256)
    scale = None if scale is None else jnp.asarray(scale, jnp.float32)
    books = jnp.asarray(books.reshape(count, -1))
    y = additive.decode_matmul(x, words, books, scale, dimension=d, config=config)
    assert relative(y, np.asarray(x, np.float64) @ weight.T) < BOUND


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "columns"), [(None, 330), (128, 384), (32, 640), (96, 480)])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_uniform_codes(monkeypatch, bits, group, columns, has_zero, dtype):
    monkeypatch.setattr(gpu_decode, "matmul", emulate)
    rng = np.random.default_rng(0)
    out = 208
    codes, groups = rng.integers(0, 2**bits, (out, columns)), columns // group if group else 1
    scale = rng.uniform(0.5, 1.5, (out, groups)).astype(np.float16)
    zero = rng.integers(0, 2**bits, (groups, out)) if has_zero else None
    point = np.repeat(zero.T, columns // groups, 1) if has_zero else 2 ** (bits - 1)
    weight = (codes - point) * np.repeat(scale.astype(np.float64), columns // groups, 1)
    x = inputs(2, columns, dtype)
    config = gpu_plan.BlockConfig(2, 1 if bits < 4 else 2, 8)
    zero = None if zero is None else pack(jnp.asarray(zero), bits).words
    words = tiles.to_tiles(jnp.asarray(codes), bits, table=False)
    y = scalar.uniform_matmul(x, words, jnp.asarray(scale.T), zero, bits=bits, config=config)
    assert relative(y, np.asarray(x, np.float64) @ weight.T) < (1e-6 if dtype != "float32" else BOUND)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_levels(monkeypatch, bits, dtype):
    monkeypatch.setattr(gpu_decode, "matmul", emulate)
    rng = np.random.default_rng(0)
    out, columns = 208, 330
    codes = rng.integers(0, 2**bits, (out, columns))
    levels = rng.standard_normal((out, 2**bits)).astype(dtype)
    scale = rng.uniform(1, 2, (out, 1)).astype(np.float32)
    weight = np.take_along_axis(levels.astype(np.float64), codes, 1) * scale
    x = inputs(2, columns, jnp.bfloat16)
    config = gpu_plan.BlockConfig(2, 2, 8)
    words = tiles.to_tiles(jnp.asarray(codes), bits, table=True)
    y = scalar.level_matmul(x, words, jnp.asarray(levels), jnp.asarray(scale), bits=bits, config=config)
    assert relative(y, np.asarray(x, np.float64) @ weight.T) < BOUND


# Tables in blocks: rows x columns, in blocks of rows x columns, that divide tiles and steps, or not.
BOOKS = [
    ((208, 512), (16, 256)),  # as GPTVQ has them
    ((256, 1024), (256, 512)),
    ((300, 640), (3, 640)),
    ((300, 288), (100, 96)),
    ((160, 400), (10, 200)),
    ((64, 480), (64, 24)),
    ((130, 256), (130, 128)),
]


ENTRIES = [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2), (2, 4)]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")
@pytest.mark.parametrize(("number", "entry"), [(i, (i + k) % 7) for i in range(7) for k in (0, 3, 5)])
def test_tables_of_blocks(monkeypatch, number, entry):
    monkeypatch.setattr(gpu_decode, "matmul", emulate)
    monkeypatch.setattr(api, "GPU_TOKENS", 0)
    ((shape, block), (bits, d)) = BOOKS[number], ENTRIES[entry]
    blocks = shape[0] // block[0], shape[1] // block[1]
    weight = random_codebook_tensor(*shape, 1, 2 ** (bits * d), blocks, (1, d))
    if reason := supports(weight, "gpu"):
        assert reason.startswith("expected at most 16384 values in the tables of 256 x 128 weights, got ")
        assert np.prod(block) < 8 * 2 ** (bits * d) * d  # which cost more than 2 bits per weight
        return
    x = inputs(2, shape[1], jnp.bfloat16)
    with jax.disable_jit():
        y = matmul(x.astype(jnp.float32), weight, "gpu")
    expected = np.asarray(x, np.float64) @ np.asarray(tensors.dequantize(weight), np.float64).T
    assert relative(y, expected) < 1e-6


@pytest.mark.parametrize(
    ("tiles", "steps", "cores", "count"),
    [
        (112, 64, 132, 132),
        (16, 32, 132, 128),
        (7, 5, 35, 35),
        (3, 100, 132, 132),
        (1, 1, 132, 1),
        (70, 9, 132, 132),
        (128, 16, 66, 64),
        (448, 16, 66, 66),
        (33, 4, 132, 132),
    ],
)
def test_shares_are_equal(tiles, steps, cores, count):
    total = tiles * steps
    assert gpu_plan.num_shares(tiles, steps, cores) == count
    shares = gpu_plan.Shares(steps, total, count)
    starts = shares.start(np.arange(shares.count + 1))
    assert (starts[0], starts[-1]) == (0, total)
    assert set(np.diff(starts)) <= {total // shares.count, total // shares.count + 1}
    owners = np.searchsorted(starts, np.arange(total), "right") - 1
    np.testing.assert_array_equal(shares.owner(np.arange(total)), owners)


@pytest.mark.parametrize("tokens", [5, 16, 64, 128, 129, 256, 257, 512, 4097])
@pytest.mark.parametrize("out", [40, 4096, 14336, 28672])
@pytest.mark.parametrize("scaled", [False, True])
def test_tiles_of_tokens_are_equal(tokens, out, scaled):
    config = gpu_plan.block_config(tokens, out, scaled=scaled)
    most = 256 if config.cluster == 2 and not scaled else 128
    assert config.tokens % (8 * config.cluster) == 0
    assert config.tokens <= most
    assert -(-tokens // config.tokens) == -(-tokens // most)
    assert config.warpgroups == 2 or config.tokens <= 64


def test_half_precision_rows():
    x = jnp.asarray([[1e-30, 3e-30], [3e38, 1.0], [0, 0]], jnp.float32)
    half, scale = gpu_fields.as_half(x)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(half, np.float64) * np.asarray(scale, np.float64), x, rtol=1e-3, atol=1e32)
    assert gpu_fields.as_half(half) == (half, None)


def bits(exponent, mantissa=0):
    return np.uint32(exponent << 23 | mantissa).view(np.float32)


@pytest.mark.parametrize(("tokens", "columns"), [(3, 64), (8, 576), (1, 9000)])
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16", "float16"), ("bfloat16", "bfloat16")])
def test_the_program_that_prepares_inputs(tokens, columns, dtypes, monkeypatch):
    dtypes = tuple(np.dtype(getattr(ml_dtypes, name, name)) for name in dtypes)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, columns)) * 10.0 ** rng.integers(-30, 30, (tokens, 1))
    x = np.pad(x, ((0, 0), (0, -columns % 64))).astype(dtypes[0])
    plan = gpu_inputs.Plan(*x.shape, dtypes)
    y = np.full((tokens + -tokens % 8, x.shape[1]), np.nan, dtypes[1])
    factors = np.full(tokens, np.nan, np.float32)
    for row in range(len(y)):
        model = Model(1, plan.threads)
        model.patch(monkeypatch)
        addresses = model.global_(x), model.global_(y), model.shared(4 * 32)
        where = model.global_(factors) if plan.scaled else None
        gpu_inputs.ThreadProgram(plan, np.full(model.count, row), addresses, where).run()
    np.testing.assert_array_equal(y[tokens:].astype(np.float32), 0)
    if not plan.scaled:
        np.testing.assert_array_equal(y[:tokens].astype(np.float64), permuted(x))
        return
    largest = np.abs(y[:tokens].astype(np.float64)).max(1)
    assert largest.min() >= 2**13
    assert largest.max() <= 2**14
    np.testing.assert_allclose(y[:tokens] * factors[:, None].astype(np.float64), permuted(x), rtol=5e-4, atol=1e-38)


@pytest.mark.parametrize("value", [0.0, bits(0, 1), bits(13), bits(254), np.inf, np.nan])
def test_rows_that_float16_cannot_hold(value, monkeypatch):
    x = np.full((1, 64), value, np.float32)
    x[0, :32] = 0
    plan = gpu_inputs.Plan(1, 64, (np.dtype(np.float32), np.dtype(np.float16)))
    y, factors, model = np.zeros((8, 64), np.float16), np.zeros(1, np.float32), Model(1, plan.threads)
    model.patch(monkeypatch)
    pointers = [model.global_(x), model.global_(y), model.shared(4 * 32)]
    gpu_inputs.ThreadProgram(plan, np.zeros(model.count, int), pointers, model.global_(factors)).run()
    product = y[:1].astype(np.float32) * factors
    np.testing.assert_allclose(product, x, rtol=5e-4)


def levels_tensor(out, n, bits):
    """A random CodebookTensor with a table per row."""
    return random_codebook_tensor(out, n, 1, 2**bits, (out, 1), (1, 1))


def tables_tensor(out, n, bits, d, blocks):
    """A random CodebookTensor with a table of integers per block, as GPTVQ's."""
    tensor = random_codebook_tensor(out, n, 1, 2**bits, blocks, (1, d))
    books = tensor.codebooks.astype(jnp.float32)
    return dataclasses.replace(tensor, codebooks=symmetric_tensor(books, symmetric_scale(books, 8, "float16"), 8))


# name: (weight, tokens)
PRODUCTS = {
    "2x8": (tensors.additive(520, 1024), 9),
    "2x8, many tokens": (tensors.additive(520, 1024), 600),
    "1x8": (tensors.additive(333, 264, 1), 64),
    "4x8, a part of a set": (tensors.additive(300, 40, 4), 100),
    "3-bit, a part of a block": (tensors.uniform_tensor(300, 60, 3), 600),
    "4 levels, a part of a block": (levels_tensor(300, 60, 2), 600),
    "4x8": (tensors.additive(333, 264, 4), 100),
    "2x8, vectors of 16": (tensors.additive(333, 1040, 2, d=16), 20),
    "1x8, vectors of 16": (tensors.additive(200, 1040, 1, d=16), 300),
    "uniform 4-bit": (tensors.uniform_tensor(520, 1024), 16),
    "uniform 4-bit, many tokens": (tensors.uniform_tensor(520, 1024), 257),
    "uniform 4-bit groups": (tensors.uniform_tensor(520, 1024, 4, 128), 100),
    "uniform 3-bit": (tensors.uniform_tensor(333, 700, 3), 33),
    "uniform 2-bit groups": (tensors.uniform_tensor(333, 1024, 2, 32, zero=False), 9),
    "uniform 8-bit": (tensors.uniform_tensor(333, 700, 8), 128),
    "16 levels": (levels_tensor(333, 700, 4), 64),
    "8 levels": (levels_tensor(333, 700, 3), 16),
    "4 levels": (levels_tensor(333, 700, 2), 300),
    "tables of 4 levels": (tables_tensor(576, 1024, 2, 1, (288, 4)), 1),
    "tables of 16 levels": (tables_tensor(333, 1024, 4, 1, (37, 4)), 20),
    "tables of 16 pairs": (tables_tensor(576, 576, 4, 2, (36, 2)), 1),
    "tables of 16 pairs, many tokens": (tables_tensor(512, 1024, 4, 2, (32, 4)), 600),
    "tables of 64 pairs": (tables_tensor(640, 640, 6, 2, (20, 2)), 5),
    "tables of 256 pairs": (tables_tensor(576, 512, 8, 2, (3, 2)), 70),
    "tables of 256 quadruples": (tables_tensor(520, 768, 8, 4, (2, 3)), 16),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")
@pytest.mark.parametrize("name", PRODUCTS)
def test_lowering(name):
    weight, tokens = PRODUCTS[name]
    assert supports(weight, "gpu", tokens=tokens) is None
    x = jax.ShapeDtypeStruct((tokens, weight.shape[1]), jnp.bfloat16)
    product = jax.jit(functools.partial(matmul, implementation="gpu"))
    assert "mosaic_gpu" in product.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_on_a_gpu(name, dtype):
    weight, tokens = PRODUCTS[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, weight.shape[1])), dtype)
    served = for_serving(weight, "gpu")
    product = jax.jit(functools.partial(matmul, implementation="gpu"))
    y = product(x, served)
    expected = np.asarray(x, np.float64) @ np.asarray(tensors.dequantize(weight), np.float64).T
    assert relative(y, expected) < BOUND
    for _ in range(20):
        np.testing.assert_array_equal(product(x, served), y)

"""GPU kernels, without a GPU: the layout, the program of the threads, what fits, and that the kernel can be lowered.

Pallas cannot interpret code of single threads; `tests.gpu_model` can.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import CodebookTensor, matmul, pack
from jaxquant.kernels.codebook_matmul import api, gpu, gpu_gather, gpu_gather_plan, gpu_plan, layout
from jaxquant.kernels.codebook_matmul.gpu_plan import BlockConfig, block_config
from jaxquant.kernels.codebook_matmul.layout import SET
from jaxquant.ops import choose, matmul_each, supports
from jaxquant.prologue import ACTIVATIONS, Gate, RMSNorm
from jaxquant.serving import BankedTensor, banked_tensor, for_serving, from_serving
from tests.gpu_model import Model
from tests.ops_test import TENSORS, additive, dequantize, relative
from tests.tensors_test import random_codebook_tensor

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 70), st.integers(1, 70))
def test_banked_words_hold_the_codes(count, out, groups):
    codes = np.random.default_rng(0).integers(0, 256, (count, out, groups)).astype(np.uint8)
    words = layout.banked_words(jnp.asarray(codes))
    assert words.shape == (4 * -(-groups * count // SET), out, 4)
    np.testing.assert_array_equal(layout.from_banked_words(words, count, groups), codes)


def modelled(x, weight, config, monkeypatch, prologue=None, residual=None):
    """The kernel's result and the most accesses of a bank, by `tests.gpu_model`."""
    arrays = [None if part is None else np.asarray(part) for part in (weight.words, weight.codebooks, weight.scale)]
    settings = {"dimension": weight.dimension, "dtype": np.float32, "config": config}
    plan = gpu_plan.make_plan(x, [arrays], prologue, residual, **settings)
    y = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    given = {"scale": arrays[2], "prologue": next(iter(jax.tree.leaves(prologue)), None), "residual": residual}
    given = {name: np.asarray(array) for name, array in given.items() if array is not None}
    most = 0
    for cluster, chunk in np.ndindex(plan.grid):
        model = Model(config.cluster, plan.threads)
        model.patch(monkeypatch)
        sizes = (
            config.sets * plan.chunk * gpu_plan.TABLE_BYTES,
            4 * plan.sums,
            4 * plan.sums,
            8,
            4 * plan.warps * plan.chunk,
        )
        addresses = [*map(model.global_, (x, *arrays[:2], y)), *map(model.shared, sizes)]
        pointers = {name: model.global_(array.reshape(-1)) for name, array in given.items()}
        place = model.block, cluster, chunk
        gpu.ThreadProgram(plan, place, weight.shape[0], addresses, pointers).run()
        most = max(most, model.most_in_a_bank)
    return y, most


MODELLED = {
    "2x8": (additive(100, 1024), 1, BlockConfig(1, 2, 2, 1, 64)),
    "passes, sets that are not there": (additive(40, 1100), 1, BlockConfig(1, 2, 1, 1, 32)),
    "teams, loads ahead": (additive(300, 520), 1, BlockConfig(2, 2, 2, 2, 160, 2)),
    "2 tokens of 5": (additive(33, 64), 5, BlockConfig(1, 1, 1, 1, 64)),
    "1x8, vectors of 16, no scale": (additive(40, 1600, 1, d=16, scaled=False), 1, BlockConfig(1, 2, 1, 1, 64)),
    "4x8, vectors of 4": (additive(40, 200, 4, d=4), 1, BlockConfig(2, 2, 2, 1, 64)),
    "8x8, 16 entries": (additive(40, 64, 8, size=16), 1, BlockConfig(1, 1, 1, 1, 64)),
}


@pytest.mark.parametrize("name", MODELLED)
def test_the_program_of_threads(name, monkeypatch):
    weight, tokens, config = MODELLED[name]
    x = np.random.default_rng(0).standard_normal((tokens, weight.shape[1])).astype(np.float32)
    y, most = modelled(x, banked_tensor(weight), config, monkeypatch)
    assert relative(y, x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T) < 2e-6
    assert most == 1


def gathered(x, weight, monkeypatch, prologue=None, residual=None):
    """The result of the gathering kernel, by `tests.gpu_model`."""
    arrays = [None if part is None else np.asarray(part) for part in (weight.words, weight.codebooks, weight.scale)]
    settings = {"dimension": weight.dimension, "dtype": np.float32}
    plan = gpu_gather_plan.make_plan(x, [arrays], prologue, residual, **settings)
    y = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    given = {"scale": arrays[2], "prologue": next(iter(jax.tree.leaves(prologue)), None), "residual": residual}
    given = {name: np.asarray(array) for name, array in given.items() if array is not None}
    for block, chunk in np.ndindex(plan.blocks(weight.shape[0]), -(-len(x) // plan.chunk)):
        model = Model(1, plan.threads)
        model.patch(monkeypatch)
        addresses = [*map(model.global_, (x, *arrays[:2], y)), *(model.shared(4 * size) for size in plan.shared)]
        pointers = {name: model.global_(array.reshape(-1)) for name, array in given.items()}
        place = np.full(model.count, block), np.full(model.count, chunk)
        gpu_gather.ThreadProgram(plan, place, weight.shape[0], addresses, pointers).run()
    return y


GATHERED = {
    "2x8": (additive(100, 576), 1),
    "two tiles, lines that are not there": (additive(1200, 1100), 1),
    "tokens that are not there": (additive(40, 576), 6),
    "1x8, vectors of 16, no scale": (additive(40, 1600, 1, d=16, scaled=False), 2),
    "4x8, vectors of 4": (additive(40, 200, 4, d=4), 1),
    "8x8, 16 entries": (additive(40, 64, 8, size=16), 1),
}


@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_program_of_gathering_threads(name, dtype, monkeypatch):
    weight, tokens = GATHERED[name]
    x = np.random.default_rng(0).standard_normal((tokens, weight.shape[1])).astype(dtype)
    y = gathered(x, banked_tensor(weight), monkeypatch)
    assert relative(y, x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T) < 1e-6


def expected_product(x, weight, prologue=None, residual=None):
    """In float64."""
    x = np.asarray(x, np.float64)
    if isinstance(prologue, RMSNorm):
        scale = np.asarray(prologue.weight, np.float64) + prologue.offset
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + prologue.eps) * scale
    if isinstance(prologue, Gate):
        with jax.enable_x64(True):
            x = x * np.asarray(ACTIVATIONS[prologue.activation](jnp.asarray(prologue.gate, jnp.float64)))
    y = x @ np.asarray(dequantize(weight), np.float64).T
    return y if residual is None else y + np.asarray(residual, np.float64)


def prologues(columns, tokens, dtype=np.float32):
    """One of every kind."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(columns).astype(dtype)
    gate = (20 * rng.standard_normal((tokens, columns))).astype(dtype)
    return {
        "norm": RMSNorm(weight, 0.5),
        "norm with offset": RMSNorm(weight, 0.5, 1.0),
        "silu": Gate(gate, "silu"),
        "gelu": Gate(gate / 8, "gelu_tanh"),
    }


@pytest.mark.parametrize(
    ("weight", "tokens"),
    [
        (additive(40, 1100), 3),
        (additive(40, 64, scaled=False), 1),
        (dataclasses.replace(additive(40, 200, scaled=False), scale=jnp.full((1, 25), 1.5)), 1),
    ],
)
@pytest.mark.parametrize("name", prologues(8, 1))
def test_the_gathering_kernel_has_prologues(weight, tokens, name, monkeypatch):
    rng = np.random.default_rng(0)
    x, residual = (3 * rng.standard_normal((tokens, n)).astype(np.float32) for n in weight.shape[::-1])
    prologue = prologues(weight.shape[1], tokens)[name]
    y = gathered(x, banked_tensor(weight), monkeypatch, prologue, residual)
    assert relative(y, expected_product(x, weight, prologue, residual)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", prologues(8, 1))
def test_the_lookup_kernel_has_prologues(tokens, name, monkeypatch):
    weight = additive(100, 520)
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (520, 100))
    prologue = prologues(520, tokens)[name]
    config = BlockConfig(1, 2, 2, 1, 64)
    y, _ = modelled(x, banked_tensor(weight), config, monkeypatch, prologue, residual)
    assert relative(y, expected_product(x, weight, prologue, residual)) < 2e-6


def test_scales_of_columns_and_half_precision(monkeypatch):
    weight = additive(40, 200, scaled=False)
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (1, 25)), jnp.float16)
    weight = dataclasses.replace(weight, scale=scale)
    x = np.random.default_rng(0).standard_normal((1, 200)).astype(np.float16)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y, _ = modelled(x, banked_tensor(weight), BlockConfig(1, 1, 2, 1, 64), monkeypatch)
    assert relative(y, expected) < 2e-6
    assert relative(gathered(x, banked_tensor(weight), monkeypatch), expected) < 2e-6


@settings(max_examples=50)
@given(st.integers(1, 2000), st.lists(st.integers(1, 200_000), min_size=1, max_size=4), st.integers(1, 3))
def test_every_size_has_a_division(total_sets, outs, chunk):
    config = block_config(total_sets, outs, chunk)
    sums = 4 * chunk * config.teams * config.width
    arrays = config.sets * chunk * gpu_plan.TABLE_BYTES, sums, sums, 8, 4 * chunk * 4 * config.warpgroups
    assert sum(-(-size // 1024) for size in arrays) <= 226  # Pallas aligns them so; all 227 KB are refused
    assert config.width % 32 == config.width % config.cluster == config.sets % config.teams == 0


def test_the_layout_is_reversible_and_counted():
    weight = additive(40, 224)  # 56 slots
    served = banked_tensor(weight)
    for a, b in zip(jax.tree.leaves(from_serving(served)), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(a, b)
    assert served.shape == weight.shape
    assert served.storage_bits() == weight.storage_bits() + 8 * 40 * (SET - 56)
    assert served.format == weight.format + ", kernel layout"


@needs_mosaic
def test_served_where_the_kernel_reads_it():
    assert isinstance(for_serving(additive(), "gpu"), BankedTensor)
    assert not isinstance(for_serving(additive(count=3), "gpu"), BankedTensor)
    assert choose(for_serving(additive(), "gpu")) == ("gpu" if jax.default_backend() == "gpu" else "reference")


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_other_implementations_take_the_layout(implementation):
    weight = additive()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, weight.shape[1])), jnp.float32)
    product = jax.jit(matmul, static_argnums=2)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(product(x, banked_tensor(weight), implementation), expected) < 1e-5


LOWERED = {
    "2x8": (additive(136, 320), 1, jnp.bfloat16),
    "2x8, 8 tokens": (additive(40, 64), 8, jnp.float16),
    "1x8, vectors of 16, no scale": (additive(20, 1600, 1, d=16, scaled=False), 2, jnp.float32),
    "4x8, vectors of 4": (additive(20, 1604, 4, d=4), 1, jnp.float32),
    "8x8, 16 entries": (additive(20, 64, 8, size=16), 1, jnp.bfloat16),
    "column scales and outliers": (TENSORS["columns"], 1, jnp.bfloat16),
}


def by_lookup(x, weight):
    """The product by the kernel that `matmul` uses for large weights only."""
    settings = {"dimension": weight.dimension, "dtype": x.dtype}
    return gpu.lookup_matmul(x, [(weight.words, weight.codebooks, weight.scale)], **settings)


@needs_mosaic
@pytest.mark.parametrize("name", LOWERED)
def test_the_kernel_lowers_for_cuda(name):
    weight, tokens, dtype = LOWERED[name]
    assert supports(weight, "gpu", tokens=tokens) is None
    x = jax.ShapeDtypeStruct((tokens, weight.shape[1]), dtype)
    product = jax.jit(functools.partial(matmul, implementation="gpu"))
    text = product.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1
    if isinstance(weight, CodebookTensor):
        jax.jit(by_lookup).trace(x, banked_tensor(weight)).lower(lowering_platforms=("cuda",))
    gradient = jax.jit(jax.grad(lambda x, w: matmul(x, w, "gpu").astype(jnp.float32).sum()))
    gradient.trace(jnp.ones(x.shape, dtype), weight).lower(lowering_platforms=("cuda",))


ON_GPU = {
    "2x8": (additive(1000, 1024), 1, "float32"),
    "2x8, 3 tokens": (additive(333, 1000), 3, "bfloat16"),
    "2x8, 8 tokens": (additive(24, 64), 8, "float16"),
    "2x8, 3 tokens, many outputs": (additive(28672, 64), 3, "float32"),
    "1x8, vectors of 16, no scale": (additive(130, 1600, 1, d=16, scaled=False), 2, "float32"),
    "4x8, vectors of 4": (additive(77, 1604, 4, d=4), 1, "float32"),
    "8x8, 16 entries": (additive(20, 520, 8, size=16), 1, "bfloat16"),
    "column scales and outliers": (TENSORS["columns"], 1, "float32"),
}


@needs_mosaic
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    weight, tokens, dtype = ON_GPU[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, weight.shape[1])), dtype)
    served = for_serving(weight, "gpu")
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    rounding = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]  # of results
    products = [functools.partial(matmul, implementation="gpu")]
    if isinstance(served, BankedTensor):
        products.append(by_lookup)
    for product in map(jax.jit, products):
        y = product(x, served)
        assert relative(y, expected) < rounding
        for _ in range(20):
            np.testing.assert_array_equal(product(x, served), y)


def empty_additive(out, columns):
    """A weight of zeros, quickly."""
    codes, books = jnp.zeros((2, out, columns // 8), jnp.uint8), jnp.zeros((2, 2048), jnp.float16)
    return CodebookTensor(pack(codes, 8), books, jnp.ones((out, 1), jnp.float16), (1, 1), (1, 8))


@needs_mosaic
@pytest.mark.parametrize("name", [None, *prologues(8, 1)])
@pytest.mark.parametrize("outs", [(96, 40, 40), (96,), (4096, 512, 512), (4096,)])  # gathered, and by lookup
def test_products_of_one_input_are_one_launch(name, outs):
    weights = [banked_tensor(empty_additive(n, 576)) for n in outs]
    x = jnp.ones((2, 576), jnp.bfloat16)
    prologue = None if name is None else jax.tree.map(jnp.asarray, prologues(576, 2, jnp.bfloat16)[name])
    residual = jnp.ones((2, outs[0]), jnp.bfloat16) if len(outs) == 1 else None
    product = jax.jit(lambda x, weights: matmul_each(x, weights, "gpu", prologue=prologue, residual=residual))
    text = product.trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @") == 1
    for apart in ("rsqrt", "multiply", "add ", "logistic", "tanh"):
        assert f"stablehlo.{apart}" not in text


@needs_mosaic
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", [None, *prologues(8, 1)])
@pytest.mark.parametrize("outs", [(576, 192, 40), (576,)])
@pytest.mark.parametrize("by_lookup", [False, True])
def test_fused_products_on_a_gpu(tokens, name, outs, by_lookup, monkeypatch):
    if by_lookup:
        monkeypatch.setattr(api, "GATHER_SIZE", 0)
        jax.clear_caches()
    weights = [additive(n, 576) for n in outs]
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((tokens, 576)).astype(np.float32) for _ in range(2))
    given = {"prologue": prologues(576, tokens).get(name), "residual": residual if len(outs) == 1 else None}
    product = jax.jit(functools.partial(matmul_each, implementation="gpu"))
    for y, weight in zip(product(x, for_serving(weights, "gpu"), **given), weights, strict=True):
        assert relative(y, expected_product(x, weight, **given)) < 2e-6


REFUSALS = [
    (additive(d=4), 9, "with vectors of 16, beyond 8 tokens, got 2 with vectors of 4"),
    (additive(count=3), 1, "expected 1, 2, 4 or 8 codebooks with vectors of 4, 8 or 16, got 3 with vectors of 8"),
    (additive(blocks=(1, 2), d=4), 1, "expected codebooks for all of the weight, got 1 x 2 blocks"),
    (additive(size=512), 1, "expected codes of at most 8 bits, got 9"),
    (random_codebook_tensor(8, 16, 1, 8, (1, 1), (2, 2)), 1, "expected entries of one row"),
]


@needs_mosaic
@pytest.mark.parametrize(("weight", "tokens", "reason"), REFUSALS)
def test_refusals(weight, tokens, reason):
    assert reason in supports(weight, "gpu", tokens=tokens)
    with pytest.raises(ValueError, match=reason):
        matmul(jnp.ones((tokens, weight.shape[1])), weight, "gpu")


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="for older JAX")
def test_older_jax_is_told():
    assert "expected JAX 0.11 or newer" in supports(additive(), "gpu")

"""Products with quantized weights: every type and implementation against float64, gradients, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import ConcatTensor, UniformTensor, matmul, ops, pack
from jaxquant.codebook_tensor import ColumnTensor, log_scale
from jaxquant.ops import matmul_each, supports
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.prologue import Gate, RMSNorm
from jaxquant.serving import for_serving
from jaxquant.tensors import pack_order, with_outliers
from tests.tensors_test import random_codebook_tensor

OUT, IN = 24, 32
BOUND = 2e-3  # of the kernels; what they reach is tested in their own files


def uniform_tensor(out=OUT, n=IN, bits=4, group=None, *, zero=True, seed=0):
    """A random UniformTensor."""
    rng = np.random.default_rng(seed)
    groups = 1 if group is None else n // group
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (out, groups)), jnp.float16)
    point = pack(jnp.asarray(rng.integers(0, 2**bits, (groups, out))), bits) if zero else None
    return UniformTensor(pack(jnp.asarray(rng.integers(0, 2**bits, (out, n))), bits), scale, point)


def additive(out=OUT, n=IN, count=2, size=256, blocks=(1, 1), d=8, **options):
    """A random CodebookTensor of additive codes."""
    return random_codebook_tensor(out, n, count, size, blocks, (1, d), **options)


def outliers(base, count=5):
    """Adds single entries."""
    out, n = base.shape
    rng = np.random.default_rng(1)
    place = np.sort(rng.choice(out * n, count, replace=False))
    values = jnp.asarray(10 * rng.standard_normal(count), jnp.float32)
    return with_outliers(base, values, jnp.asarray(place, jnp.int32), "float32")


def ordered(n):
    return pack_order(jnp.asarray(np.random.default_rng(2).permutation(n)))


def columns(base):
    scale = log_scale(jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, base.shape[1]), jnp.float32))
    return ColumnTensor(base, scale, ordered(base.shape[1]))


def outlier_columns(base):
    values = jnp.asarray(np.random.default_rng(4).standard_normal((base.shape[0], 3)), jnp.float16)
    return ColumnOutlierTensor(base, values.at[:, 2].set(0), jnp.asarray([1, 4, base.shape[1]], jnp.uint16))


def dense_part(out, n):
    return jnp.asarray(np.random.default_rng(5).standard_normal((out, n)), jnp.float16)


TENSORS = {
    "additive": additive(),
    "additive, column scale": ColumnTensor(additive(), None, ordered(IN)),
    "small codebooks": additive(size=8, count=3, d=4, scaled=False),
    "row and column blocks": additive(blocks=(2, 4), size=16, count=1, d=2),
    "outliers": outliers(additive()),
    "outlier columns": outlier_columns(additive()),
    "columns": columns(additive()),
    "joined columns": ConcatTensor((additive(n=16), dense_part(OUT, 16)), ordered(IN), 1),
    "joined rows": ConcatTensor((additive(out=8), outliers(additive(out=16, seed=7))), ordered(OUT), 0),
}

product = jax.jit(matmul, static_argnums=2)
dequantize = jax.jit(lambda weight: weight.dequantize())


def relative(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("name", TENSORS)
def test_products_are_those_of_the_dense_weight(name, implementation):
    weight = TENSORS[name]
    dense = np.asarray(dequantize(weight), np.float64)
    x = np.random.default_rng(0).standard_normal((2, 1, IN)).astype(np.float32)
    y = product(jnp.asarray(x), weight, implementation)
    assert y.shape == (2, 1, OUT)
    assert y.dtype == jnp.float32
    assert relative(y, x.astype(np.float64) @ dense.T) < 1e-5  # float32 sums of 32 terms
    served = jax.jit(lambda w: for_serving(w, "cpu"))(weight)
    np.testing.assert_allclose(product(jnp.asarray(x), served, implementation), y, rtol=1e-4, atol=1e-4)
    half = jax.eval_shape(matmul, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weight)
    assert (half.dtype, half.shape) == (jnp.bfloat16, y.shape)


@pytest.mark.parametrize("name", ["additive", "columns", "outliers", "joined columns"])
def test_gradients_are_those_of_the_reference(name):
    weight = TENSORS[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, IN)), jnp.float32)

    def loss(x, weight, implementation):
        return jnp.sum(jnp.sin(matmul(x, weight, implementation)))

    gradient = jax.jit(jax.grad(loss, (0, 1), allow_int=True), static_argnums=2)
    ours, expected = gradient(x, weight, "cpu"), gradient(x, weight, "reference")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            assert float(jnp.abs(b).sum()) > 0
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)  # some are float16


@settings(max_examples=5)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 8]))
def test_any_size(tokens, out, groups, count, d):
    weight = additive(out, groups * d, count, 16, d=d)
    x = np.random.default_rng(0).standard_normal((tokens, groups * d)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(product(jnp.asarray(x), weight, "cpu"), expected) < 1e-5


def test_the_default_is_the_kernel_only_where_the_layout_is_its_own():
    x = jnp.ones((1, IN))

    def program(weight):
        return str(jax.make_jaxpr(matmul)(x, weight))

    assert "custom_vjp" not in program(TENSORS["additive"])
    assert "custom_vjp" in program(for_serving(TENSORS["additive"], "cpu"))
    assert "custom_vjp" in program(for_serving(TENSORS["joined columns"], "cpu"))
    assert "custom_vjp" not in str(jax.make_jaxpr(matmul)(jnp.ones((64, IN)), for_serving(TENSORS["additive"], "cpu")))


REFUSALS = {
    "no such": (additive(), "cuda", 1, "expected one of reference, cpu, tpu, gpu"),
    "tokens": (additive(), "cpu", 5, "expected at most 4 tokens, got 5"),
    "bits": (additive(size=512), "cpu", 1, "expected codes of at most 8 bits, got 9"),
    "vectors": (
        random_codebook_tensor(8, 16, 1, 8, (1, 1), (2, 2)),
        "cpu",
        1,
        "expected entries of one row, got 2 x 2",
    ),
    "uniform": (uniform_tensor(), "cpu", 1, "a CPU kernel for additive codes only"),
    "part": (outliers(uniform_tensor(bits=5)), "gpu", 1, "expected codes of 2, 3, 4 or 8 bits, got 5"),
    "uniform bits": (uniform_tensor(bits=5), "tpu", 1, "expected codes of 2, 3, 4 or 8 bits, got 5"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_explicit_implementation_never_falls_back(name):
    weight, implementation, tokens, reason = REFUSALS[name]
    assert reason in supports(weight, implementation, tokens=tokens)
    with pytest.raises(ValueError, match=f'implementation "{implementation}": .*{reason}'):
        matmul(jnp.ones((tokens, weight.shape[1])), weight, implementation)


def test_inner_sizes():
    with pytest.raises(ValueError, match=r"expected x \[..., 32\] for a weight \(24, 32\), got \(2, 31\)"):
        matmul(jnp.ones((2, 31)), additive())


PROLOGUES = {
    "norm": (
        RMSNorm(np.zeros(64), 0.5, 1.0),
        lambda x, w: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * (w + 1),
    ),
    "silu": (Gate(np.zeros((3, 64)), "silu"), lambda x, gate: gate / (1 + jnp.exp(-gate)) * x),
    "gelu": (
        Gate(np.zeros((3, 64)), "gelu_tanh"),
        lambda x, gate: gate / 2 * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * x,
    ),
}


@pytest.mark.parametrize("implementation", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("outs", [(24, 40), (24,)])
def test_prologues_and_residuals(implementation, name, outs):
    rng = np.random.default_rng(0)
    weights = [for_serving(additive(n, 64), "cpu") for n in outs]
    prologue, formula = PROLOGUES[name]
    x, residual = (jnp.asarray(rng.standard_normal((3, n)), jnp.float32) for n in (64, 24))
    prologue = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), prologue)

    def together(x, prologue, residual):
        given = residual if len(outs) == 1 else None
        return matmul_each(x, weights, implementation, prologue=prologue, residual=given)

    def apart(x, prologue, residual):
        given = residual if len(outs) == 1 else 0.0
        with jax.numpy_rank_promotion("allow"):
            y = formula(x, *jax.tree.leaves(prologue))
        return [y @ w.dequantize().T + given for w in weights]

    results, transposed = jax.vjp(together, x, prologue, residual)
    expected, expected_transposed = jax.vjp(apart, x, prologue, residual)
    for a, b in zip(
        jax.tree.leaves((results, transposed(results))),
        jax.tree.leaves((expected, expected_transposed(expected))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max(), rtol=1e-5)


@pytest.mark.parametrize(("outs", "shape"), [((24,), (2, 23)), ((24, 24), (2, 24))])
def test_a_residual_is_of_one_result(outs, shape):
    with pytest.raises(ValueError, match="residual: expected the result's shape"):
        matmul_each(jnp.ones((2, 32)), [additive(n) for n in outs], residual=jnp.ones(shape))


@pytest.mark.parametrize(
    "prologue", [RMSNorm(np.ones(31), 1.0), RMSNorm(np.ones((1, 32)), 1.0), Gate(np.ones(32), "silu")]
)
def test_a_prologue_fits_the_inputs(prologue):
    with pytest.raises(ValueError, match=r"prologue: expected (RMSNorm|Gate) with \(.*32,?\) for x \(2, 32\), got"):
        matmul_each(jnp.ones((2, 32)), [additive()], prologue=prologue)


def test_activations_are_known():
    with pytest.raises(ValueError, match=r"activation: expected one of .*'silu'.*, got 'relu'"):
        Gate(np.ones(3), "relu")


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_outliers_are_added_exactly_in_any_order(factor):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3, 500)) * 10.0 ** rng.uniform(-3, 0, (3, 500)) * factor).astype(np.float32)
    values[2] = 0
    rows, order = rng.integers(0, 7, 500), rng.permutation(500)
    sums = jax.jit(ops._row_sums, static_argnums=2)
    found = sums(jnp.asarray(values), jnp.asarray(rows), 8)
    np.testing.assert_array_equal(found, sums(jnp.asarray(values[:, order]), jnp.asarray(rows[order]), 8))
    expected = np.stack([values.astype(np.float64)[:, rows == row].sum(1) for row in range(8)], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(values).max())
    values[1, 4] = np.inf
    assert np.isnan(sums(jnp.asarray(values), jnp.asarray(rows), 8)[1]).all()
    assert sums(jnp.zeros((2, 0)), jnp.zeros(0, jnp.int32), 3).shape == (2, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_one_token_without_a_batch(fused):
    weight = for_serving(additive(24, 64), "cpu")
    x = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    given = {"prologue": Gate(jnp.ones(64), "silu"), "residual": jnp.ones(24)} if fused else {}
    (y,) = matmul_each(x, [weight], "cpu", **given)
    (expected,) = matmul_each(x, [weight], "reference", **given)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)

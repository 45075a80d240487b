"""CMPQ, tiles, outliers and outlier-aware QuantEase: exact budgets, monotone steps, formats."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import GPTQConfig, LayerProblem, bits_per_weight, gptq, objective, outliers, relative_error, tiles
from jaxquant.methods.cmpq import CMPQConfig, cmpq
from jaxquant.methods.quantease_outlier import OutlierQuantEaseConfig, quantease_outlier
from tests.conftest import make_problem

KEY = jax.random.key(0)
BUDGETS = (2.5, 3.5)


def problem(out=96, columns=160, **kwargs):
    weight, hessian = make_problem(out, columns, tokens=500, **kwargs)
    return LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))


@pytest.fixture(scope="module")
def layer():
    return problem()


@pytest.mark.parametrize("make", [lambda b: CMPQConfig(b, rounds=1), lambda b: CMPQConfig.paper(b, outliers=0.002)])
def test_the_budget_is_met_and_the_error_falls(layer, make):
    errors = []
    for budget in BUDGETS:
        tensor = cmpq(layer, make(budget), key=KEY)
        assert budget - 0.01 <= bits_per_weight(tensor) <= budget
        errors.append(float(relative_error(layer, tensor)))
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("config", [CMPQConfig(3.0, rounds=1), CMPQConfig.paper(3.0)])
def test_structure_follows_from_the_shape(layer, config):
    expected = jax.eval_shape(lambda p: cmpq(p, config, key=KEY), layer)
    tensor = cmpq(layer, config, key=KEY)
    assert jax.tree.structure(tensor) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(tensor)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]


def test_rounds_never_hurt(layer):
    configs = [CMPQConfig(2.5, rounds=r) for r in (0, 3)]
    errors = [float(objective(layer, cmpq(layer, c, key=KEY))) for c in configs]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


def test_uneven_bits_beat_even_ones_and_the_paper(layer):
    even = gptq(layer, GPTQConfig(3), key=KEY)
    bits = bits_per_weight(even)
    ours, paper = (
        float(relative_error(layer, cmpq(layer, c, key=KEY))) for c in (CMPQConfig(bits), CMPQConfig.paper(bits))
    )
    assert ours < float(relative_error(layer, even))
    assert ours < paper


def test_widths_follow_norms_in_the_paper_preset(layer):
    tensor = cmpq(layer, CMPQConfig.paper(3.2), key=KEY)
    wide, narrow = tensor.base.parts
    assert wide.codes.bits == narrow.codes.bits + 1
    norms = np.diag(layer.hessian)
    order = np.asarray(tensor.base.order.unpack()).astype(int)
    np.testing.assert_array_equal(order, np.argsort(-norms, kind="stable"))


@pytest.mark.parametrize("config", [CMPQConfig(0.2), CMPQConfig.paper(1.0)])
def test_too_small_a_budget_says_what_fits(layer, config):
    with pytest.raises(ValueError, match="average_bits: expected"):
        cmpq(layer, config, key=KEY)


@pytest.mark.parametrize("config", [CMPQConfig(3.0, rounds=1), CMPQConfig.paper(4.0), OutlierQuantEaseConfig(2)])
@pytest.mark.parametrize("case", ["dead", "singular", "zero rows", "odd"])
def test_degenerate_layers(case, config):
    weight, hessian = make_problem(33, 70, rank=8 if case == "singular" else None)
    if case == "dead":
        hessian[:5], hessian[:, :5] = 0, 0
    if case == "zero rows":
        weight[3:6] = 0
    layer = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    method = quantease_outlier if isinstance(config, OutlierQuantEaseConfig) else cmpq
    tensor = method(layer, config, key=KEY)
    assert np.isfinite(np.asarray(tensor.dequantize())).all()
    assert 0 <= float(relative_error(layer, tensor)) < 0.5


@pytest.mark.parametrize(
    "bad", [{"average_bits": 0}, {"outliers": 1.0}, {"row_classes": 0}, {"allocation": "x"}, {"damp": -1}]
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CMPQConfig(**bad)


def test_tiles_round_trip():
    rng = np.random.default_rng(0)
    out, n, classes = 10, 70, 3
    widths = rng.integers(0, 6, (classes, 3))
    row_class, column_tile = rng.permutation(tiles.class_of_row(out, classes)), rng.permutation(np.arange(n) // 32)
    codes = rng.integers(0, 2**16, (out, n)) % 2 ** widths[row_class][:, column_tile]
    sizes = np.asarray(tiles.class_sizes(out, classes))
    levels = rng.standard_normal(31).astype(np.float16)
    row, column = rng.uniform(1, 2, out).astype(np.float16), rng.uniform(1, 2, n).astype(np.float16)
    arrays = (jnp.asarray(x) for x in (codes.astype(np.uint8), widths.astype(np.int32), levels, row, column))
    where = (jnp.asarray(x.astype(np.int32)) for x in (row_class, column_tile))
    length = int((widths * sizes[:, None]).sum()) + 5
    tensor = tiles.tiled_tensor(*arrays, *where, length=length, widest=6)
    assert tensor.words.shape == (length,)
    table = np.asarray(tiles.level_table(tensor.levels, 6))
    expected = table[2 ** widths[row_class][:, column_tile] - 1 + codes] * (row[:, None].astype(np.float32) * column)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_largest_marks_exactly_so_many(count):
    values = np.abs(np.random.default_rng(0).standard_normal(60)).astype(np.float32)
    values[10:20] = values[5]  # ties
    marked = np.asarray(outliers.largest(jnp.asarray(values.reshape(6, 10)), count)).reshape(-1)
    assert marked.sum() == count
    assert values[marked].sum() == pytest.approx(np.sort(values)[60 - count :].sum(), rel=1e-6)


def test_largest_eigenvalue_is_just_above():
    _, hessian = make_problem()
    true = np.linalg.eigvalsh(hessian)[-1]
    assert true <= float(outliers.largest_eigenvalue(jnp.asarray(hessian, jnp.float32))) <= 1.011 * true


@pytest.mark.parametrize("structured", [False, True])
def test_a_threshold_step_never_raises_the_objective(structured):
    weight, hessian = make_problem()
    rng = np.random.default_rng(0)
    keep = (lambda x: outliers.keep_columns(x, 3)) if structured else (lambda x: outliers.keep_entries(x, 50))
    value = weight + 0.3 * rng.standard_normal(weight.shape)
    sparse, h = np.asarray(keep(jnp.asarray(weight - value, jnp.float32))), jnp.asarray(hessian, jnp.float32)
    top, last = outliers.largest_eigenvalue(h), np.inf
    for _ in range(10):
        residual = weight - value - sparse
        now = np.sum((residual @ hessian) * residual)
        assert now <= last * (1 + 1e-6)
        last = now
        sparse = outliers.threshold_step(
            jnp.asarray(sparse, jnp.float32), jnp.asarray(residual, jnp.float32), h, top, keep
        )
        sparse = np.asarray(sparse, np.float64)
        assert np.count_nonzero(np.any(sparse, axis=0)) <= 3 if structured else np.count_nonzero(sparse) <= 50


def test_fit_support_is_dense_least_squares():
    weight, hessian = make_problem(5, 20)
    support = np.random.default_rng(0).uniform(size=weight.shape) < 0.2
    arrays = [jnp.asarray(x, jnp.float32) for x in (np.zeros_like(weight), weight, hessian)]
    sparse = np.asarray(outliers.fit_support(*arrays, jnp.asarray(support)), np.float64)
    assert np.all(sparse[~support] == 0)
    for i in range(5):
        s = support[i]
        expected = np.linalg.solve(hessian[np.ix_(s, s)], (weight[i] @ hessian)[s])
        np.testing.assert_allclose(sparse[i, s], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structured", [False, True])
def test_outlier_aware_quantease_has_its_outliers_and_its_bits(layer, structured):
    config = OutlierQuantEaseConfig(2, outliers=0.05, structured=structured, iterations=6)
    tensor = quantease_outlier(layer, config, key=KEY)
    base = bits_per_weight(tensor.base)
    extra = 8 * (16 + 16 / 96) / 160 if structured else int(0.05 * 96 * 160) * 32 / (96 * 160) + 2 * 32 / (96 * 160)
    assert bits_per_weight(tensor) == pytest.approx(base + extra, rel=1e-6)
    more = [dataclasses.replace(config, iterations=i) for i in (2, 6)]
    errors = [float(objective(layer, quantease_outlier(layer, c, key=KEY))) for c in more]
    assert errors[1] <= errors[0]


def test_without_outliers_it_is_quantease_on_fixed_grids(layer):
    tensor = quantease_outlier(layer, OutlierQuantEaseConfig(3, outliers=0.0, iterations=4), key=KEY)
    assert tensor.values.shape == (0,)
    np.testing.assert_allclose(tensor.dequantize(), tensor.base.dequantize(), atol=0)

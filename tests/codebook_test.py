"""Scalar tables: Gaussian levels, k-means and least squares against float64 references."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import codebook
from tests.conftest import make_problem


@pytest.mark.parametrize(("size", "error"), [(1, 1.0), (2, 1 - 2 / np.pi), (4, 0.11748), (8, 0.03454), (16, 0.009497)])
def test_gaussian_levels_are_those_of_max(size, error):
    # J. Max, Quantizing for minimum distortion, 1960, table I (four digits); 2 levels are +-sqrt(2 / pi) exactly.
    levels, found = codebook.gaussian_levels(size)
    assert found == pytest.approx(error, rel=1e-3)
    np.testing.assert_allclose(levels, -np.asarray(levels)[::-1], atol=1e-6)
    assert np.all(np.diff(levels) > 0) or size == 1


def test_nearest_equals_argmin_and_never_takes_infinity():
    rng = np.random.default_rng(0)
    levels = np.sort(rng.standard_normal((6, 5)), axis=1)
    levels[:, 3:] = np.inf
    value = 3 * rng.standard_normal(6)
    expected = np.argmin(np.abs(value[:, None] - levels), axis=1)
    np.testing.assert_array_equal(
        codebook.nearest(jnp.asarray(value, jnp.float32), jnp.asarray(levels, jnp.float32)), expected
    )


def lloyd(points, importance, levels, iterations):
    """Weighted Lloyd iterations of one row, float64."""
    for _ in range(iterations):
        codes = np.argmin(np.abs(points[:, None] - levels), axis=1)
        for k in range(len(levels)):
            if importance[codes == k].sum() > 0:
                levels[k] = np.average(points[codes == k], weights=importance[codes == k])
    return levels


@pytest.mark.parametrize("size", [2, 4, 8])
def test_k_means_of_rows(size):
    rng = np.random.default_rng(1)
    points, importance = rng.standard_normal((5, 60)), rng.uniform(0.1, 2, 60)
    found = codebook.fit_rows(jnp.asarray(points, jnp.float32), jnp.asarray(importance, jnp.float32), size, 10)
    start = np.asarray(codebook.gaussian_levels(size)[0])
    for row, levels in zip(points, np.asarray(found), strict=True):
        mean = np.average(row, weights=importance)
        deviation = np.sqrt(np.average((row - mean) ** 2, weights=importance))
        np.testing.assert_allclose(levels, lloyd(row, importance, mean + deviation * start, 10), rtol=1e-3, atol=1e-4)


def test_k_means_of_a_constant_row_and_of_no_weight():
    points = jnp.ones((2, 8))
    importance = jnp.asarray([[1.0] * 8, [0.0] * 8])
    levels = np.asarray(codebook.fit_rows(points, importance, 4))
    assert np.isfinite(levels).all()
    assert np.abs(levels[0] - 1).min() < 1e-6


def test_sum_by_code():
    rng = np.random.default_rng(2)
    values, codes = rng.standard_normal((3, 20)), rng.integers(0, 4, (3, 20))
    expected = [[row[code == k].sum() for k in range(4)] for row, code in zip(values, codes, strict=True)]
    found = codebook.sum_by_code(jnp.asarray(values, jnp.float32), jnp.asarray(codes, jnp.int32), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_solve_rows_is_dense_least_squares():
    weight, hessian = make_problem(6, 24)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, weight.shape)  # level 3 is never used
    levels = rng.standard_normal((6, 4))
    value = np.take_along_axis(levels, codes, axis=1)
    change = codebook.solve_rows(
        jnp.asarray(weight - value, jnp.float32), jnp.asarray(codes, jnp.int32), jnp.asarray(hessian, jnp.float32), 4
    )
    change = np.asarray(change, np.float64)
    assert np.all(change[:, 3] == 0)
    root = np.linalg.cholesky(hessian + 1e-12 * np.eye(24))
    for i in range(6):
        design = root.T @ np.eye(4)[codes[i]][:, :3]
        expected = np.linalg.lstsq(design, root.T @ weight[i], rcond=None)[0]
        best = np.sum((design @ expected - root.T @ weight[i]) ** 2)
        ours = np.sum((design @ (levels + change)[i, :3] - root.T @ weight[i]) ** 2)
        assert ours <= best * (1 + 1e-3)


def test_solve_shared_is_dense_least_squares():
    weight, hessian = make_problem(6, 24)
    rng = np.random.default_rng(4)
    index, scale = rng.integers(0, 6, weight.shape), rng.uniform(0.5, 2, weight.shape)
    index[0, :3] = 9  # beyond the table: not moved
    residual = rng.standard_normal(weight.shape)
    arrays = (jnp.asarray(residual, jnp.float32), jnp.asarray(index, jnp.int32), jnp.asarray(scale, jnp.float32))
    change = codebook.solve_shared(*arrays, jnp.asarray(hessian, jnp.float32), 6, 50)
    root = np.linalg.cholesky(hessian)
    design = np.stack([(scale * (index == k)) @ root for k in range(6)], axis=-1).reshape(-1, 6)
    expected = np.linalg.lstsq(design, (residual @ root).reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(change, expected, rtol=2e-3, atol=1e-4)

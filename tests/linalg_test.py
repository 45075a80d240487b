"""Factors of the Hessian against float64, and what error feedback with them guarantees (METHODS, row 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import grid, linalg, sweep
from tests.conftest import make_problem
from tests.reference import scalar

N = 20
WEIGHT, HESSIAN = make_problem(out=6, columns=N)
upper_factor = jax.jit(linalg.upper_factor)
inverse_factor = jax.jit(linalg.inverse_factor)


def damped(hessian, damp):
    return hessian + damp * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_factors(damp):
    factor, used = upper_factor(f32(HESSIAN), damp)
    factor = np.asarray(factor, np.float64)
    expected = damped(HESSIAN, damp)
    assert float(used) == np.float32(damp)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-5 * np.abs(expected).max())
    inverse = np.asarray(inverse_factor(f32(HESSIAN), damp), np.float64)
    np.testing.assert_array_equal(inverse, np.triu(inverse))
    np.testing.assert_allclose(inverse.T @ inverse @ expected, np.eye(N), atol=1e-3)


def test_the_diagonal_is_the_conditional_variance():
    """R_jj^2 is the Schur complement: the variance of input j given the inputs after it."""
    factor, _ = upper_factor(f32(HESSIAN), 0.01)
    h = damped(HESSIAN, 0.01)
    variance = [
        h[j, j] - h[j, j + 1 :] @ np.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j]) if j < N - 1 else h[j, j]
        for j in range(N)
    ]
    np.testing.assert_allclose(np.diag(factor) ** 2, variance, rtol=1e-3)
    np.testing.assert_allclose(1 / np.diag(inverse_factor(f32(HESSIAN), 0.01)) ** 2, variance, rtol=1e-3)


def with_eigenvalue(value):
    """A symmetric matrix of mean diagonal about 1, one eigenvalue of which is `value`."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    values = np.linspace(0.5, 1.5, N)
    values[3] = value
    return (basis * values) @ basis.T


@pytest.mark.parametrize(
    ("hessian", "damp", "expected"),
    [
        (with_eigenvalue(0.2), 0.0, 0.0),
        (with_eigenvalue(-1e-4), 0.01, 0.01),
        (with_eigenvalue(-0.05), 0.01, 0.1),
        (with_eigenvalue(-0.5), 0.01, 1.0),
        (with_eigenvalue(-3e-4), 0.0, 1e-3),
    ],
)
def test_damping_is_raised_until_the_factor_exists(hessian, damp, expected):
    factor, used = upper_factor(f32(hessian), damp)
    assert float(used) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(factor).all()
    np.testing.assert_allclose(factor @ factor.T, damped(hessian, float(used)), atol=1e-5)


def test_nan_ends_the_search():
    hessian = with_eigenvalue(1.0)
    hessian[2, 2] = np.nan
    factor, used = upper_factor(f32(hessian), 0.01)
    assert np.isnan(factor).any()
    assert float(used) >= 1e3


GRIDS = grid.fit(f32(WEIGHT), 3, 5, symmetric=False, search="minmax", importance=None, dtype="float32")
GROUP_OF = np.arange(N) // 5
rounding = sweep.grid_rounding(GRIDS, jnp.asarray(GROUP_OF))


@functools.partial(jax.jit, static_argnames="block_size")
@jax.default_matmul_precision("highest")
def feedback(block_size):
    """Codes, values and, in the place of codes, the targets that were rounded."""

    def targets(state, column, target):
        return target, rounding(state, column, target)[1]

    factor = linalg.inverse_factor(f32(HESSIAN), 0.01)
    codes, values, _ = sweep.error_feedback(f32(WEIGHT), factor, rounding, block_size=block_size)
    return codes, values, sweep.error_feedback(f32(WEIGHT), factor, targets, block_size=block_size)[0], factor


def test_3_feedback_spends_what_it_says():
    _, values, targets, factor = (np.asarray(x, np.float64) for x in feedback(8))
    error = (targets - values) / np.diag(factor)
    np.testing.assert_allclose(error @ factor, WEIGHT - values, atol=1e-4 * np.abs(WEIGHT).max())
    spent = scalar.objective(values - WEIGHT, damped(HESSIAN, 0.01))
    assert np.sum(error**2) == pytest.approx(spent, rel=1e-4)
    scale, zero = (np.asarray(x, np.float64)[:, GROUP_OF] for x in (GRIDS.scale, GRIDS.zero))
    np.testing.assert_allclose(values, scalar.quantize(targets, scale, zero, 3), atol=1e-5)


def test_3_blocks_do_not_matter():
    codes, values, _, _ = feedback(8)
    for block_size in (16, 128):
        np.testing.assert_array_equal(feedback(block_size)[0], codes)
        np.testing.assert_array_equal(feedback(block_size)[1], values)


def test_3_equals_ldlq():
    """H_d = M D M^T with M unit upper triangular: q_i = round(w_i + sum_k<i (w_k - q_k) M_ki)."""
    reverse = np.linalg.cholesky(damped(HESSIAN, 0.01)[::-1, ::-1])[::-1, ::-1]
    unit = reverse / np.diag(reverse)
    scale, zero = (np.asarray(x, np.float64)[:, GROUP_OF] for x in (GRIDS.scale, GRIDS.zero))
    values = np.zeros_like(WEIGHT)
    for i in range(N):
        target = WEIGHT[:, i] + (WEIGHT[:, :i] - values[:, :i]) @ unit[:i, i]
        values[:, i] = scalar.quantize(target, scale[:, i], zero[:, i], 3)
    np.testing.assert_allclose(feedback(8)[1], values, atol=1e-5)


def test_blocks_do_not_matter_to_descent():
    @functools.partial(jax.jit, static_argnames="block_size")
    @jax.default_matmul_precision("highest")
    def descend(block_size):
        return sweep.coordinate_descent(f32(WEIGHT), f32(WEIGHT), f32(HESSIAN), rounding, block_size=block_size)

    codes, values = descend(8)
    np.testing.assert_array_equal(descend(128)[0], codes)
    np.testing.assert_array_equal(descend(128)[1], values)
    rows = np.arange(len(WEIGHT))[:, None]
    scale, zero = (np.asarray(x)[rows, GROUP_OF] for x in (GRIDS.scale, GRIDS.zero))
    np.testing.assert_allclose(values, scale * (np.asarray(codes) - zero), atol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 13, 32, 70])
def test_factors_of_blocks(d):
    rng = np.random.default_rng(d)
    root = rng.standard_normal((3, 5, d, d)) / np.sqrt(d)
    blocks = root @ root.swapaxes(-1, -2) + 0.1 * np.eye(d)
    factor, inverse = jax.jit(linalg.cholesky_blocks)(f32(blocks))
    expected = np.linalg.cholesky(blocks)
    np.testing.assert_allclose(factor, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(inverse, np.linalg.inv(expected), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        linalg.inverse_of_blocks(f32(blocks)) @ blocks, np.broadcast_to(np.eye(d), blocks.shape), atol=3e-2
    )
    right = rng.standard_normal((3, 5, d))
    solution = np.asarray(linalg.solve_blocks(f32(blocks), f32(right)), np.float64)
    np.testing.assert_allclose(np.einsum("...ab,...b->...a", blocks, solution), right, atol=3e-2)
    upper = np.triu(rng.standard_normal((4, d, d))) / d + np.eye(d)
    np.testing.assert_allclose(linalg.inverse_of_upper_blocks(f32(upper)), np.linalg.inv(upper), rtol=1e-3, atol=1e-3)


def test_a_block_that_is_not_positive_definite_gives_nan():
    blocks = f32([[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    factor, _ = linalg.cholesky_blocks(blocks)
    assert np.isnan(factor[0]).any()
    np.testing.assert_array_equal(factor[1], np.eye(2))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import LayerProblem, RTNConfig, objective, relative_error, rtn
from jaxquant.problem import check, dead_columns, revive, row_objective
from tests.conftest import make_problem

WEIGHT, HESSIAN = make_problem(out=6, columns=12)
PROBLEM = LayerProblem(jnp.asarray(WEIGHT, jnp.float32), jnp.asarray(HESSIAN, jnp.float32))


def test_errors_are_those_of_the_outputs():
    """E[|(V - W) x|^2], summed over outputs, from the tokens themselves."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 50))
    value = WEIGHT + 0.1 * rng.standard_normal(WEIGHT.shape)
    hessian = jnp.asarray(x @ x.T / 50, jnp.float32)
    problem = LayerProblem(PROBLEM.weight, hessian)
    tested = jnp.asarray(value, jnp.float32)
    error, energy = (np.sum((m @ x) ** 2) / 50 for m in (value - WEIGHT, WEIGHT))
    assert float(objective(problem, tested)) == pytest.approx(error, rel=1e-5)
    assert float(relative_error(problem, tested)) == pytest.approx(error / energy, rel=1e-5)
    rows = np.sum(((value - WEIGHT) @ x) ** 2, axis=1) / 50
    np.testing.assert_allclose(row_objective(tested - problem.weight, hessian), rows, rtol=1e-4)


def test_tensors_and_arrays_measure_alike(key):
    tensor = rtn(PROBLEM, RTNConfig(3), key=key)
    assert float(objective(PROBLEM, tensor)) == pytest.approx(float(objective(PROBLEM, tensor.dequantize())), rel=1e-6)
    assert float(objective(PROBLEM, PROBLEM.weight)) == 0
    assert float(relative_error(PROBLEM, jnp.zeros_like(PROBLEM.weight))) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_dead_columns_are_made_harmless(scale):
    hessian = scale * HESSIAN
    hessian[[2, 5]] = hessian[:, [2, 5]] = 0
    hessian[2, 7] = hessian[7, 2] = 1e-3 * scale  # float rounding may leave traces of coupling
    problem = LayerProblem(PROBLEM.weight, jnp.asarray(hessian, jnp.float32))
    live = np.setdiff1d(np.arange(12), [2, 5])
    np.testing.assert_array_equal(dead_columns(problem.hessian), ~np.isin(np.arange(12), live))
    revived = jax.jit(revive)(problem)
    np.testing.assert_array_equal(revived.weight[:, live], problem.weight[:, live])
    assert not np.asarray(revived.weight)[:, [2, 5]].any()
    both = np.ix_(live, live)
    np.testing.assert_array_equal(np.asarray(revived.hessian)[both], hessian.astype(np.float32)[both])
    dead = np.asarray(revived.hessian)[[2, 5]]
    mean = np.diag(hessian)[live].mean()
    np.testing.assert_allclose(dead, mean * np.eye(12)[[2, 5]], rtol=1e-6)
    assert np.diag(revived.hessian).mean() == pytest.approx(mean, rel=1e-6)  # damping is relative to it


def test_all_columns_dead():
    revived = revive(LayerProblem(PROBLEM.weight, jnp.zeros((12, 12), jnp.float32)))
    np.testing.assert_array_equal(revived.hessian, np.eye(12))
    assert not np.asarray(revived.weight).any()


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        ((4, 8), (4, 4), r"expected weight \[out, in\] and hessian \[in, in\], got \(4, 8\) and \(4, 4\)"),
        ((4, 8), (8,), "expected weight"),
        ((2, 4, 8), (8, 8), "expected weight"),
    ],
)
def test_shapes_are_checked(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        check(LayerProblem(jnp.zeros(weight), jnp.zeros(hessian)))


def test_dtypes_are_checked_without_values():
    shapes = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="expected float32 weight and hessian, got float32 and bfloat16; cast"):
        check(LayerProblem(*shapes))

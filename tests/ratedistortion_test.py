"""The rate-distortion bound against a float64 water-filling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import LayerProblem, RTNConfig, bits_per_weight, rtn
from jaxquant.ratedistortion import excess_bits, rate_at_error, rate_distortion_bound
from tests.conftest import make_problem


def bound(weight, hessian, rate):
    """Water-filling over the eigenvalues, float64."""
    eigenvalues = np.linalg.eigvalsh(hessian)
    low, high = 0.0, eigenvalues.max()
    for _ in range(200):
        level = (low + high) / 2
        above = eigenvalues > level
        used = np.sum(np.log2(eigenvalues[above] / level) / 2) / len(eigenvalues)
        low, high = (level, high) if used > rate else (low, level)
    return np.minimum(level, eigenvalues).sum() * np.sum(weight**2) / len(hessian) / np.sum((weight @ hessian) * weight)


def problem(weight, hessian):
    return LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 2.0, 3.5])
def test_bound_matches_water_filling(rate):
    weight, hessian = make_problem()
    assert float(rate_distortion_bound(problem(weight, hessian), rate)) == pytest.approx(
        bound(weight, hessian, rate), rel=1e-3
    )


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0, 3.5])
def test_rate_inverts_the_bound(rate):
    layer = problem(*make_problem(seed=1))
    assert float(rate_at_error(layer, rate_distortion_bound(layer, rate))) == pytest.approx(rate, abs=1e-3)


def test_white_inputs_lose_six_decibels_a_bit():
    layer = problem(np.random.default_rng(0).standard_normal((4, 16)), 3 * np.eye(16))
    for rate in (0, 1, 2):
        assert float(rate_distortion_bound(layer, float(rate))) == pytest.approx(4.0**-rate, rel=1e-4)


def test_excess_is_bits_minus_rate():
    layer = problem(*make_problem())
    tensor = rtn(layer, RTNConfig(4), key=jax.random.key(0))
    excess = float(excess_bits(layer, tensor))
    assert 0.2 < excess < bits_per_weight(tensor)


def test_singular_hessian_is_finite():
    layer = problem(*make_problem(rank=6))
    assert np.isfinite(float(rate_distortion_bound(layer, 2.0)))

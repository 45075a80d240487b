"""Allocation against exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.allocate import allocate

BITS = np.array([0.0, 1.0, 2.0, 3.0])


def ours(cost, sizes, bits, budget):
    arrays = (jnp.asarray(x, jnp.float32) for x in (cost, sizes, bits))
    return np.asarray(allocate(*arrays, float(budget)))


def exhaustive(cost, sizes, bits, budget):
    """The least cost of all allocations that fit."""
    n = len(cost)
    fitting = (c for c in itertools.product(range(len(bits)), repeat=n) if sizes @ bits[list(c)] <= budget)
    return min(cost[np.arange(n), list(c)].sum() for c in fitting)


@pytest.mark.parametrize("seed", range(8))
def test_equals_exhaustive_search_on_the_hull(seed):
    # Equal sizes and convex costs: greedy steps are optimal for every budget.
    rng = np.random.default_rng(seed)
    cost = rng.lognormal(size=(5, 1)) * 4.0**-BITS
    sizes = np.full(5, 2.0)
    for budget in range(0, 32, 2):
        choice = ours(cost, sizes, BITS, budget)
        assert sizes @ BITS[choice] <= budget
        assert cost[np.arange(5), choice].sum() == pytest.approx(exhaustive(cost, sizes, BITS, budget), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_is_within_a_step_of_exhaustive_search_for_any_costs(seed):
    rng = np.random.default_rng(seed)
    cost = rng.uniform(size=(5, 4))
    cost[rng.uniform(size=cost.shape) < 0.1] = np.inf
    cost[:, 0] = 2
    sizes, budget = rng.integers(1, 4, 5).astype(float), 12
    choice = ours(cost, sizes, BITS, budget)
    assert sizes @ BITS[choice] <= budget
    assert cost[np.arange(5), choice].sum() <= exhaustive(cost, sizes, BITS, budget) + 1


def test_cost_falls_with_the_budget_and_uniform_units_stay_uniform():
    cost = np.ones((6, 1)) * 4.0**-BITS
    costs = [cost[np.arange(6), ours(cost, np.ones(6), BITS, b)].sum() for b in range(19)]
    assert np.all(np.diff(costs) < 0)
    np.testing.assert_array_equal(ours(cost, np.ones(6), BITS, 12), np.full(6, 2))


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (-5, 0), (100, 3)])
def test_budgets_beyond_the_options(budget, expected):
    cost = np.ones((3, 1)) * 4.0**-BITS
    np.testing.assert_array_equal(ours(cost, np.ones(3), BITS, budget), np.full(3, expected))


def test_scale_of_costs_does_not_matter():
    cost = np.random.default_rng(0).lognormal(sigma=3, size=(40, 1)) * 4.0**-BITS
    for scale in (1e-20, 1e-6, 1e6, 1e15):
        np.testing.assert_array_equal(ours(cost * scale, np.ones(40), BITS, 60), ours(cost, np.ones(40), BITS, 60))


def test_works_under_vmap():
    cost = jnp.asarray(np.random.default_rng(0).lognormal(size=(2, 5, 1)) * 4.0**-BITS, jnp.float32)
    call = lambda c: allocate(c, jnp.ones(5), jnp.asarray(BITS, jnp.float32), 7.0)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(call)(cost), jnp.stack([call(c) for c in cost]))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="expected cost"):
        allocate(jnp.ones((3, 4)), jnp.ones(4), jnp.ones(4), 1.0)

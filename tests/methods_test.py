"""RTN, GPTQ and QuantEase against float64 loops, and invariants of METHODS: numbers of its section 9 in the names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    GPTQConfig,
    LayerProblem,
    QuantEaseConfig,
    RTNConfig,
    gptq,
    grid,
    quantease,
    relative_error,
    rtn,
    sweep,
)
from jaxquant.methods.quantease import _refit_scales
from jaxquant.tensors import dense
from tests.conftest import make_problem
from tests.reference import scalar

KEY = jax.random.key(0)
dequantize = jax.jit(dense)


def solve(method, weight, hessian, config, **kwargs):
    problem = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    return np.asarray(dequantize(method(problem, config, key=KEY, **kwargs)), np.float64)


def agree(ours, reference, hessian, weight, fraction=0.999):
    """Codes agree but for ties that float32 rounds the other way; such a flip moves all later columns of its row."""
    rows = np.mean(np.all(np.abs(ours - reference) < 1e-5, axis=1))
    assert rows >= 0.9, rows
    ours, reference = (scalar.objective(x - weight, hessian) for x in (ours, reference))
    assert abs(ours / reference - 1) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(None, False), (16, False), (16, True)])
def test_rtn_is_the_nearest_grid_point(bits, group, symmetric):
    weight, hessian = make_problem()
    config = RTNConfig(bits, group_size=group, symmetric=symmetric, search="minmax")
    # float32 like the library, so that ties round alike
    expected = scalar.rtn(weight.astype(np.float32), bits, group or weight.shape[1], symmetric)
    np.testing.assert_allclose(solve(rtn, weight, hessian, config), expected, atol=1e-6)


@pytest.mark.parametrize(("order", "group"), [("natural", 16), ("diagonal", 16), ("diagonal", None)])
def test_gptq_matches_the_loop(order, group):
    weight, hessian = make_problem()
    columns = np.argsort(-np.diag(hessian), kind="stable") if order == "diagonal" else np.arange(len(hessian))
    config = GPTQConfig(3, group_size=group, search="minmax", order=order)
    expected = scalar.gptq(weight, hessian, 3, group or len(hessian), damp=0.01, order=list(columns))
    agree(solve(gptq, weight, hessian, config), expected, hessian, weight)


@pytest.mark.parametrize("group", [8, 24])
def test_gptq_running_grids_see_compensated_weights(group):
    weight, hessian = make_problem()
    config = GPTQConfig(3, group_size=group, search="minmax", order="natural", grids="running")
    expected = scalar.gptq(weight, hessian, 3, group, damp=0.01, order=list(range(len(hessian))), running=True)
    agree(solve(gptq, weight, hessian, config), expected, hessian, weight)


@pytest.mark.parametrize("relax", [False, True])
def test_quantease_matches_the_loop(relax):
    weight, hessian = make_problem(out=16, columns=24)
    config = QuantEaseConfig(
        3, iterations=8, search="minmax", start="weight", order="natural", relax=relax, refit=False
    )
    agree(solve(quantease, weight, hessian, config), scalar.quantease(weight, hessian, 3, 8, relax), hessian, weight)


def test_2_and_4_without_correlation_feedback_is_rounding():
    weight, hessian = make_problem()
    for h in (np.eye(len(hessian)) * 7, np.diag(np.diag(hessian))):
        for order in ("natural", "diagonal"):
            ours = solve(gptq, weight, h, GPTQConfig(3, search="minmax", order=order))
            np.testing.assert_allclose(ours, solve(rtn, weight, h, RTNConfig(3, search="minmax")), atol=1e-6)


def test_4_order_follows_the_inputs():
    weight, hessian = make_problem()
    shuffle = np.random.default_rng(1).permutation(len(hessian))
    config = GPTQConfig(3, search="minmax")
    ours = solve(gptq, weight, hessian, config)[:, shuffle]
    agree(solve(gptq, weight[:, shuffle], hessian[np.ix_(shuffle, shuffle)], config), ours, hessian, weight)


def test_5_feedback_beats_rounding():
    wins = 0
    for seed in range(20):
        weight, hessian = make_problem(seed=seed)
        error = [
            scalar.objective(solve(m, weight, hessian, c) - weight, hessian)
            for m, c in ((rtn, RTNConfig(3)), (gptq, GPTQConfig(3)), (quantease, QuantEaseConfig(3, iterations=6)))
        ]
        wins += error[1] < error[0] and error[2] < error[1]
    assert wins >= 19


@pytest.mark.parametrize("group", [48, 16])
def test_6_neither_sweeps_nor_refits_raise_the_objective(group):
    weight, hessian = (jnp.asarray(x, jnp.float32) for x in make_problem(seed=3))
    group_of = jnp.arange(48) // group
    grids = grid.fit(weight, 2, group, symmetric=False, search="minmax", importance=None, dtype="float32")

    @jax.jit
    @jax.default_matmul_precision("highest")
    def step(value, scale):
        rounding = sweep.grid_rounding(dataclasses.replace(grids, scale=scale), group_of)
        codes, value = sweep.coordinate_descent(weight, value, hessian, rounding)
        scale = _refit_scales(weight, value, hessian, scale, group_of)
        refitted = scale[:, group_of] * (codes.astype(jnp.float32) - grids.zero[:, group_of])
        return value, refitted, scale

    _, _, scale = step(weight, grids.scale)
    value, last = step(weight, scale)[0], np.inf
    for _ in range(6):
        swept, value, scale = step(value, scale)
        for v in (swept, value):
            now = scalar.objective(np.asarray(v, np.float64) - np.asarray(weight), np.asarray(hessian))
            assert now <= last * (1 + 1e-5)
            last = now


SMALL = QuantEaseConfig(2, search="minmax", iterations=60, relax=False, refit=False)


def test_7_no_single_change_helps_at_convergence():
    weight, hessian = make_problem(out=4, columns=6)
    value = solve(quantease, weight, hessian, SMALL, init=jnp.asarray(weight, jnp.float32))
    best = scalar.objective(value - weight, hessian)
    scale, zero = scalar.grids(weight.astype(np.float32), 2, 6)
    for i, j in np.ndindex(value.shape):
        for code in range(4):
            other = value.copy()
            other[i, j] = scale[i, j] * (code - zero[i, j])
            assert scalar.objective(other - weight, hessian) >= best * (1 - 1e-5)


def test_brute_force_on_a_tiny_problem():
    """Descent from several starts finds the optimum over all 4^6 codes of each row, and never less."""
    weight, hessian = make_problem(out=4, columns=6)
    scale, zero = scalar.grids(weight.astype(np.float32), 2, 6)
    codes = np.stack(np.meshgrid(*[np.arange(4)] * 6), -1).reshape(-1, 1, 6)
    values = scale * (codes - zero)
    best = np.einsum("koi,ij,koj->ko", values - weight, hessian, values - weight).min(0)
    found = np.full(4, np.inf)
    for start in (weight, *values[::97]):
        error = solve(quantease, weight, hessian, SMALL, init=jnp.asarray(start, jnp.float32)) - weight
        found = np.minimum(found, np.sum((error @ hessian) * error, axis=1))
    np.testing.assert_allclose(found, best, rtol=1e-4)


def test_7_descent_improves_on_any_start():
    weight, hessian = make_problem(seed=5)
    config = QuantEaseConfig(3, search="minmax", refit=False, relax=False, iterations=3)
    problem = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    for method, start in ((rtn, RTNConfig(3, search="minmax")), (gptq, GPTQConfig(3, search="minmax"))):
        init = method(problem, start, key=KEY)
        ours = quantease(problem, config, key=KEY, init=init)
        assert float(relative_error(problem, ours)) <= float(relative_error(problem, init))
        again = quantease(problem, config, key=KEY, init=dense(init))
        np.testing.assert_array_equal(ours.dequantize(), again.dequantize())


# Less than the 8 columns that are unrolled, and two columns more than a block.
@pytest.mark.parametrize("columns", [5, 130])
def test_widths_that_do_not_divide_the_block(columns):
    weight, hessian = make_problem(out=6, columns=columns, tokens=400)
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    ours = solve(gptq, weight, hessian, GPTQConfig(4, search="minmax"))
    agree(ours, scalar.gptq(weight, hessian, 4, columns, damp=0.01, order=order), hessian, weight)
    if columns > 128:
        config = QuantEaseConfig(4, search="minmax", iterations=3, start="weight", order="natural", refit=False)
        agree(solve(quantease, weight, hessian, config), scalar.quantease(weight, hessian, 4, 3), hessian, weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: RTNConfig(0), "bits: expected an integer from 1 to 8, got 0"),
        (lambda: GPTQConfig(3, order="random"), "order: expected one of 'natural', 'diagonal', got 'random'"),
        (lambda: GPTQConfig(3, grids="running"), 'expected order "natural"'),
        (lambda: GPTQConfig(3, damp=-1), "damp: expected a number >= 0"),
        (lambda: QuantEaseConfig(3, iterations=0), "iterations: expected an integer >= 1"),
        (lambda: QuantEaseConfig(3, start="zero"), "start: expected one of"),
        (lambda: RTNConfig(3, search="best"), "search: expected one of"),
        (lambda: RTNConfig(3, group_size=-4), "group_size: expected a positive integer or None"),
        (lambda: RTNConfig(3, storage_dtype="int8"), "storage_dtype: expected one of"),
    ],
)
def test_settings_are_checked(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_problems_are_checked():
    weight, hessian = (jnp.asarray(x, jnp.float32) for x in make_problem())
    with pytest.raises(ValueError, match=r"expected a divisor of the 48 input columns, got 32; use 16, 24"):
        rtn(LayerProblem(weight, hessian), RTNConfig(3, group_size=32), key=KEY)
    with pytest.raises(ValueError, match=r"expected weight \[out, in\] and hessian \[in, in\]"):
        gptq(LayerProblem(weight, hessian[:5]), GPTQConfig(3), key=KEY)
    with pytest.raises(ValueError, match="expected float32"):
        rtn(LayerProblem(weight.astype(jnp.bfloat16), hessian), RTNConfig(3), key=KEY)

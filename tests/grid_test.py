"""Uniform grids: row 1 of the invariants of METHODS, and the searches for a range."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant import grid

ROWS, COLUMNS = 4, 12
SETTINGS = [(2, False), (3, True), (4, False)]
weights = hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
positive = hnp.arrays(np.float32, (1, COLUMNS), elements=st.floats(2**-10, 1000, width=32))
kinds = pytest.mark.parametrize(("bits", "symmetric"), SETTINGS)
some = settings(max_examples=30, deadline=None)

fit_group = jax.jit(grid.fit_group, static_argnames=("bits", "symmetric", "search", "dtype"))


@functools.partial(jax.jit, static_argnames="bits")
def rounded(weight, scale, zero, bits):
    scale, zero = scale[:, None], zero[:, None]
    return scale * (grid.encode(weight, scale, zero, bits) - zero)


def quantize(weight, scale, zero, bits):
    return np.asarray(rounded(weight, scale, zero, bits), np.float64)


@kinds
@some
@given(weight=weights)
def test_1_rounding(bits, symmetric, weight):
    scale, zero = fit_group(weight, bits, symmetric=symmetric)
    scale64, zero64 = np.asarray(scale, np.float64)[:, None], np.asarray(zero, np.float64)[:, None]
    once = quantize(weight, scale, zero, bits)
    np.testing.assert_array_equal(quantize(once.astype(np.float32), scale, zero, bits), once)
    order = np.argsort(weight, axis=1)
    assert (np.diff(np.take_along_axis(once, order, axis=1), axis=1) >= 0).all()
    low, high = -scale64 * zero64, scale64 * (2**bits - 1 - zero64)
    inside = (weight >= low) & (weight <= high)
    assert (np.abs(once - weight) <= scale64 / 2 * (1 + 1e-5))[inside].all()
    np.testing.assert_array_equal(np.where(weight > high, high, low)[~inside], once[~inside])


@kinds
@some
@given(weight=weights)
def test_1_grids_can_be_stored(bits, symmetric, weight):
    scale, zero = (np.asarray(x) for x in fit_group(weight, bits, symmetric=symmetric))
    assert (scale > 0).all()
    np.testing.assert_array_equal(scale.astype(np.float16), scale)
    np.testing.assert_array_equal(zero, np.clip(np.round(zero), 0, 2**bits - 1))  # so zero is on the grid
    assert not quantize(np.zeros_like(weight), scale, zero, bits).any()
    if symmetric:
        assert (zero == 2 ** (bits - 1)).all()


def test_1_wide_grids_reproduce_the_weights():
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    scale, zero = fit_group(weight, 16, dtype="float32")
    np.testing.assert_allclose(quantize(weight, scale, zero, 16), weight, atol=1e-3 * np.abs(weight).max())


def cost(weight, scale, zero, bits, search, importance):
    error = np.abs(quantize(weight, scale, zero, bits) - weight)
    return np.sum(error**2.4 if search == "mse" else importance.astype(np.float64) * error**2, axis=1)


@kinds
@some
@given(weight=weights, importance=positive)
def test_searches_do_no_worse_than_minmax_in_their_own_norm(bits, symmetric, weight, importance):
    first = fit_group(weight, bits, symmetric=symmetric)
    mse = fit_group(weight, bits, symmetric=symmetric, search="mse")
    hessian = fit_group(weight, bits, symmetric=symmetric, search="hessian", importance=importance)
    for name, found, others in (("mse", mse, [first]), ("hessian", hessian, [first, mse])):
        ours = cost(weight, *found, bits, name, importance)
        for other in others:  # both searches try the same ranges, so each wins by its own measure
            assert (ours <= cost(weight, *other, bits, name, importance) * (1 + 1e-4) + 1e-12).all()


def test_a_search_cuts_off_an_outlier():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight[:, 0] = 6
    importance = np.ones((1, COLUMNS), np.float32)
    importance[0, 0] = 1e-3
    scales = [np.asarray(fit_group(weight, 2, search=s, importance=importance)[0]) for s in ("minmax", "hessian")]
    assert (scales[1] < 0.8 * scales[0]).all()


def test_groups_are_runs_of_columns():
    weight = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    importance = np.arange(1.0, 1 + COLUMNS, dtype=np.float32)
    args = {"symmetric": False, "search": "hessian", "dtype": "float16"}
    whole = grid.fit(weight, 3, 4, importance=importance, **args)
    assert whole.scale.shape == whole.zero.shape == (ROWS, 3)
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        scale, zero = grid.fit_group(weight[:, part], 3, importance=importance[None, part], **args)
        np.testing.assert_array_equal(whole.scale[:, g], scale)
        np.testing.assert_array_equal(whole.zero[:, g], zero)


@kinds
def test_tensors_hold_the_grid(bits, symmetric):
    weight = np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    grids = grid.fit(weight, bits, 4, symmetric=symmetric, search="minmax", importance=None, dtype="float16")
    codes = np.random.default_rng(3).integers(0, 2**bits, weight.shape)
    tensor = grid.tensor(jnp.asarray(codes), grids, "float16")
    scale, zero = (np.repeat(np.asarray(x), 4, axis=1) for x in (grids.scale, grids.zero))
    np.testing.assert_array_equal(tensor.dequantize(), scale * (codes - zero))
    assert (tensor.zero is None) == symmetric
    assert (tensor.bits, tensor.group_size, tensor.shape) == (bits, 4, (ROWS, COLUMNS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_stay_positive_and_finite(dtype):
    scales = grid.stored_scale(jnp.asarray([1e-30, 1e-3, 1.0, 1e30], jnp.float32), dtype)
    assert (np.isfinite(scales) & (np.asarray(scales) > 0)).all()
    assert float(scales[1]) == pytest.approx(1e-3, rel=1e-2)
    np.testing.assert_array_equal(scales.astype(dtype).astype(jnp.float32), scales)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match='search "hessian": expected an importance per weight, got None'):
        grid.fit_group(jnp.ones((2, 4)), 3, search="hessian")
    with pytest.raises(ValueError, match="expected a divisor of the 100 input columns, got 24; use 20, 25, 50"):
        grid.check_group_size(100, 24)
    with pytest.raises(ValueError, match="expected a divisor of the 7 input columns, got 4; use 7, or None"):
        grid.check_group_size(7, 4)
    grid.check_group_size(7, None)

"""LNQ: formats, invariants 18 and 19 of METHODS' section 9, and degenerate layers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import LayerProblem, QuantEaseConfig, bits_per_weight, objective, quantease, relative_error
from jaxquant.methods.lnq import LNQConfig, lnq
from tests.conftest import make_problem

KEY = jax.random.key(0)


def problem(*args, **kwargs):
    weight, hessian = make_problem(*args, **kwargs)
    return LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))


@pytest.mark.parametrize("bits", [1, 3])
def test_format_and_bits(bits):
    tensor = lnq(problem(), LNQConfig(bits), key=KEY)
    assert tensor.blocks == (24, 1)
    assert tensor.codes.bits == bits
    words = -(-48 * bits // 32) * 32
    assert bits_per_weight(tensor) == (words + 16 * 2**bits) / 48


def test_codes_are_coordinate_wise_minima():
    layer = problem()
    tensor = lnq(layer, LNQConfig(2, restarts=2, rounds=12, storage_dtype="float32"), key=KEY)
    weight, hessian = np.asarray(layer.weight, np.float64), np.asarray(layer.hessian, np.float64)
    codes, levels = np.asarray(tensor.codes.unpack())[0], np.asarray(tensor.codebooks, np.float64)
    value = np.take_along_axis(levels, codes.astype(int), axis=1)
    gradient = (weight - value) @ hessian
    # No single change of a code lowers the objective: every value is the level nearest to its own optimum; but for the
    # few rows whose sweeps had not settled.
    target = value + gradient / np.diag(hessian)
    nearest = np.abs(target[:, :, None] - levels[:, None, :]).min(-1)
    assert np.mean(np.abs(target - value) <= nearest + 1e-4) > 0.99


def test_more_rounds_never_hurt():
    layer = problem()
    configs = [LNQConfig(2, restarts=2, rounds=r) for r in (1, 4)]
    errors = [float(objective(layer, lnq(layer, c, key=KEY))) for c in configs]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


def test_beats_uniform_grids_and_the_authors_schedule():
    layer = problem(64, 96, tokens=400)
    error = {c: float(relative_error(layer, lnq(layer, c, key=KEY))) for c in (LNQConfig(3), LNQConfig.paper(3))}
    uniform = float(relative_error(layer, quantease(layer, QuantEaseConfig(3), key=KEY)))
    assert error[LNQConfig(3)] < error[LNQConfig.paper(3)] < uniform


def test_levels_for_every_weight_leave_no_error():
    layer = problem(4, 16)
    assert float(relative_error(layer, lnq(layer, LNQConfig(6), key=KEY))) < 1e-3


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_permuting_rows_permutes_the_result(order):
    layer, config = problem(), LNQConfig(2, rounds=2, order=order)
    rows = np.random.default_rng(0).permutation(24)
    permuted = lnq(dataclasses.replace(layer, weight=layer.weight[rows]), config, key=KEY).dequantize()
    np.testing.assert_allclose(permuted, lnq(layer, config, key=KEY).dequantize()[rows], atol=1e-6)


@pytest.mark.parametrize("case", ["dead", "singular", "zero rows", "one row", "constant"])
def test_degenerate_layers(case):
    weight, hessian = make_problem(rank=8 if case == "singular" else None)
    if case == "dead":
        hessian[:5], hessian[:, :5] = 0, 0
    if case == "zero rows":
        weight[3:6] = 0
    if case == "one row":
        weight = weight[:1]
    if case == "constant":
        weight[:] = 0.5
    layer = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    tensor = lnq(layer, LNQConfig(2), key=KEY)
    assert np.isfinite(np.asarray(tensor.dequantize())).all()
    assert 0 <= float(relative_error(layer, tensor)) < 0.5


@pytest.mark.parametrize("bad", [{"bits": 0}, {"bits": 9}, {"rounds": 0}, {"damp": -1}, {"order": "x"}, {"sweeps": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LNQConfig(**bad)

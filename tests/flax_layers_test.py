"""Flax layers over quantized weights: their floats train, their codes do not, and devices do not matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant import trees
from jaxquant.flax_layers import Codes, LinenQuantizedLinear, QuantizedLinear
from jaxquant.masters import masters, rounded, stored
from tests.contract_test import assert_same_bits
from tests.formats import FORMATS, IN

ROOT = Path(__file__).parents[1]
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, IN)), jnp.float32)


@pytest.mark.parametrize("name", ["additive", "column", "uniform"])
def test_nnx_layer(name):
    tensor = FORMATS[name]()
    layer = QuantizedLinear(tensor, rank=2, rngs=nnx.Rngs(0))
    expected = np.asarray(X) @ np.asarray(tensor.dequantize()).T
    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(layer.weight(), tensor)
    assert not any(trees.is_float(x) for x in jax.tree.leaves(nnx.state(layer, Codes)))
    graph, params, codes = nnx.split(layer, nnx.Param, Codes)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, codes)(X) ** 2)))(params)
    # at first the upper factor is zero, so that the lower one has no gradient yet
    assert jnp.any(gradient["up"].get_value() != 0)
    floats, rest = trees.partition(masters(tensor))
    dense = jax.grad(lambda w: jnp.sum((X @ w.T) ** 2))(tensor.dequantize())
    # the chain rule by hand, through the dense weight
    (by_hand,) = jax.vjp(lambda f: rounded(trees.combine(f, rest)).dequantize(), floats)[1](dense)
    for ours, wanted in zip(jax.tree.leaves(gradient["floats"]), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)


def test_linen_layer_is_the_nnx_layer():
    tensor = FORMATS["additive"]()
    layer = LinenQuantizedLinear(tensor, rank=2)
    variables = layer.init(jax.random.key(0), X)
    assert set(variables["params"]) == {"floats", "down", "up"}
    assert_same_bits(stored(trees.combine(variables["params"]["floats"], variables["codes"]["rest"])), tensor)
    ours = layer.apply(variables, X)
    np.testing.assert_allclose(ours, QuantizedLinear(tensor)(X), rtol=1e-5, atol=1e-5)
    other = {**variables["params"], "up": jnp.ones_like(variables["params"]["up"])}
    factors = np.asarray(other["up"]) @ np.asarray(other["down"])
    ours = layer.apply({**variables, "params": other}, X)
    np.testing.assert_allclose(
        ours, np.asarray(X) @ (np.asarray(tensor.dequantize()) + factors).T, rtol=1e-4, atol=1e-4
    )


def test_factors_need_a_key():
    with pytest.raises(ValueError, match=r"rngs: expected nnx.Rngs for factors of rank 2, got None"):
        QuantizedLinear(FORMATS["uniform"](), rank=2)


def test_the_example_trains_alike_on_one_device_and_on_four():
    command = [sys.executable, "-m", "experiments.flax_training"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert set(losses) == {"nnx on 1", "nnx on 4", "linen on 1", "linen on 4"}
    for name in ("nnx", "linen"):
        one, four = (np.asarray(losses[f"{name} on {n}"]) for n in (1, 4))
        np.testing.assert_allclose(one, four, rtol=1e-4)
        assert one[-1] < 0.5 * one[0]
    assert losses["nnx on 1"][0] == pytest.approx(losses["linen on 1"][0], rel=1e-5)


def test_the_core_does_not_need_flax():
    code = "import sys, jaxquant; sys.exit(any(m.split('.')[0] in ('flax', 'transformers') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

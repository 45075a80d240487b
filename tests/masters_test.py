"""Gradients through every tensor format, and masters: storing what was stored changes nothing, rounding is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxquant import grid, trees
from jaxquant.masters import Master, is_master, masters, rounded, stored
from tests.contract_test import assert_same_bits
from tests.formats import FORMATS, IN, OUT, in_float32

every = pytest.mark.parametrize("name", FORMATS)
WEIGHTS = jnp.asarray(np.random.default_rng(99).standard_normal((OUT, IN)), jnp.float32)


def test_partition_keeps_floats_apart_from_all_else():
    tree = {
        "a": jnp.ones(2, jnp.bfloat16),
        "b": [jnp.arange(3), None, jnp.ones((), jnp.float8_e4m3fn)],
        "c": jax.ShapeDtypeStruct((2,), jnp.float32),
        "d": "text",
    }
    floats, rest = trees.partition(tree)

    assert floats["b"][0] is None
    assert floats["d"] is None
    assert rest["a"] is None
    assert rest["c"] is None
    back = trees.combine(floats, rest)
    assert back["a"] is tree["a"]
    assert back["b"][0] is tree["b"][0]
    assert back["b"][1] is None
    assert back["d"] == "text"


@every
def test_gradients_of_all_floats_are_those_of_finite_differences(name):
    floats, rest = trees.partition(in_float32(FORMATS[name]()))
    assert jax.tree.leaves(floats)
    assert not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(floats))

    def loss(floats):
        return jnp.sum(WEIGHTS * trees.combine(floats, rest).dequantize()) / 10

    check_grads(jax.jit(loss), (floats,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(jax.grad(loss)(floats)))


@every
def test_storing_masters_of_what_is_stored_changes_nothing(name):
    tensor = FORMATS[name]()
    opened = masters(tensor)
    assert_same_bits(stored(opened), tensor)
    np.testing.assert_array_equal(rounded(opened).dequantize(), tensor.dequantize())
    assert all(x.value.dtype == jnp.float32 for x in jax.tree.leaves(opened, is_leaf=is_master) if is_master(x))


@every
def test_the_loss_sees_stored_numbers_and_masters_get_their_gradient(name):
    tensor = FORMATS[name]()
    floats, rest = trees.partition(masters(tensor))
    keys = np.random.default_rng(0)
    floats = jax.tree.map(lambda x: x + jnp.asarray(1e-2 * keys.standard_normal(x.shape), jnp.float32), floats)

    def weight(floats):
        return rounded(trees.combine(floats, rest)).dequantize()

    after = stored(trees.combine(floats, rest))
    np.testing.assert_array_equal(weight(floats), after.dequantize())
    assert after.storage_bits() == tensor.storage_bits()
    assert jax.tree.structure(after) == jax.tree.structure(tensor)

    # The gradient is that of the stored numbers, taken in float32.
    gradient = jax.grad(lambda f: jnp.sum(WEIGHTS * weight(f)))(floats)
    plain, fixed = trees.partition(in_float32(after))
    expected = jax.grad(lambda f: jnp.sum(WEIGHTS * trees.combine(f, fixed).dequantize()))(plain)
    ours = [m.value for m in jax.tree.leaves(trees.combine(gradient, rest), is_leaf=is_master) if is_master(m)]
    for a, b in zip(ours, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-5)


def test_codebooks_may_grow_beyond_their_range():
    books = grid.symmetric_tensor(jnp.asarray([[1.0, -0.5]]), jnp.full((1, 1), 1 / 127, jnp.float16), 8)
    master = Master(books.dequantize().at[0, 0].set(2.0), books.scale.astype(jnp.float32), "float16", 8)
    assert float(master.rounded()[0, 0]) == pytest.approx(2.0, rel=1e-3)
    shrunk = Master(books.dequantize() / 2, books.scale.astype(jnp.float32), "float16", 8)
    assert float(shrunk.store().scale[0, 0]) == float(books.scale[0, 0])


def test_what_exceeds_a_storage_dtype_is_its_largest_number():
    assert float(Master(jnp.asarray(1e6), None, "float16").rounded()) == 65504
    assert float(Master(jnp.asarray(1e6), None, "float8_e4m3fn").rounded()) == 448


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(1e-3), optax.adam(1e-3), optax.lion(1e-3)], ids=["sgd", "adam", "lion"]
)
def test_any_optax_transformation_trains_the_floats_alone(optimizer):
    tensor = FORMATS["column"]()
    target = tensor.dequantize() + 0.1 * WEIGHTS
    floats, rest = trees.partition(masters(tensor))

    def loss(floats):
        return jnp.mean((rounded(trees.combine(floats, rest)).dequantize() - target) ** 2)

    @jax.jit
    def step(floats, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(floats), state, floats)
            return optax.apply_updates(floats, updates), state

    first, state = float(loss(floats)), optimizer.init(floats)
    for _ in range(20):
        floats, state = step(floats, state)
    after = stored(trees.combine(floats, rest))
    assert float(jnp.mean((after.dequantize() - target) ** 2)) < first
    np.testing.assert_array_equal(after.base.codes.words, tensor.base.codes.words)
    np.testing.assert_array_equal(after.scale.codes.words, tensor.scale.codes.words)

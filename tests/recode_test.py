"""The V step against exhaustive search, and what invariant 17 of PV-tuning asks: few changes, none without a reason."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import pack
from jaxquant.masters import masters, rounded, stored
from jaxquant.projection import CodeConfig, project
from jaxquant.recode import begin_codes, recode_step
from tests.contract_test import assert_same_bits
from tests.formats import FORMATS, IN, OUT

every = pytest.mark.parametrize("name", FORMATS)
NOISE = jnp.asarray(np.random.default_rng(7).standard_normal((OUT, IN)), jnp.float32)
ALL = CodeConfig(share=1.0, beam=8)
FEW = CodeConfig(share=0.05)


@functools.partial(jax.jit, static_argnames="config")
def projected(tensor, target, config):
    return project(tensor, target, config)


def vectors(name, weight):
    """The parts of a weight that one code stands for, in the order of rows and columns: [vectors, size]."""
    if name == "path":  # a class of rows in one column
        return (
            np.asarray(weight)[np.asarray(FORMATS[name]().row_order())]
            .reshape(2, OUT // 2, IN)
            .swapaxes(1, 2)
            .reshape(-1, OUT // 2)
        )
    g, d = {"additive": (1, 4), "column": (1, 4), "blocks": (2, 2)}.get(name, (1, 1))
    if name == "column":  # vectors are of columns in the order of the base
        weight = np.asarray(weight)[:, np.asarray(FORMATS[name]().order.unpack())]
    grouped = np.asarray(weight).reshape(OUT // g, g, IN // d, d).swapaxes(1, 2)
    return grouped.reshape(-1, g * d)


@every
def test_17_a_target_that_is_met_changes_nothing(name):
    tensor = FORMATS[name]()
    assert_same_bits(projected(tensor, tensor.dequantize(), ALL), tensor)


@every
def test_17_codes_come_nearer_and_few_change(name):
    tensor = FORMATS[name]()
    before = tensor.dequantize()
    target = before + 0.8 * NOISE
    after = projected(tensor, target, FEW)
    assert jax.tree.structure(after) == jax.tree.structure(tensor)
    value, target = after.dequantize(), np.asarray(target)
    changed = np.any(vectors(name, value) != vectors(name, before), axis=1)
    parts = 2 if name == "concat" else 1
    assert 0 < changed.sum() <= parts * math.ceil(len(changed) * 0.05)
    scale = np.ones(1)
    if name == "column":  # distances are those in the scaled base
        scale = np.asarray(tensor.scale.dense())[np.argsort(np.asarray(tensor.order.unpack()))]
    old, new = (np.sum(vectors(name, (target - np.asarray(v)) / scale) ** 2, axis=1) for v in (before, value))
    assert np.all(new <= old * (1 + 1e-5))
    assert np.all(new[changed] < old[changed])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(tensor), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)


def test_the_largest_changes_come_first():
    tensor = FORMATS["rows"]()
    target = tensor.dequantize() + 0.8 * NOISE
    after = projected(tensor, target, CodeConfig(share=0.1)).dequantize()
    distance = np.abs(np.asarray(target - tensor.dequantize())).reshape(-1)
    farthest = set(np.argsort(-distance)[: math.ceil(0.1 * OUT * IN)].tolist())
    assert set(np.flatnonzero(np.asarray(after != tensor.dequantize())).tolist()) <= farthest


def test_additive_codes_are_the_best_of_all_pairs():
    tensor = FORMATS["additive"]()
    target = tensor.dequantize() + 0.8 * NOISE
    after = projected(tensor, target, ALL)
    books = np.asarray(tensor.codebooks, np.float64).reshape(2, 8, 4)
    sums = (books[0][:, None] + books[1][None, :]).reshape(64, 4)
    wanted = np.asarray(target, np.float64).reshape(OUT, 3, 4) / np.asarray(tensor.scale, np.float64)[:, :, None]
    best = np.min(np.sum((wanted[:, :, None] - sums) ** 2, axis=-1), axis=-1)
    value = np.asarray(after.dequantize()).reshape(OUT, 3, 4) / np.asarray(tensor.scale, np.float64)[:, :, None]
    np.testing.assert_allclose(np.sum((wanted - value) ** 2, axis=-1), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["rows", "blocks"])
def test_single_codebooks_give_the_nearest_entry(name):
    tensor = FORMATS[name]()
    target = tensor.dequantize() + 0.8 * NOISE
    after = projected(tensor, target, ALL).dequantize()
    _, rows, columns = tensor.codes.shape
    size = math.prod(tensor.vector)
    books = np.asarray(tensor.codebooks.astype(jnp.float32), np.float64).reshape(-1, tensor.codebook_size, size)
    for k, (wanted, value) in enumerate(zip(vectors(name, target), vectors(name, after), strict=True)):
        i, j = divmod(k, columns)
        book = books[(i * tensor.blocks[0] // rows) * tensor.blocks[1] + j * tensor.blocks[1] // columns]
        best = np.min(np.sum((wanted - book) ** 2, axis=-1))
        assert np.sum((wanted - value) ** 2) == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("trust", [0.0, 0.05, 0.2])
def test_17_the_trust_ratio_is_kept_but_for_one_change(trust):
    tensor = FORMATS["uniform"]()
    before = tensor.dequantize()
    after = projected(tensor, before + 0.8 * NOISE, dataclasses.replace(ALL, trust=trust)).dequantize()
    change = np.asarray(after - before)
    assert np.any(change)
    if np.count_nonzero(change) > 1:
        assert np.linalg.norm(change) <= trust * np.linalg.norm(before) * (1 + 1e-5)


@functools.partial(jax.jit, static_argnames="config")
def stepped(params, gradient, state, config):
    return recode_step(params, gradient, state, config)


def test_17_no_rate_and_no_memory_change_nothing():
    config = CodeConfig(0.0, pull=1.0, share=1.0)
    params = masters({"a": FORMATS["additive"](), "norm": jnp.ones(3)})
    weight = rounded(params)["a"].dequantize()
    state = begin_codes(params, {"a": weight, "norm": jnp.ones(3)})
    after, state = stepped(params, {"a": NOISE, "norm": jnp.ones(3)}, state, config)
    assert_same_bits(stored(after), stored(params))
    np.testing.assert_array_equal(state.buffer["a"], weight)
    assert state.buffer["norm"] is None


def test_steps_of_the_buffer_are_those_of_lamb():
    """Two steps against float64: Adam's second moments, no first moment, length relative to the matrix."""
    config = CodeConfig(0.1, decay=0.9, share=0.01)
    params = masters({"a": FORMATS["uniform"]()})
    start = np.asarray(rounded(params)["a"].dequantize(), np.float64)
    state = begin_codes(params, {"a": jnp.asarray(start, jnp.float32)})
    buffer, second = start, np.zeros_like(start)
    for t, sign in ((1, 1.0), (2, -0.5)):
        gradient = sign * NOISE + 0.1
        params, state = stepped(params, {"a": gradient}, state, config)
        g = np.asarray(gradient, np.float64)
        second = 0.9 * second + 0.1 * g**2
        update = g / np.sqrt(second / (1 - 0.9**t))
        buffer = buffer - 0.1 * np.linalg.norm(buffer) / np.linalg.norm(update) * update
        np.testing.assert_allclose(state.buffer["a"], buffer, rtol=1e-4, atol=1e-5)


def test_17_the_pulled_buffer_is_the_weight():
    params = masters({"a": FORMATS["uniform"]()})
    state = begin_codes(params, {"a": rounded(params)["a"].dequantize()})
    after, state = stepped(params, {"a": NOISE}, state, CodeConfig(0.5, pull=1.0, share=0.2))
    np.testing.assert_allclose(state.buffer["a"], stored(after)["a"].dequantize(), rtol=1e-6, atol=1e-6)


def test_stacked_weights_are_steps_of_each():
    tensors = [
        FORMATS["additive"](),
        dataclasses.replace(
            FORMATS["additive"](), codes=pack(jnp.asarray(np.random.default_rng(5).integers(0, 8, (2, OUT, 3))), 3)
        ),
    ]
    config = CodeConfig(0.5, share=0.1)
    both = jax.tree.map(lambda *x: jnp.stack(x), *tensors)
    gradients = jnp.stack([NOISE, -NOISE[::-1]])

    def run(params, dense, gradient):
        params = masters(params)
        return stored(stepped(params, gradient, begin_codes(params, dense), config)[0])

    together = run(both, jnp.stack([t.dequantize() for t in tensors]), gradients)
    for i, tensor in enumerate(tensors):
        alone = run(tensor, tensor.dequantize(), gradients[i])
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], together), alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "share: expected a number above 0"),
        ({"pull": 2.0}, "pull: expected a number from 0 to 1"),
        ({"trust": -1.0}, "trust: expected a number >= 0 or None"),
        ({"beam": 0}, "beam: expected an integer >= 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        CodeConfig(**change)


def test_formats_without_a_rule_are_named():
    class Other(type(FORMATS["uniform"]()).__mro__[1]):
        shape, format = (OUT, IN), "other"

        def dequantize(self):
            return NOISE

    with pytest.raises(ValueError, match="codes of a Other: expected a format with a rule"):
        project(Other(), NOISE, ALL)

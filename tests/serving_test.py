"""Kernel layouts: nothing is lost, and what they hold is what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import ConcatTensor
from jaxquant.kernels.uniform_matmul import layout
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.serving import ServingTensor, for_serving, from_serving, lookup_tensor, word_tensor
from jaxquant.tensors import dense_tree, is_quantized
from tests.ops_test import TENSORS, additive, columns, outliers, uniform_tensor
from tests.tensors_test import random_codebook_tensor

TREE = {
    "additive": additive(40, 64),
    "levels": random_codebook_tensor(40, 64, 1, 16, (40, 1), (1, 1)),
    "uniform": [uniform_tensor(24, 32, bits) for bits in (2, 3, 4, 8)] + [uniform_tensor(8, 64, 3, 32, zero=False)],
    "nested": columns(outliers(additive(40, 64))),
    "all": TENSORS,
    "dense": jnp.ones((3, 4)),
}

to_words = jax.jit(layout.to_words, static_argnums=(1, 2))
from_words = jax.jit(layout.from_words, static_argnums=(1, 2))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_layouts_are_reversible(platform):
    served = jax.jit(lambda tree: for_serving(tree, platform))(TREE)
    same(jax.jit(from_serving)(served), TREE)
    same(from_serving(TREE), TREE)
    dense, again = jax.jit(dense_tree)(TREE), jax.jit(dense_tree)(served)
    jax.tree.map(np.testing.assert_array_equal, dense, again)
    before, after = (jax.tree.leaves(tree, is_leaf=is_quantized) for tree in (TREE, served))
    for a, b in zip(before, after, strict=True):
        if is_quantized(a):
            assert b.storage_bits() == sum(8 * x.nbytes for x in jax.tree.leaves(b))
            assert b.shape == a.shape
    laid_out = platform != "gpu" or jax.__version_info__ >= (0, 11)  # older ones have no kernels for GPUs
    assert isinstance(served["additive"], ServingTensor) == laid_out
    assert isinstance(served["levels"], ServingTensor) == (platform == "tpu")
    assert served["additive"].format == TREE["additive"].format + (", kernel layout" if laid_out else "")


def test_what_is_padded_is_counted():
    tensor = additive(1024, 64)
    scale = 16 * (2 * 2048 + 1024)
    assert tensor.storage_bits() == 8 * 2 * 1024 * 8 + scale
    assert lookup_tensor(tensor, "tpu").storage_bits() == tensor.storage_bits()
    assert lookup_tensor(tensor, "cpu").storage_bits() == 8 * 16 * (1024 + 64) + scale
    three = word_tensor(uniform_tensor(128, 5 * 1024, 3, zero=False))
    assert three.storage_bits() == 128 * (1024 * 16 + 16)  # 5 codes in 16 bits


@settings(max_examples=5)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 9), st.integers(1, 70))
def test_words_hold_the_codes(bits, out, n):
    codes = np.random.default_rng(0).integers(0, 2**bits, (out, n))
    lines = layout.num_lines(n, bits, 2)
    words = np.asarray(to_words(jnp.asarray(codes), bits, lines), np.uint64)
    assert words.shape == (lines // 2, out)
    for column in range(n):
        place, line = divmod(column, lines)
        shift = 16 * (line % 2) + bits * place
        np.testing.assert_array_equal((words[line // 2, :out] >> shift) & (2**bits - 1), codes[:, column])
    back = from_words(jnp.asarray(words, jnp.uint32), bits, n)
    np.testing.assert_array_equal(back, codes)


def test_layouts_hold_tracers_and_abstract_arrays():
    abstract = jax.eval_shape(lambda: for_serving(TREE, "tpu"))
    same(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: TREE)),
        jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: from_serving(for_serving(TREE, "tpu")))
        ),
    )
    assert abstract["additive"].storage_bits() == for_serving(TREE["additive"], "tpu").storage_bits()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: word_tensor(uniform_tensor(bits=5)), r"expected codes of one of \(2, 3, 4, 8\) bits, got 5"),
        (lambda: word_tensor(additive(size=16)), "expected a table of at most 16 levels per row"),
        (lambda: lookup_tensor(additive(size=512)), "expected codes of at most 8 bits"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_of_other_kinds_stay():
    part = ConcatTensor((jnp.ones((24, 4)), uniform_tensor()), None, 1)
    same(for_serving(part, "cpu"), part)
    assert isinstance(for_serving(TENSORS["outlier columns"], "cpu"), ColumnOutlierTensor)

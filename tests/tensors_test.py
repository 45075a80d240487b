"""Tensor formats against float64 loops, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import bits_per_weight, pack
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.tensors import CodebookTensor, ConcatTensor, OutlierTensor, pack_order, unpack_order, with_outliers


def random_codebook_tensor(out, n, count, size, blocks, vector, *, scaled=True, seed=0):
    """A random CodebookTensor."""
    rng = np.random.default_rng(seed)
    (g, d), (r, c) = vector, blocks
    codes = jnp.asarray(rng.integers(0, size, (count, out // g, n // d)))
    books = jnp.asarray(rng.standard_normal((r * c * count, size * g * d)), jnp.float16)
    scale = jnp.asarray(rng.uniform(1, 2, (out // g, 1)), jnp.float16) if scaled else None
    return CodebookTensor(pack(codes, (size - 1).bit_length()), books, scale, blocks, vector)


def codebook_tensor(out, n, count, size, blocks, vector, **options):
    """A random CodebookTensor, and its weight by a loop."""
    tensor = random_codebook_tensor(out, n, count, size, blocks, vector, **options)
    (g, d), (r, c) = vector, blocks
    codes, books = np.asarray(tensor.codes.unpack(), int), np.asarray(tensor.codebooks)
    weight = np.zeros((out, n))
    for i in range(out // g):
        for j in range(n // d):
            block = (i // (out // g // r)) * c + j // (n // d // c)
            vectors = [books[block * count + m].reshape(size, g, d)[codes[m, i, j]] for m in range(count)]
            factor = 1.0 if tensor.scale is None else float(tensor.scale[i, 0])
            weight[i * g : (i + 1) * g, j * d : (j + 1) * d] = factor * np.sum(vectors, axis=0, dtype=np.float64)
    return tensor, weight


@pytest.mark.parametrize(
    ("count", "blocks", "vector"),
    [(1, (8, 1), (1, 1)), (1, (1, 16), (1, 1)), (2, (1, 1), (1, 4)), (1, (2, 2), (1, 2)), (3, (2, 1), (2, 4))],
)
def test_codebook_tensor_is_the_loop(count, blocks, vector):
    tensor, weight = codebook_tensor(8, 16, count, 8, blocks, vector)
    assert tensor.shape == (8, 16)
    assert tensor.codebook_size == 8
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-5, atol=1e-5)


def test_codebook_tensor_is_linear_in_its_codebooks():
    tensor, _ = codebook_tensor(8, 16, 2, 8, (1, 1), (1, 4))

    def decode(books):
        return CodebookTensor(tensor.codes, books, tensor.scale, tensor.blocks, tensor.vector).dequantize()

    books = tensor.codebooks.astype(jnp.float32)
    np.testing.assert_allclose(decode(2 * books), 2 * decode(books), rtol=1e-5)
    gradient = jax.grad(lambda b: decode(b).sum())(books)
    assert float(jnp.abs(gradient).sum()) > 0


@pytest.mark.parametrize(("out", "n", "count"), [(5, 7, 3), (300, 400, 60), (3, 65536, 9), (4, 6, 0)])
def test_outliers_are_added_where_they_belong(out, n, count):
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(out * n, count, replace=False))
    values = rng.standard_normal(count)
    padded = np.concatenate([positions, [out * n] * 2]), np.concatenate([values, [0, 0]])
    base = jnp.zeros((out, n))
    tensor = with_outliers(base, jnp.asarray(padded[1], jnp.float32), jnp.asarray(padded[0], jnp.int32), "float32")
    expected = np.zeros(out * n, np.float32)
    expected[positions] = values
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()).reshape(-1), expected)
    assert tensor.indices.dtype == jnp.uint16
    blocks = -(-out // OutlierTensor.block_rows(n))
    assert tensor.storage_bits() == 32 * out * n + (count + 2) * (32 + 16) + 32 * (blocks + 1)


def test_too_many_columns_for_16_bits():
    with pytest.raises(ValueError, match="at most 65536 input columns"):
        with_outliers(jnp.zeros((1, 65537)), jnp.zeros(1), jnp.zeros(1, jnp.int32), "float16")


def test_column_outliers_and_unused_ones():
    base, values = jnp.ones((3, 5)), jnp.asarray([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], jnp.float16)
    tensor = ColumnOutlierTensor(base, values, jnp.asarray([4, 5], jnp.uint16))
    expected = np.ones((3, 5))
    expected[:, 4] += [1, 2, 3]
    np.testing.assert_array_equal(tensor.dequantize(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_concat_undoes_its_order(axis):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 9)).astype(np.float32)
    order = rng.permutation(weight.shape[axis])
    stored = np.take(weight, order, axis=axis)
    parts = tuple(jnp.asarray(x) for x in np.split(stored, [2, 3], axis=axis))
    tensor = ConcatTensor(parts, pack_order(jnp.asarray(order)), axis)
    assert tensor.shape == weight.shape
    np.testing.assert_array_equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("n", [1, 2, 33, 1000])
def test_orders_take_the_bits_of_their_length(n):
    order = np.random.default_rng(0).permutation(n)
    packed = pack_order(jnp.asarray(order))
    np.testing.assert_array_equal(unpack_order(packed), order)
    assert packed.words.size == -(-n * max(1, (n - 1).bit_length()) // 32)


def test_row_tables_cost_what_lnq_costs():
    tensor, _ = codebook_tensor(8, 64, 1, 8, (8, 1), (1, 1), scaled=False)
    assert bits_per_weight(tensor) == 3 + 16 * 8 / 64

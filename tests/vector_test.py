"""Vector codebooks, sweeps and searches against float64 loops; numbers of METHODS section 9 in the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import beam, linalg, vector, vector_fit, vector_sweep
from jaxquant.codebook_tensor import ColumnTensor, log_scale, scale_problem, variance_order
from jaxquant.problem import row_objective
from jaxquant.tensors import pack_order
from tests.conftest import make_problem
from tests.reference import vector as reference


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def random_code(out, columns, shape, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, shape[3], (columns // shape[4], out, shape[2])).astype(np.int32)
    return codes, rng.standard_normal(shape), rng.uniform(0.5, 2, out)


@pytest.mark.parametrize("shape", [(1, 1, 2, 4, 4), (3, 2, 1, 8, 2), (2, 4, 2, 4, 1)])
def test_decode_and_storage(shape):
    codes, books, scale = random_code(8, 24, shape)
    expected = reference.decode(codes, books, scale)
    books32, scale32 = f32(books, scale)
    np.testing.assert_allclose(vector.decode(codes, books32, scale32), expected, atol=1e-5)
    for bits in (8, 16):
        rounded = vector.rounded_books(books32, bits)
        tensor = vector.codebook_tensor(jnp.asarray(codes), books32, scale32, bits, 3)
        np.testing.assert_allclose(tensor.dequantize(), vector.decode(codes, rounded, scale32), atol=1e-5)
        assert np.abs(rounded - books).max() < 0.02
        np.testing.assert_allclose(vector.rounded_books(rounded, bits), rounded, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_join_and_split(window):
    codes = np.arange(8 * 3 * 2, dtype=np.int32).reshape(8, 3, 2)
    joined = vector_fit.join(jnp.asarray(codes), window)
    assert joined.shape == (8 // window, 3, window * 2)
    np.testing.assert_array_equal(joined[0, 1, :2], codes[0, 1])
    np.testing.assert_array_equal(vector_fit.split(joined, window), codes)


def test_10_each_step_of_kmeans_lowers_the_objective():
    rng = np.random.default_rng(0)
    points, entries = rng.standard_normal((6, 8, 2)), rng.standard_normal((4, 2))
    factors = np.tril(rng.standard_normal((6, 2, 2))) + 2 * np.eye(2)
    importance = rng.uniform(0.5, 2, 8)
    expected, history = reference.em(points, factors, importance, entries, 5)
    assert np.all(np.diff(history) <= 1e-9)
    ours, codes = vector.fit_entries(*f32(points, factors, importance, entries[None, None]), 5)
    np.testing.assert_allclose(ours[0, 0], expected, atol=1e-4)
    metric = factors @ factors.swapaxes(1, 2)
    error = points - np.asarray(ours[0, 0])[np.asarray(codes)]
    assert np.einsum("goa,gab,gob,o->", error, metric, error, importance) <= history[-1] * (1 + 1e-5)


def test_10_enough_entries_leave_no_error():
    rng = np.random.default_rng(1)
    distinct = rng.standard_normal((8, 2))
    points = distinct[rng.integers(0, 8, (5, 20))]
    points, factors, ones = f32(points, np.tile(np.eye(2), (5, 1, 1)), np.ones(20))
    books, codes = vector.residual_entries(points, factors, ones, blocks=(1, 1), count=2, size=100, iterations=3)
    decoded = vector.decode(codes, books, ones)
    np.testing.assert_allclose(decoded, vector_sweep.from_vectors(points), atol=1e-5)


def test_15_further_codebooks_lower_the_error():
    points, factors, ones = f32(
        np.random.default_rng(2).standard_normal((10, 30, 4)), np.tile(np.eye(4), (10, 1, 1)), np.ones(30)
    )
    books, codes = vector.residual_entries(points, factors, ones, blocks=(1, 1), count=3, size=8, iterations=10)
    errors = []
    for m in range(1, 4):
        decoded = vector.decode(codes[:, :, :m], books[:, :, :m], ones)
        errors.append(float(jnp.sum((decoded - vector_sweep.from_vectors(points)) ** 2)))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [(1, 1, 2, 4, 4), (3, 2, 1, 4, 2)])
def test_16_conjugate_gradients_solve_the_least_squares(shape):
    weight, hessian = make_problem(out=8, columns=24)
    hessian = hessian + 0.05 * np.mean(np.diag(hessian)) * np.eye(24)
    codes, books, scale = random_code(8, 24, shape)
    codes[codes == 3] = 2  # entry 3 is never used
    expected = reference.solve_books(weight, codes, shape, scale, hessian)
    w, h, b, s = f32(weight, hessian, books, scale)
    residual = w - vector.decode(codes, b, s)
    last = float(row_objective(residual, h).sum())
    for steps in (1, 3, 10, 100):
        change = vector_fit.solve_entries(residual, jnp.asarray(codes), s, h, shape, steps)
        now = float(row_objective(w - vector.decode(codes, b + change, s), h).sum())
        assert now <= last * (1 + 1e-5)
        last = now
    assert now == pytest.approx(expected, rel=1e-3)
    np.testing.assert_array_equal(change[:, :, :, 3], 0)


def test_scale_least_squares():
    weight, hessian = make_problem(out=6, columns=12)
    value = weight + 0.3 * np.random.default_rng(0).standard_normal(weight.shape)
    factor = np.asarray(vector_fit.solve_scale(*f32(weight, value, hessian)))

    def objective(f):
        e = weight - f[:, None] * value
        return np.sum((e @ hessian) * e, axis=1)

    for other in (0.99, 1.01):
        assert np.all(objective(factor) < objective(factor * other))


def test_9_feedback_is_exact():
    weight, hessian = make_problem(out=12, columns=24)
    book = np.random.default_rng(3).standard_normal((8, 2)) * 1.5
    expected, total = reference.feedback(weight, hessian, 0.01, book)
    w, h, books = f32(weight, hessian, book[None, None, None])
    factor = linalg.inverse_factor(h, 0.01)
    for block_size in (2, 8, 24):
        choose = vector_fit.encoding(books, jnp.ones(12), 12, 1)
        codes, value, _ = vector_sweep.error_feedback(w, factor, choose, dimension=2, block_size=block_size)
        assert np.mean(np.all(np.abs(value - expected) < 1e-4, axis=1)) >= 0.9
        np.testing.assert_allclose(vector.decode(codes, books, jnp.ones(12)), value, atol=1e-6)
        # the sum of squared errors is the damped objective
        damped = np.asarray(linalg.damped(h, 0.01), np.float64)
        e = np.asarray(value, np.float64) - weight
        assert np.sum((e @ damped) * e) == pytest.approx(total, rel=0.02)
    e = expected - weight
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(24)
    assert np.sum((e @ damped) * e) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("window", [1, 3])
def test_13_sweeps_never_raise_the_objective(window):
    weight, hessian = make_problem(out=12, columns=24)
    codes, books, scale = random_code(12, 24, (2, 3, 2, 8, 2))
    w, h, b, s = f32(weight, hessian + 1e-3 * np.eye(24), books, scale)
    codes = vector_fit.join(jnp.asarray(codes), window)
    value = vector.decode(vector_fit.split(codes, window), b, s)
    last = row_objective(w - value, h)
    choose = vector_fit.encoding(b, s, 12 // window, 3)
    for block_size in (24, 6, 24):
        codes, value = vector_sweep.coordinate_descent(
            w, value, codes, h, choose, dimension=2 * window, block_size=block_size
        )
        decoded = vector.decode(vector_fit.split(codes, window), b, s)
        np.testing.assert_allclose(value, decoded, atol=1e-4)
        now = row_objective(w - decoded, h)
        assert np.all(now <= last * (1 + 1e-4))
        last = now


def test_12_search_without_correlation_is_the_nearest_neighbour():
    rng = np.random.default_rng(4)
    target, book = rng.standard_normal((20, 4)), rng.standard_normal((16, 4))
    codes = beam.search(*f32(target, np.eye(4), book[None, None]), beam=1)
    expected = np.argmin(np.sum((target[:, None] - book[None]) ** 2, axis=2), axis=1)
    np.testing.assert_array_equal(codes[:, 0], expected)


@pytest.mark.parametrize(("count", "window"), [(2, 1), (3, 1), (1, 3), (2, 2)])
def test_13_a_full_beam_finds_the_optimum_and_wider_beams_are_no_worse(count, window):
    rng = np.random.default_rng(5)
    d, size, out = 2, 4, 30
    target, books = rng.standard_normal((out, window * d)) * 1.5, rng.standard_normal((count, size, d))
    factor = np.triu(rng.standard_normal((window * d, window * d))) + 2 * np.eye(window * d)
    best = reference.best_codes(target, factor @ factor.T, books, np.ones(out))
    losses = []
    for width in (1, 2, 8, size ** (count * window)):
        codes = beam.search(*f32(target, factor, books[None, None][0]), beam=width)
        values = vector.decode(vector_fit.split(codes[None], window), *f32(books[None, None], np.ones(out)))
        error = (np.asarray(values, np.float64) - target) @ factor
        losses.append(np.sum(error**2, axis=1))
    np.testing.assert_allclose(losses[-1], best, rtol=1e-4)
    total = [x.sum() for x in losses]
    assert total[0] * 1.02 >= total[1]
    assert total[1] * 1.02 >= total[2] >= total[3] * (1 - 1e-5)


def test_an_incumbent_is_never_replaced_by_worse():
    rng = np.random.default_rng(6)
    target, books = rng.standard_normal((50, 4)), rng.standard_normal((1, 3, 8, 4))
    incumbent = jnp.asarray(rng.integers(0, 8, (50, 3)), jnp.int32)
    target, books, identity = f32(target, books, np.eye(4))

    def loss(codes):
        return jnp.sum((vector.decode(codes[None], books[None], jnp.ones(50)) - target) ** 2, axis=1)

    free = loss(beam.search(target, identity, books, beam=2))
    kept = loss(beam.search(target, identity, books, beam=2, incumbent=incumbent))
    assert np.all(kept <= loss(incumbent) + 1e-5)
    assert np.all(kept <= free + 1e-5)


def test_rows_in_chunks_give_the_same_codes(monkeypatch):
    rng = np.random.default_rng(7)
    target, factor = f32(rng.standard_normal((24, 4)), np.triu(rng.standard_normal((4, 4))) + 2 * np.eye(4))
    for blocks in (1, 3):
        (books,) = f32(rng.standard_normal((blocks, 2, 8, 4)))
        incumbent = jnp.zeros((24, 2), jnp.int32)
        whole = beam.search(target, factor, books, beam=3, incumbent=incumbent)
        monkeypatch.setattr(beam, "_SCORES", 100)
        np.testing.assert_array_equal(beam.search(target, factor, books, beam=3, incumbent=incumbent), whole)
        monkeypatch.undo()


def test_columns_are_restored():
    weight, hessian = f32(*make_problem(out=10, columns=24))
    scaled = scale_problem(weight, hessian, dimension=4, columns=True, order="variance", dtype="float16")
    np.testing.assert_allclose(scaled.restore(scaled.weight).dequantize(), weight, rtol=1e-5)
    here, there = row_objective(scaled.weight, scaled.hessian), row_objective(weight, hessian)
    np.testing.assert_allclose(here, there, rtol=1e-4)
    plain = scale_problem(weight, hessian, dimension=4, columns=False, order="natural", dtype="float16")
    assert plain.restore(weight) is weight


def test_every_vector_gets_the_same_mixture():
    hessian = np.diag(np.random.default_rng(8).permutation(np.arange(1.0, 25)))
    order = np.asarray(variance_order(*f32(hessian), 4)).reshape(6, 4)
    assert sorted(order.reshape(-1)) == list(range(24))
    ranks = (np.diag(hessian)[order] - 1) // 6
    np.testing.assert_array_equal(ranks, np.tile(np.arange(4), (6, 1)))


def test_log_scales():
    scale = np.geomspace(0.1, 10, 33)
    stored = log_scale(jnp.asarray(scale, jnp.float32))
    np.testing.assert_allclose(stored.dense(), scale, rtol=0.08)
    np.testing.assert_allclose(log_scale(jnp.full(4, 3.0)).dense(), 3, rtol=1e-3)
    tensor = ColumnTensor(jnp.ones((2, 33)), stored, pack_order(jnp.arange(33)))
    assert tensor.storage_bits() == 2 * 33 * 32 + 6 * 32 + 32 + 7 * 32

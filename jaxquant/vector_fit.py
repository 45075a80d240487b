"""Vector codes under the whole objective: least squares for codebooks and scales, in turn with sweeps over the codes.

Objective: tr((W - V) H (W - V)^T) with V of `vector.decode`. No step raises it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import beam, vector_sweep
from jaxquant.packing import rounded
from jaxquant.problem import row_objective
from jaxquant.vector import block_of_vector, collect, decode, entry_index, inverse_curvature, rounded_books
from jaxquant.vector_sweep import diagonal_blocks, from_vectors


class VectorCode(NamedTuple):
    """A solution: all that `vector.decode` needs."""

    codes: jax.Array  # int32 [in / d, out, M]
    books: jax.Array  # float32 [C, R, M, K, d], representable in storage
    scale: jax.Array  # float32 [out], representable in storage


def join(codes: jax.Array, window: int) -> jax.Array:
    """Codes of windows of S vectors: [in / d, out, M] -> [in / (S * d), out, S * M]."""
    vectors, out, count = codes.shape
    return codes.reshape(-1, window, out, count).swapaxes(1, 2).reshape(vectors // window, out, window * count)


def split(codes: jax.Array, window: int) -> jax.Array:
    """Inverse of `join`."""
    windows, out, joined = codes.shape
    return codes.reshape(windows, out, window, -1).swapaxes(1, 2).reshape(windows * window, out, joined // window)


def encode(target, factor, books, scale, width: int, incumbent) -> tuple[jax.Array, jax.Array]:
    """Codes and values of one window of vectors, by `beam.search`.

    Args:
      target: float32 [out, S * d].
      factor: see `beam.search`.
      books: float32 [R, M, K, d].
      scale: float32 [out], not zero.
      width: of the beam.
      incumbent: int32 [out, S * M] or None.

    Returns:
      (codes int32 [out, S * M], values float32 [out, S * d]).
    """
    codes = beam.search(target / scale[:, None], factor, books, beam=width, incumbent=incumbent)
    window = target.shape[1] // books.shape[-1]
    return codes, decode(split(codes[None], window), books[None], scale)


def encoding(books: jax.Array, scale: jax.Array, windows: int, width: int) -> vector_sweep.Encoding:
    """`encode` as the sweeps want it.

    Args:
      books: float32 [C, R, M, K, d].
      scale: float32 [out], not zero.
      windows: in / (S * d), a multiple of C.
      width: of the beam.
    """
    block = jnp.asarray(block_of_vector(windows, len(books)))
    return lambda state, index, target, factor, old: encode(target, factor, books[block[index]], scale, width, old)


def solve_entries(
    residual: jax.Array, codes: jax.Array, scale: jax.Array, hessian: jax.Array, shape: tuple[int, ...], steps: int
) -> jax.Array:
    """The change of all entries that minimises the objective, codes and scales held fixed.

    Conjugate gradients from zero, preconditioned with the inverse d x d curvature of each entry. The objective falls
    with every step. Several codebooks make the system singular (a constant can move between them), which does no harm.

    Args:
      residual: float32 [out, in], W - V.
      codes: int32 [in / d, out, M].
      scale: float32 [out].
      hessian: float32 [in, in].
      shape: of the codebooks, (C, R, M, K, d).
      steps: of conjugate gradients, each a product [out, in] x [in, in].

    Returns:
      float32 of `shape`; zero for entries without a code.

    Reference: the quadratic of AQLM's and GPTVQ's codebook updates. Differs from them: solved, instead of 100 or 25
    steps of Adam.
    """
    index = entry_index(codes, shape)
    inverse = inverse_curvature(index, shape, diagonal_blocks(hessian, shape[-1]), scale**2)

    def apply(change):
        moved = from_vectors(change.reshape(-1, shape[-1])[index].sum(2)) * scale[:, None]
        return collect((moved @ hessian) * scale[:, None], index, shape)

    gradient = collect((residual @ hessian) * scale[:, None], index, shape)
    change, _ = jax.scipy.sparse.linalg.cg(
        apply, gradient, tol=1e-6, maxiter=steps, M=lambda x: jnp.einsum("...d,...de->...e", x, inverse)
    )
    return change


def solve_scale(weight: jax.Array, value: jax.Array, hessian: jax.Array) -> jax.Array:
    """Factor of every row of `value` that minimises the objective, float32 [out]; 1 where the row is zero."""
    along = value @ hessian
    energy = jnp.sum(along * value, axis=1)
    return jnp.where(energy > 0, jnp.sum(weight * along, axis=1) / jnp.where(energy > 0, energy, 1), 1)


def fit_books(weight: jax.Array, code: VectorCode, hessian: jax.Array, *, bits: int, steps: int) -> jax.Array:
    """Least squares for the codebooks, rounded to storage; the old ones where that does not lower the objective.

    Blocks of rows are judged apart, since they have nothing in common.

    Args:
      weight: float32 [out, in].
      code: the solution so far.
      hessian: float32 [in, in].
      bits: width of a stored entry.
      steps: of conjugate gradients.

    Returns:
      Codebooks, of the shape they had.
    """
    value = decode(*code)
    change = solve_entries(weight - value, code.codes, code.scale, hessian, code.books.shape, steps)
    new = rounded_books(code.books + change, bits)
    before = row_objective(weight - value, hessian)
    after = row_objective(weight - decode(code.codes, new, code.scale), hessian)
    better = (after - before).reshape(new.shape[1], -1).sum(1) < 0
    return jnp.where(better[None, :, None, None, None], new, code.books)


def fit_scale(weight: jax.Array, code: VectorCode, hessian: jax.Array, dtype: str) -> jax.Array:
    """Least squares for the row scales, rounded to `dtype`; the old scale where that does not lower a row's objective."""
    value = decode(*code)
    new = rounded(code.scale * solve_scale(weight, value, hessian), dtype)
    # A scale that vanishes or turns negative would leave sweeps without a target.
    new = jnp.where(new > 0, new, code.scale)
    after = row_objective(weight - value * (new / code.scale)[:, None], hessian)
    return jnp.where(after < row_objective(weight - value, hessian), new, code.scale)


def alternate(
    weight: jax.Array,
    hessian: jax.Array,
    code: VectorCode,
    *,
    rounds: int,
    sweeps: int,
    window: int,
    beam_size: int,
    entry_bits: int,
    scale_dtype: str | None,
    steps: int,
) -> VectorCode:
    """Rounds of: least squares for the codebooks, least squares for the row scales, sweeps over the codes.

    Args:
      weight: float32 [out, in].
      hessian: float32 [in, in], positive definite.
      code: the start.
      rounds: how often.
      sweeps: in a round.
      window: vectors whose codes are searched together.
      beam_size: partial solutions kept in that search.
      entry_bits: width of a stored entry, 16 for float16.
      scale_dtype: storage dtype of the row scales; None leaves them alone.
      steps: of conjugate gradients in a round.

    Returns:
      The last solution, the best one.
    """
    dimension = window * code.books.shape[-1]

    def one(_, code):
        code = code._replace(books=fit_books(weight, code, hessian, bits=entry_bits, steps=steps))
        if scale_dtype is not None:
            code = code._replace(scale=fit_scale(weight, code, hessian, scale_dtype))
        choose = encoding(code.books, code.scale, len(code.codes) // window, beam_size)

        def sweep(_, state):
            codes, value = state
            return vector_sweep.coordinate_descent(weight, value, codes, hessian, choose, dimension=dimension)

        codes, _ = jax.lax.fori_loop(0, sweeps, sweep, (join(code.codes, window), decode(*code)))
        return code._replace(codes=split(codes, window))

    return jax.lax.fori_loop(0, rounds, one, code)

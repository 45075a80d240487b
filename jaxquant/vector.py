"""Vector codebooks: what their codes stand for, how they are stored, and k-means in the metric of the objective.

A vector is a run of d columns of one row; its value is scale_i * sum_m book_m[code_m]. Codebooks are shared by blocks:
the weight falls into R x C equal blocks of rows and columns, as in `tensors.CodebookTensor`. Inside solvers, codebooks
are one array [C, R, M, K, d] and codes int32 [in / d, out, M].
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import linalg
from jaxquant.grid import symmetric_scale, symmetric_tensor
from jaxquant.packing import pack, saturate
from jaxquant.tensors import CodebookTensor, UniformTensor
from jaxquant.vector_sweep import from_vectors, to_vectors

# Distances held at once, in float32 entries.
_CHUNK = 2**26
# Added to the curvature of an entry, relative to its trace: rank-deficient ones stay solvable. Steps are solved for the
# change of an entry, so that the ridge shortens them but never makes them raise the objective.
_RIDGE = 1e-6


def block_of_vector(vectors: int, blocks: int) -> np.ndarray:
    """Column block of each vector, int32 [vectors]."""
    return (np.arange(vectors) * blocks // vectors).astype(np.int32)


def entry_index(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Places of the codes' entries in the flattened codebooks.

    Args:
      codes: int32 [in / d, out, M].
      shape: of the codebooks, (C, R, M, K, d).

    Returns:
      int32 [in / d, out, M], into [C * R * M * K, d].
    """
    vectors, out, _ = codes.shape
    across, down, count, size, _ = shape
    block = block_of_vector(vectors, across)[:, None] * down + block_of_vector(out, down)[None, :]
    return codes + ((block[:, :, None] * count + np.arange(count)[None, None, :]) * size).astype(np.int32)


def decode(codes: jax.Array, books: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the weight that the codes stand for, float32 [out, in]; `scale` is float32 [out]."""
    entries = books.reshape(-1, books.shape[-1])[entry_index(codes, books.shape)].sum(2)
    return from_vectors(entries) * scale[:, None]


def collect(error: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Transpose of decoding: sums of the vectors of `error` [out, in] over the places of each entry."""
    vectors = jnp.broadcast_to(to_vectors(error, shape[-1])[:, :, None, :], (*index.shape, shape[-1]))
    flat = jnp.zeros((int(np.prod(shape[:-1])), shape[-1]))
    return flat.at[index.reshape(-1)].add(vectors.reshape(-1, shape[-1])).reshape(shape)


def inverse_curvature(index: jax.Array, shape: tuple[int, ...], metric: jax.Array, importance: jax.Array) -> jax.Array:
    """Inverse of every entry's own curvature: sum of importance_i * metric_P over its places (i, P).

    Args:
      index: int32 [in / d, out, M], see `entry_index`.
      shape: of the codebooks.
      metric: float32 [in / d, d, d].
      importance: float32 [out].

    Returns:
      float32 [C, R, M, K, d, d]; zero for entries without a place.
    """
    across, d = shape[0], shape[-1]
    entries = int(np.prod(shape[1:-1]))
    vectors = len(index)
    local = index - (block_of_vector(vectors, across) * entries)[:, None, None]
    spread = jnp.broadcast_to(importance[None, :, None], index.shape)
    mass = jnp.zeros((vectors, entries)).at[np.arange(vectors)[:, None, None], local].add(spread)
    mass, metric = mass.reshape(across, -1, entries), metric.reshape(across, -1, d * d)
    curvature = jnp.einsum("cge,cgx->cex", mass, metric).reshape(*shape[:-1], d, d)
    trace = jnp.trace(curvature, axis1=-2, axis2=-1)
    used = trace > 0
    scaled = curvature / jnp.where(used, trace, 1)[..., None, None]
    identity = jnp.broadcast_to(jnp.eye(d), scaled.shape)
    inverse = linalg.inverse_of_blocks(scaled + jnp.where(used, _RIDGE, 1.0)[..., None, None] * identity)
    return inverse * jnp.where(used, 1 / jnp.where(used, trace, 1), 0)[..., None, None]


def seed_entries(points: jax.Array, size: int) -> jax.Array:
    """Entries to start k-means from: points evenly spaced in the order of their Mahalanobis distance from the mean.

    Args:
      points: float32 [n, d].
      size: entries, K; may exceed n.

    Returns:
      float32 [K, d].

    Reference: van Baalen et al., GPTVQ, https://arxiv.org/abs/2402.15319, section 3.2. Differs from it for scalars, whose
    order is that of their values, equal ones counted once: at one distance from the mean there are values on either side.
    """
    if points.shape[1] == 1:
        values = jnp.sort(points[:, 0])
        rank = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (values[1:] != values[:-1]).astype(jnp.int32)]))
        wanted = jnp.round(np.linspace(0, 1, size, dtype=np.float32) * rank[-1].astype(jnp.float32))
        return values[jnp.searchsorted(rank, wanted.astype(jnp.int32))][:, None]
    centred = points - points.mean(0)[None, :]
    scatter = centred.T @ centred
    ridge = _RIDGE * jnp.trace(scatter) + jnp.finfo(jnp.float32).tiny
    inverse = linalg.inverse_of_blocks(scatter + ridge * jnp.eye(points.shape[1]))
    distance = jnp.sum((centred @ inverse) * centred, axis=1)
    place = np.round(np.linspace(0, len(points) - 1, size)).astype(np.int32)
    return points[jnp.argsort(distance)[place]]


def nearest(points: jax.Array, factors: jax.Array, entries: jax.Array) -> jax.Array:
    """Index of the nearest entry of each vector, in the metric of its columns.

    Args:
      points: float32 [C, vectors per column block, R, rows per block, d].
      factors: float32 [C, vectors per column block, d, d], L of |(p - c) L|^2.
      entries: float32 [C, R, K, d].

    Returns:
      int32 [C, vectors per column block, R, rows per block].
    """
    across, per, down, rows, d = points.shape
    size = entries.shape[2]

    def one(args):
        block, point, factor = args
        book = entries[block] @ factor
        scores = jnp.sum(book**2, axis=2)[:, None, :] - 2 * jnp.einsum("rnd,rkd->rnk", point @ factor, book)
        return jnp.argmin(scores, axis=2).astype(jnp.int32)

    batch = max(1, _CHUNK // (down * rows * size))
    blocks = np.repeat(np.arange(across, dtype=np.int32), per)
    flat = (blocks, points.reshape(-1, down, rows, d), factors.reshape(-1, d, d))
    return jax.lax.map(one, flat, batch_size=batch).reshape(points.shape[:-1])


def fit_entries(
    points: jax.Array, factors: jax.Array, importance: jax.Array, entries: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """K-means in the metric of the objective, the codebooks of all blocks at once.

    Minimises sum importance_i |(p_iP - c_code) L_P|^2. Neither step raises it; an entry that no vector chooses stays.

    Args:
      points: float32 [in / d, out, d].
      factors: L of every vector, float32 [in / d, d, d].
      importance: float32 [out].
      entries: float32 [C, R, K, d], the start.
      iterations: of both steps.

    Returns:
      (entries, codes int32 [in / d, out] of the nearest ones).

    Reference: van Baalen et al., GPTVQ, https://arxiv.org/abs/2402.15319, section 3.2 (EM). Differs from it: the metric
    is the whole d x d one instead of its diagonal, in both steps.
    """
    vectors, out, d = points.shape
    across, down, size, _ = entries.shape
    shape = (across, down, 1, size, d)
    metric = factors @ factors.swapaxes(1, 2)
    grid = points.reshape(across, -1, down, out // down, d)
    factor_grid = factors.reshape(across, -1, d, d)

    def assign(entries):
        return nearest(grid, factor_grid, entries).reshape(vectors, out)

    def step(_, entries):
        index = entry_index(assign(entries)[:, :, None], shape)
        error = points - entries.reshape(-1, d)[index[:, :, 0]]
        pull = jnp.einsum("god,gde->goe", error, metric) * importance[None, :, None]
        gradient = collect(from_vectors(pull), index, shape)
        change = jnp.einsum("...d,...de->...e", gradient, inverse_curvature(index, shape, metric, importance))
        return entries + change[:, :, 0]

    entries = jax.lax.fori_loop(0, iterations, step, entries)
    return entries, assign(entries)


def residual_entries(
    points: jax.Array,
    factors: jax.Array,
    importance: jax.Array,
    *,
    blocks: tuple[int, int],
    count: int,
    size: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Fits M codebooks one after another, each to what those before it leave.

    Args:
      points: float32 [in / d, out, d].
      factors: float32 [in / d, d, d].
      importance: float32 [out].
      blocks: (R, C).
      count: codebooks, M.
      size: entries of each, K.
      iterations: of k-means.

    Returns:
      (books float32 [C, R, M, K, d], codes int32 [in / d, out, M]).

    Reference: Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118, section 3.1. Differs from it: k-means weighs
    errors as the objective does, from evenly spaced points instead of random ones.
    """
    vectors, out, d = points.shape
    down, across = blocks
    books, codes = [], []
    for _ in range(count):
        grid = points.reshape(across, vectors // across, down, out // down, d).swapaxes(1, 2)
        seeds = jax.lax.map(lambda p: seed_entries(p, size), grid.reshape(across * down, -1, d), batch_size=64)
        seeds = seeds.reshape(across, down, size, d)
        entries, chosen = fit_entries(points, factors, importance, seeds, iterations)
        index = entry_index(chosen[:, :, None], (across, down, 1, size, d))
        points = points - entries.reshape(-1, d)[index[:, :, 0]]
        books.append(entries)
        codes.append(chosen)
    return jnp.stack(books, axis=2), jnp.stack(codes, axis=2)


def store_books(books: jax.Array, bits: int) -> jax.Array | UniformTensor:
    """Codebooks [C, R, M, K, d] as `CodebookTensor` holds them: [R * C * M, K * d].

    With 16 bits float16, with fewer a symmetric UniformTensor with one scale per codebook.
    """
    across, down, count, size, d = books.shape
    flat = books.swapaxes(0, 1).reshape(down * across * count, size * d)
    if bits == 16:
        return saturate(flat, jnp.float16)
    return symmetric_tensor(flat, symmetric_scale(flat, bits, "float16"), bits)


def load_books(stored: jax.Array | UniformTensor, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `store_books` up to rounding, float32 of `shape`."""
    flat = stored.dequantize() if isinstance(stored, UniformTensor) else stored.astype(jnp.float32)
    return flat.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)


def rounded_books(books: jax.Array, bits: int) -> jax.Array:
    """Returns codebooks as they will be after storage."""
    return load_books(store_books(books, bits), books.shape)


def codebook_tensor(
    codes: jax.Array, books: jax.Array, scale: jax.Array | None, bits: int, code_bits: int
) -> CodebookTensor:
    """Packs what a solver found; codes int32 [in / d, out, M], scale in its storage dtype [out] or None."""
    across, down, _, _, d = books.shape
    packed = pack(codes.transpose(2, 1, 0), code_bits)
    scale = None if scale is None else scale[:, None]
    return CodebookTensor(packed, store_books(books, bits), scale, (down, across), (1, d))

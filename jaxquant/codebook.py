"""Tables of levels for scalar codes: Gaussian tables, k-means on rows, and least squares with the codes held fixed."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import linalg

# Curvature added to a level, relative to its own: singular systems (levels that always occur together) stay solvable,
# and a step of the regularised system still never raises the objective.
_RIDGE = 1e-6


@functools.cache
def gaussian_levels(size: int) -> tuple[tuple[float, ...], float]:
    """The `size` levels that quantize a standard normal variable with the least mean squared error.

    Returns:
      (levels in increasing order, their mean squared error).

    Reference: S. Lloyd, Least squares quantization in PCM, 1982; J. Max, Quantizing for minimum distortion, 1960.
    """
    if size == 1:
        return (0.0,), 1.0
    normal = statistics.NormalDist()
    # Asymptotically the levels have density p^(1/3), that of a normal variable with three times the variance.
    levels = np.array([math.sqrt(3) * normal.inv_cdf((k + 0.5) / size) for k in range(size)])

    def cells(levels):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
        return mass, -np.diff(np.exp(-(edges**2) / 2)) / math.sqrt(2 * math.pi)

    for _ in range(8 * size):
        mass, moment = cells(levels)
        levels = moment / mass
    mass, moment = cells(levels)
    return tuple(levels.tolist()), float(1 - 2 * np.sum(moment * levels) + np.sum(mass * levels**2))


def nearest(value: jax.Array, levels: jax.Array) -> jax.Array:
    """Index of the nearest level.

    Args:
      value: float32 [...].
      levels: float32 [..., K], in increasing order; may end in inf, which is never chosen.

    Returns:
      int32 [...].
    """
    # Compare and count: for the few levels of a scalar table this is cheaper than a search, and it fuses.
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    return jnp.sum(value[..., None] > middle, axis=-1, dtype=jnp.int32)


def take_levels(levels: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns levels[i, codes[i, j]], float32 [rows, n], for levels [rows, K] and codes [rows, n]."""
    return jnp.take_along_axis(levels, codes.astype(jnp.int32), axis=1)


def sum_by_code(values: jax.Array, codes: jax.Array, size: int) -> jax.Array:
    """Returns the sums of `values` [rows, n] over the entries of each code, float32 [rows, size]."""
    # One masked sum per code: no scatter with thousands of collisions, nothing larger than [rows, n].
    return jax.lax.map(
        lambda k: jnp.sum(jnp.where(codes == k, values, 0), axis=1), jnp.arange(size, dtype=codes.dtype)
    ).T


def fit_rows(points: jax.Array, importance: jax.Array, size: int, iterations: int = 25) -> jax.Array:
    """One-dimensional k-means of every row, from the levels of a normal variable of the row's mean and deviation.

    Args:
      points: float32 [rows, n].
      importance: float32 >= 0, [n] or [rows, n]: weights of the squared errors.
      size: levels of a row, K.
      iterations: of Lloyd's algorithm.

    Returns:
      float32 [rows, K] in increasing order. A level that no point chooses stays where it is.

    Reference: S. Lloyd, Least squares quantization in PCM, 1982.
    """
    importance = jnp.broadcast_to(importance, points.shape)
    total = jnp.maximum(importance.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mean = jnp.sum(importance * points, axis=1, keepdims=True) / total
    deviation = jnp.sqrt(jnp.sum(importance * (points - mean) ** 2, axis=1, keepdims=True) / total)
    start = jnp.asarray(gaussian_levels(size)[0], jnp.float32)

    def lloyd(_, levels):
        codes = assign_rows(points, levels)
        mass = sum_by_code(importance, codes, size)
        moment = sum_by_code(importance * points, codes, size)
        # Averages of disjoint intervals keep their order up to rounding, an empty interval keeps its old level.
        return jnp.sort(jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), levels), axis=1)

    return jax.lax.fori_loop(0, iterations, lloyd, mean + deviation * start[None, :])


def assign_rows(points: jax.Array, levels: jax.Array) -> jax.Array:
    """Returns the index of the nearest of its row's levels for every point, int32 [rows, n]; levels are increasing."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    return jax.lax.fori_loop(
        0,
        middle.shape[1],
        lambda k, code: code + (points > jax.lax.dynamic_slice_in_dim(middle, k, 1, axis=1)).astype(jnp.int32),
        jnp.zeros(points.shape, jnp.int32),
    )


def solve_rows(residual: jax.Array, codes: jax.Array, hessian: jax.Array, size: int) -> jax.Array:
    """The change of every row's levels that minimises the objective, codes held fixed.

    With P the 0/1 matrix [in, K] of a row's codes and e = w - v its residual, the change is (P^T H P)^-1 P^T H e.

    Args:
      residual: float32 [out, in], W - V.
      codes: integers [out, in], below `size`.
      hessian: float32 [in, in].
      size: levels of a row, K; the work is K products [out, in] x [in, in].

    Returns:
      float32 [out, K]; zero for levels without a code.

    Reference: Kim et al., GuidedQuant (LNQ), https://arxiv.org/abs/2505.07004, the step on codebooks. Differs from
    it: the system is solved for the change, with a relative ridge of 1e-6 instead of an absolute one of 1e-7.
    """
    gradient = sum_by_code(residual @ hessian, codes, size)
    gram = jax.lax.map(
        lambda k: sum_by_code((codes == k).astype(hessian.dtype) @ hessian, codes, size),
        jnp.arange(size, dtype=codes.dtype),
    ).swapaxes(0, 1)
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    # Scaled to a unit diagonal, so that one ridge suits levels of a thousand codes and of one.
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    gram = gram * scale[:, :, None] * scale[:, None, :]
    ridge = jnp.where(scale > 0, _RIDGE, 1.0)
    gram = (gram + gram.swapaxes(1, 2)) / 2 + ridge[:, :, None] * jnp.eye(size)[None]
    # A system that rounding makes indefinite gives NaN: its row then keeps its levels.
    change = scale * linalg.solve_blocks(gram, scale * gradient)
    return jnp.where(jnp.isfinite(change).all(1, keepdims=True), change, 0)


def solve_shared(
    residual: jax.Array, index: jax.Array, scale: jax.Array, hessian: jax.Array, size: int, iterations: int
) -> jax.Array:
    """The change of levels shared by the whole weight that lowers the objective, codes held fixed.

    With v_ij = scale_ij * levels[index_ij], runs conjugate gradients on the normal equations of the levels.

    Args:
      residual: float32 [out, in], W - V.
      index: int32 [out, in]; entries at `size` or beyond have no level and do not move.
      scale: float32 [out, in].
      hessian: float32 [in, in].
      size: number of levels.
      iterations: at most; each costs one product [out, in] x [in, in].

    Returns:
      float32 [size]; zero for levels without an entry.
    """
    index = jnp.minimum(index, np.int32(size))

    def spread(levels):  # what they add to the weight
        return jnp.concatenate([levels, jnp.zeros(1)])[index] * scale

    def collect(weight):  # its transpose; a masked sum per level, since a scatter would collide
        scaled = weight * scale
        return jax.lax.map(lambda k: jnp.sum(jnp.where(index == k, scaled, 0)), jnp.arange(size))

    curvature = collect(jnp.diagonal(hessian)[None, :] * scale)
    precondition = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda levels: collect(spread(levels) @ hessian),
        collect(residual @ hessian),
        tol=1e-6,
        maxiter=iterations,
        M=lambda levels: precondition * levels,
    )
    return change

"""Error feedback and coordinate descent over vectors of columns: `sweep.py` for codes that stand for d weights.

Both visit the vectors (runs of d columns) of a weight in order, for all rows at once. A vector is encoded at a target t
under a metric |(t - v) L|^2, and its change then moves the targets of the vectors to come. For error feedback L is
U_PP^-1, for coordinate descent H_PP = L L^T: in both cases the metric is exactly what the choice costs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import linalg

# Encodes one vector of every row: (state of the block, index of the vector, target [out, d], L [d, d], current codes
# [out, M] or None) -> (codes int32 [out, M], values float32 [out, d]).
Encoding = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def to_vectors(weight: jax.Array, dimension: int) -> jax.Array:
    """Returns the vectors of a weight [out, in], [in / d, out, d]."""
    return weight.reshape(len(weight), -1, dimension).swapaxes(0, 1)


def from_vectors(vectors: jax.Array) -> jax.Array:
    """Inverse of `to_vectors`."""
    return vectors.swapaxes(0, 1).reshape(vectors.shape[1], -1)


def diagonal_blocks(matrix: jax.Array, dimension: int) -> jax.Array:
    """Returns the blocks on the diagonal of a square matrix [in, in], [in / d, d, d]."""
    count = len(matrix) // dimension
    blocks = matrix.reshape(count, dimension, count, dimension)
    return jnp.diagonal(blocks, axis1=0, axis2=2).transpose(2, 0, 1)


def feedback_factors(factor: jax.Array, dimension: int) -> jax.Array:
    """Returns L = U_PP^-1 of every vector, [in / d, d, d], for U of `linalg.inverse_factor`."""
    return linalg.inverse_of_upper_blocks(diagonal_blocks(factor, dimension))


def _block_vectors(count: int, dimension: int, block_size: int) -> int:
    """Vectors in a block: the largest divisor of `count` with at most `block_size` columns, so that no block is padded."""
    most = max(1, block_size // dimension)
    return max(k for k in range(1, count + 1) if count % k == 0 and k <= most)


def _recurrence(targets: jax.Array, coupling: jax.Array, step: Callable, extra: Any) -> Any:
    """Runs `step` over the vectors of a block, in order.

    Args:
      targets: float32 [block, out, d].
      coupling: float32 [block, d, block, d]; after vector k, targets[l] -= delta_k @ coupling[k, :, l] for every later
        l.
      step: (index in the block, target [out, d], extra of the vector) -> (delta [out, d], results).
      extra: pytree of arrays [block, ...].

    Returns:
      The results, stacked along a new first axis.
    """

    def body(targets, inputs):
        index, couple, own = inputs
        delta, result = step(index, targets[index], own)
        # Vectors already visited change too, but nobody reads them again.
        return targets - jnp.einsum("od,dge->goe", delta, couple), result

    return jax.lax.scan(body, targets, (jnp.arange(len(targets)), coupling, extra))[1]


def error_feedback(
    weight: jax.Array,
    factor: jax.Array,
    encode: Encoding,
    *,
    dimension: int,
    begin_block: Callable[[jax.Array, jax.Array], Any] = lambda start, targets: None,
    block_size: int = 128,
) -> tuple[jax.Array, jax.Array, Any]:
    """Encodes the vectors in order; later vectors compensate the error of each.

    With P the columns of a vector, t_P its target and err_P = (t_P - v_P) U_PP^-1, later targets fall by err_P U_P,:
    and tr((W - V) H_d (W - V)^T) = sum |err_P|^2 exactly.

    Args:
      weight: float32 [out, in].
      factor: U of `linalg.inverse_factor`, float32 [in, in].
      encode: see `Encoding`; is given no current codes.
      dimension: columns of a vector, d; divides in.
      begin_block: (first column, targets [out, block] when the block begins) -> state of the block, for codebooks that
        are fitted to the weights as compensated so far.
      block_size: columns in a block; where it does not divide in, the largest divisor below.

    Returns:
      (codes int32 [in / d, out, M], values float32 [out, in], the blocks' states stacked along a new first axis).

    Reference: van Baalen et al., GPTVQ, https://arxiv.org/abs/2402.15319, algorithm 1. Differs from it: the error is
    multiplied by the whole inverse of U_PP, where it divides by the diagonal of U_PP and so loses what the columns of a
    vector have in common; the metric of the assignment is the same.
    """
    out, n = weight.shape
    count = _block_vectors(n // dimension, dimension, block_size)
    block = count * dimension
    metric = feedback_factors(factor, dimension)
    unit = jnp.einsum("gab,gbn->gan", metric, factor.reshape(-1, dimension, n)).reshape(n, n)

    def sweep_block(deltas, start):
        columns = jax.lax.dynamic_slice_in_dim(unit, start, block, axis=1)
        # `deltas` of this block and later ones are still zero.
        targets = jax.lax.dynamic_slice_in_dim(weight, start, block, axis=1) - deltas @ columns
        state = begin_block(start, targets)

        def step(index, target, _):
            vector = start // dimension + index
            codes, value = encode(state, vector, target, metric[vector], None)
            return target - value, (codes, value, target - value)

        coupling = jax.lax.dynamic_slice_in_dim(columns, start, block).reshape(count, dimension, count, dimension)
        codes, values, delta = _recurrence(to_vectors(targets, dimension), coupling, step, None)
        deltas = jax.lax.dynamic_update_slice_in_dim(deltas, from_vectors(delta), start, axis=1)
        return deltas, (codes, values, state)

    starts = jnp.arange(0, n, block)
    _, (codes, values, states) = jax.lax.scan(sweep_block, jnp.zeros_like(weight), starts)
    return codes.reshape(-1, *codes.shape[2:]), from_vectors(values.reshape(-1, out, dimension)), states


def coordinate_descent(
    weight: jax.Array,
    value: jax.Array,
    codes: jax.Array,
    hessian: jax.Array,
    encode: Encoding,
    *,
    dimension: int,
    block_size: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """One cyclic sweep: each vector in turn gets its best code, all others held fixed.

    With G = (W - V) H, the objective is a parabola in the vector P with its minimum at t_P = v_P + G_P H_PP^-1 and
    curvature H_PP. Never raises the objective if `encode` never returns a code worse than the current one.

    Args:
      weight: float32 [out, in], the target W.
      value: float32 [out, in], the current V.
      codes: int32 [in / d, out, M], the codes of V.
      hessian: float32 [in, in]; positive definite, so that every H_PP has an inverse.
      encode: see `Encoding`; is given the current codes.
      dimension: columns of a vector, d.
      block_size: columns in a block, as in `error_feedback`; no effect on the result but for float rounding.

    Returns:
      (codes, values).

    Reference: Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118, the step on codes with a beam of 1. Differs
    from it: vectors are visited in order, and the gradient is computed once per block instead of once per vector.
    """
    n = weight.shape[1]
    count = _block_vectors(n // dimension, dimension, block_size)
    block = count * dimension
    own = diagonal_blocks(hessian, dimension)
    # Upper triangular, H_PP = L L^T, as the search for codes wants it.
    metric, inverse = (x[:, ::-1, ::-1] for x in linalg.cholesky_blocks(own[:, ::-1, ::-1]))
    inverse = jnp.einsum("gca,gcb->gab", inverse, inverse, precision="highest")
    gain = jnp.einsum("ngb,gbc->ngc", hessian.reshape(n, -1, dimension), inverse).reshape(n, n)

    def sweep_block(value, inputs):
        start, incumbent = inputs
        columns = jax.lax.dynamic_slice_in_dim(gain, start, block, axis=1)
        current = jax.lax.dynamic_slice_in_dim(value, start, block, axis=1)
        targets = to_vectors(current + (weight - value) @ columns, dimension)

        def step(index, target, extra):
            old, old_codes = extra
            vector = start // dimension + index
            new_codes, new = encode(None, vector, target, metric[vector], old_codes)
            return new - old, (new_codes, new)

        coupling = jax.lax.dynamic_slice_in_dim(columns, start, block).reshape(count, dimension, count, dimension)
        new_codes, new = _recurrence(targets, coupling, step, (to_vectors(current, dimension), incumbent))
        return jax.lax.dynamic_update_slice_in_dim(value, from_vectors(new), start, axis=1), new_codes

    incumbents = codes.reshape(-1, count, *codes.shape[1:])
    value, new_codes = jax.lax.scan(sweep_block, value, (jnp.arange(0, n, block), incumbents))
    return new_codes.reshape(codes.shape), value

"""The two column sweeps that all methods share: error feedback and coordinate descent.

Both visit the columns of a weight in order, for all rows at once, and tell the columns still to come what the rounding of
this one did to them. Inside, matrices are kept transposed, [in, out], so that a column is contiguous; columns come in
blocks. The effect of all earlier blocks on a block is one matrix product when the block begins (left-looking, nothing is
written ahead), the effect inside a block is a recurrence over its columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.grid import Grid, encode

# Rounds one column: (state of the block, column index, target [out]) -> (code [out], value [out]).
Rounding = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Columns whose recurrence is unrolled into straight-line code: long enough to fuse well, short enough to compile fast.
UNROLL = 8


def _recurrence(targets: jax.Array, coupling: jax.Array, step: Callable, unroll: int) -> Any:
    """Runs `step` over the columns of a block, in order.

    Args:
      targets: float32 [block, out].
      coupling: float32 [block, block]; after column k, targets[l] -= coupling[k, l] * delta_k for every later l.
      step: (index in the block, target [out]) -> (delta [out], results).
      unroll: columns in straight-line code, if that divides the block.

    Returns:
      The results, stacked along a new first axis [block, ...].
    """
    block, out = targets.shape
    unroll = unroll if block % unroll == 0 else 1

    def unrolled(targets, start):
        rows = jax.lax.dynamic_slice(targets, (start, 0), (unroll, out))
        couple = jax.lax.dynamic_slice(coupling, (start, 0), (unroll, block))
        near = jax.lax.dynamic_slice(couple, (0, start), (unroll, unroll))
        rows, deltas, results = [rows[k] for k in range(unroll)], [], []
        for k in range(unroll):
            delta, result = step(start + k, rows[k])
            deltas.append(delta)
            results.append(result)
            for later in range(k + 1, unroll):
                rows[later] = rows[later] - near[k, later] * delta
        # Columns already visited change too, but nobody reads them again.
        targets = targets - couple.T @ jnp.stack(deltas)
        return targets, jax.tree.map(lambda *x: jnp.stack(x), *results)

    _, results = jax.lax.scan(unrolled, targets, jnp.arange(0, block, unroll))
    return jax.tree.map(lambda x: x.reshape(block, *x.shape[2:]), results)


def _pad_to_blocks(weight: jax.Array, matrix: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array, int]:
    """Transposes weight and pads in to a multiple of the block with zero weights and an identity in the matrix."""
    n = weight.shape[1]
    block = min(block_size, -(-n // UNROLL) * UNROLL)
    pad = -n % block
    weight = jnp.pad(weight.T, ((0, pad), (0, 0)))
    if pad:
        matrix = jnp.pad(matrix, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(n + pad) >= n).astype(matrix.dtype)
    return weight, matrix, block


def error_feedback(
    weight: jax.Array,
    factor: jax.Array,
    rounding: Rounding,
    *,
    begin_block: Callable[[jax.Array, jax.Array], Any] = lambda start, targets: None,
    block_size: int = 128,
    unroll: int = UNROLL,
) -> tuple[jax.Array, jax.Array, Any]:
    """Rounds the columns in order; each rounding error is compensated by the columns after it.

    Column j is rounded at t_j = w_j - sum_{k<j} err_k U_kj with err_k = (t_k - q_k) / U_kk. Then W - Q = Err U and
    tr((W - Q) H_d (W - Q)^T) = sum Err^2 exactly.

    Args:
      weight: float32 [out, in].
      factor: U of `linalg.inverse_factor`, float32 [in, in], upper triangular.
      rounding: rounds one column; sees the state of its block.
      begin_block: (first column, targets [block, out] when the block begins) -> state of the block, for grids that are
        fitted to the weights as compensated so far.
      block_size: columns in a block; without `begin_block` it has no effect on the result but for float rounding.
      unroll: columns whose recurrence is straight-line code.

    Returns:
      (codes [out, in], values float32 [out, in], the blocks' states stacked along a new first axis).

    Reference: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1. Differs from the released code: updates
    are collected when a block begins (left-looking) instead of written ahead.
    """
    out, n = weight.shape
    weight, factor, block = _pad_to_blocks(weight, factor, block_size)
    diagonal = jnp.diagonal(factor)

    def sweep_block(errors, start):
        columns = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        # `errors` of this block and later ones are still zero.
        targets = jax.lax.dynamic_slice_in_dim(weight, start, block) - columns.T @ errors
        state = begin_block(start, targets)

        def step(index, target):
            column = start + index
            code, value = rounding(state, column, target)
            error = (target - value) / diagonal[column]
            return error, (code, value, error)

        coupling = jax.lax.dynamic_slice_in_dim(columns, start, block)
        codes, values, block_errors = _recurrence(targets, coupling, step, unroll)
        return jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0), (codes, values, state)

    starts = jnp.arange(0, len(weight), block)
    _, (codes, values, states) = jax.lax.scan(sweep_block, jnp.zeros_like(weight), starts)
    codes, values = (x.reshape(-1, out)[:n].T for x in (codes, values))
    return codes, values, states


def coordinate_descent(
    weight: jax.Array,
    start: jax.Array,
    hessian: jax.Array,
    rounding: Rounding,
    *,
    relaxed: jax.Array | bool = False,
    block_size: int = 128,
    unroll: int = UNROLL,
) -> tuple[jax.Array, jax.Array]:
    """One cyclic sweep: each column in turn gets its best value, all others held fixed.

    With G = (W - V) H, column j of V moves to the rounding of beta_j = v_j + G_j / H_jj, the exact minimiser over the
    rounding's values since the objective is a parabola in each entry. Never raises the objective from a feasible start.

    Args:
      weight: float32 [out, in], the target W.
      start: float32 [out, in], the current V; need not be feasible.
      hessian: float32 [in, in] with a positive diagonal.
      rounding: rounds one column to nearest; its state is None.
      relaxed: if true, columns move to beta_j unrounded (codes are still those of the rounding).
      block_size: columns in a block; no effect on the result but for float rounding.
      unroll: see `error_feedback`.

    Returns:
      (codes [out, in], values float32 [out, in]).

    Reference: Behdin et al., QuantEase, https://arxiv.org/abs/2309.01885, lemma 1 and algorithm 2. Differs from it: the
    gradient of a block is computed afresh from the current V when the block begins, which needs one product per sweep
    instead of one and a half and lets no rounding error build up.
    """
    out, n = weight.shape
    value, _, _ = _pad_to_blocks(start, hessian, block_size)
    weight, hessian, block = _pad_to_blocks(weight, hessian, block_size)
    gain = hessian / jnp.diagonal(hessian)[None, :]

    def sweep_block(value, start):
        columns = jax.lax.dynamic_slice_in_dim(gain, start, block, axis=1)
        current = jax.lax.dynamic_slice_in_dim(value, start, block)
        targets = current + columns.T @ (weight - value)

        def step(index, target):
            code, rounded = rounding(None, start + index, target)
            new = jnp.where(relaxed, target, rounded)
            return new - current[index], (code, new)

        coupling = jax.lax.dynamic_slice_in_dim(columns, start, block)
        codes, new = _recurrence(targets, coupling, step, unroll)
        return jax.lax.dynamic_update_slice_in_dim(value, new, start, axis=0), codes

    value, codes = jax.lax.scan(sweep_block, value, jnp.arange(0, len(weight), block))
    return codes.reshape(-1, out)[:n].T, value[:n].T


def grid_rounding(grid: Grid, group_of: jax.Array) -> Rounding:
    """Rounding to grids fixed beforehand; group_of int32 [in] names the group of each column."""
    scale, zero = grid.scale.T, grid.zero.T

    def rounding(state, column, target):
        del state
        group = group_of[column]
        s, z = scale[group], zero[group]
        code = encode(target, s, z, grid.bits)
        return code.astype(jnp.uint8), s * (code - z)

    return rounding

"""Best paths through a trellis of shifted bits: the specification, and what XLA makes of it.

A state is L bits. A step of b bits shifts the state by b and fills it up from below, so the states before a state differ
in their top b bits. The Viterbi algorithm finds the exact best path.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _least(x: jax.Array) -> jax.Array:
    """Minimum over the middle axis, spelled out: XLA hands what it knows as a minimum to a library that is slow here."""
    return jax.lax.reduce(x, np.float32(np.inf), lambda a, b: jnp.where(b < a, b, a), (1,))


def _viterbi(
    target: jax.Array,
    weight: jax.Array,
    width: jax.Array,
    values: jax.Array,
    cost: jax.Array,
    end: jax.Array,
    *,
    widest: int,
) -> jax.Array:
    """Best paths through the trellis, several runs at once.

    Args:
      target: float32 [runs, m].
      weight: float32 [runs, m] >= 0, weights of the squared errors.
      width: int32 [runs, m], bits by which the state moves; 0 leaves it.
      values: float32 [runs, 2**L], value of each state.
      cost: float32 [runs, 2**L], of beginning in each state.
      end: int32 [runs], last state, or -1 for the cheapest.
      widest: the largest width.

    Returns:
      int32 [runs, m], states.
    """
    runs, size = values.shape
    state_bits = size.bit_length() - 1

    def forward(cost, inputs):
        target, weight, width = inputs
        arrival = cost
        for b in range(1, widest + 1):  # the b bits that leave at the top are free to be the cheapest
            best = _least(cost.reshape(runs, 2**b, size >> b))
            arrival = jnp.where((width == b)[:, None], jnp.repeat(best, 2**b, axis=1), arrival)
        return arrival + weight[:, None] * (target[:, None] - values) ** 2, cost

    cost, before = jax.lax.scan(forward, cost, (target.T, weight.T, width.T))
    end = jnp.where(end >= 0, end, jnp.argmin(cost, axis=1).astype(jnp.int32))
    top = jnp.arange(2**widest, dtype=jnp.int32)[None, :]

    def backward(state, inputs):
        cost, width = inputs[0], inputs[1][:, None]
        origins = jnp.left_shift(top, np.int32(state_bits) - width) | jnp.right_shift(state[:, None], width)
        possible = top < jnp.left_shift(np.int32(1), width)
        costs = jnp.where(possible, jnp.take_along_axis(cost, jnp.where(possible, origins, 0), axis=1), jnp.inf)
        return jnp.take_along_axis(origins, jnp.argmin(costs, axis=1)[:, None], axis=1)[:, 0], state

    return jax.lax.scan(backward, end, (before, width.T), reverse=True)[1].T


def paths(
    target: jax.Array,
    weight: jax.Array,
    moves: jax.Array,
    values: jax.Array,
    ends: jax.Array | None,
    closed: jax.Array,
    *,
    widest: int,
) -> jax.Array:
    """Best paths of several runs, see `api.paths`; padding repeats the last state."""
    runs, size = values.shape
    solve = functools.partial(_viterbi, widest=widest)
    if ends is None:
        half = target.shape[1] // 2
        turned, turned_weight, turned_moves = (jnp.roll(x, -half, axis=1) for x in (target, weight, moves))
        anywhere, cheapest = jnp.zeros((runs, size)), jnp.full(runs, -1, jnp.int32)
        free = solve(turned, turned_weight, turned_moves, values, anywhere, cheapest)
        ends = free[:, target.shape[1] - half - 1]
    start = jnp.where(closed, ends, 0)
    cost = jnp.where(jnp.arange(size)[None, :] == start[:, None], 0.0, 1e30)
    return solve(target, weight, moves, values, cost, jnp.where(closed, ends, -1))

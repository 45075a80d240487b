"""Best paths through a trellis on a GPU: a program finds the path of one run, costs of all states in registers.

Written for Pallas' Triton backend, because the minimum over the states that lead to a state crosses threads in a way
that changes with the width: Triton arranges that by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

_WARPS = 4


def paths(
    target: jax.Array,
    weight: jax.Array,
    moves: jax.Array,
    values: jax.Array,
    ends: jax.Array | None,
    closed: jax.Array,
    *,
    widest: int,
    interpret: bool = False,
) -> jax.Array:
    """Best paths of several runs, see `api.paths`."""
    runs, m = target.shape
    size = values.shape[1]
    width = moves[:, 0]
    length = jnp.where(width > 0, jnp.sum(moves > 0, axis=1), m).astype(jnp.int32)
    given = jnp.full(runs, -1, jnp.int32) if ends is None else ends.astype(jnp.int32)
    kernel = functools.partial(_kernel, size=size, widest=widest, find_ends=ends is None, interpret=interpret)
    scalar, row = pl.BlockSpec((1,), lambda r: (r,)), pl.BlockSpec((None, m), lambda r: (r, 0))
    table = pl.BlockSpec((None, size), lambda r: (r, 0))
    states, _ = pl.pallas_call(
        kernel,
        grid=(runs,),
        in_specs=[scalar, scalar, scalar, scalar, row, row, table],
        out_specs=[row, pl.BlockSpec((None, m, size // 2), lambda r: (r, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((runs, m), jnp.int32),
            jax.ShapeDtypeStruct((runs, m, size // 2), jnp.uint8),
        ],
        interpret=interpret,
        compiler_params=None if interpret else _compiler_params(),
    )(width, length, closed.astype(jnp.int32), given, target, weight, values)
    return states


def _compiler_params():
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=_WARPS, num_stages=1)


def _kernel(
    width, length, closed, given, target, weight, values, states, origins, *, size, widest, find_ends, interpret
):
    """One run; `origins` [m, 2**(L - b)] holds the top bits of the best state before each, in steps that were taken."""
    state_bits = size.bit_length() - 1
    rows, is_closed = length[0], closed[0] > 0
    level = values[...]
    everything = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)

    def settle():
        if not interpret:
            from jax.experimental.pallas import triton

            triton.debug_barrier()  # what other threads of this program wrote is read next

    def solve(b: int):
        low = size >> b

        def forward(row, cost):
            options = cost.reshape(2**b, low)
            origins[row, pl.ds(0, low)] = jnp.argmin(options, axis=0).astype(jnp.uint8)
            best = jnp.min(options, axis=0)
            arrival = jnp.broadcast_to(best[:, None], (low, 2**b)).reshape(size)
            return arrival + weight[row] * (target[row] - level) ** 2

        def before(row, state):
            rest = jax.lax.shift_right_logical(state, np.int32(b))
            return (origins[row, rest].astype(jnp.int32) << np.int32(state_bits - b)) | rest

        def end_of_the_turned_run():
            # The run turned by half its length, begun anywhere; the state at its last row is the one in question.
            half = jnp.minimum(target.shape[0] // 2, rows)
            cost = jax.lax.fori_loop(half, rows, forward, jnp.zeros(size, jnp.float32))
            cost = jax.lax.fori_loop(0, half, forward, cost)
            settle()
            state = jnp.argmin(cost).astype(jnp.int32)
            state = jax.lax.fori_loop(0, half, lambda i, s: before(half - 1 - i, s), state)
            settle()
            return state

        end = end_of_the_turned_run() if find_ends else given[0]
        start = jnp.where(is_closed, end, 0)
        cost = jnp.where(everything == start, jnp.float32(0), jnp.float32(1e30))
        cost = jax.lax.fori_loop(0, rows, forward, cost)
        settle()
        state = jnp.where(is_closed, end, jnp.argmin(cost).astype(jnp.int32))

        def backward(i, state):
            row = rows - 1 - i
            states[row] = state
            return before(row, state)

        jax.lax.fori_loop(0, rows, backward, state)

    def stay():
        state = jnp.where(is_closed & (not find_ends), given[0], 0)

        def write(row, carry):
            states[row] = state
            return carry

        jax.lax.fori_loop(0, rows, write, 0)

    jax.lax.switch(width[0], [stay, *(functools.partial(solve, b) for b in range(1, widest + 1))])

"""Trellis codes: what a code of b bits stands for depends on the codes before it.

The codes of a run of weights form a ring of bits; the last L bits up to and with a weight's own code are its state, and
the state's entry in a fixed table is its value. A table of 2**L values thus serves codes of any width, and choosing
the codes is a search for the best path, which the Viterbi algorithm solves exactly. For normal variables the error at
1, 2, 3, 4 bits is 0.08, 0.11, 0.11, 0.15 bits from the rate-distortion bound with L = 10, where the best scalar
levels are 0.27, 0.46, 0.57, 0.64 bits away.

Reference: Marcellin and Fischer, Trellis coded quantization, IEEE Transactions on Communications 38 (1990); the trellis
of shifted bits with a computed table and its closing to a ring: Tseng et al., QTIP,
https://arxiv.org/abs/2406.11235. Differs from QTIP: runs go along the rows of one column, where the metric of error
feedback and of coordinate descent is exactly diagonal; the table is a permutation of normal quantiles; widths vary.
"""

import functools
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.kernels.trellis_paths.api import paths

_WIDEST = 8


class Trellis(NamedTuple):
    """Constants of a trellis; distortion and gain are those of widths 0 to 8 on normal variables.

    Attributes:
      multiplier: odd; state s has the quantile multiplier * s mod 2**L. Found by a search over a few dozen.
      distortion: mean squared error of unit variables.
      gain: factor of the table at which it is least; wide codes want more than unit variance, as scalar levels do.
    """

    multiplier: int
    distortion: tuple[float, ...]
    gain: tuple[float, ...]


TRELLISES = {
    8: Trellis(
        99,
        (1.0, 0.2841, 0.0767, 0.01982, 0.00555, 0.001445, 0.000417, 0.0001239, 0.0000404),
        (0.0, 0.95, 1.06, 1.15, 1.2, 1.3, 1.3, 1.4, 1.73),
    ),
    10: Trellis(
        631,
        (1.0, 0.2809, 0.0724, 0.01831, 0.00478, 0.001293, 0.000346, 0.0000916, 0.0000271),
        (0.0, 0.95, 1.03, 1.1, 1.1, 1.2, 1.2, 1.3, 1.4),
    ),
}


@functools.cache
def table(state_bits: int) -> np.ndarray:
    """Returns the value of every state, float32 [2**L]: all quantiles (k + 1/2) / 2**L of a unit normal, permuted."""
    size = 2**state_bits
    quantiles = (np.arange(size) * TRELLISES[state_bits].multiplier % size + 0.5) / size
    return np.asarray([statistics.NormalDist().inv_cdf(q) for q in quantiles], np.float32)


class Rings(NamedTuple):
    """Runs of consecutive rows, padded to the longest.

    Attributes:
      row: int32 [runs, m], rows of a run; padding repeats the last one.
      valid: bool [runs, m], not padding.
      run: int32 [rows], run of each row.
      place: int32 [rows], place of each row in its run.
      closed: bool [runs], the run's bits form a ring; runs of fewer than L rows begin at state 0 instead.
    """

    row: np.ndarray
    valid: np.ndarray
    run: np.ndarray
    place: np.ndarray
    closed: np.ndarray


def rings(sizes: tuple[int, ...], state_bits: int) -> Rings:
    """Returns the runs of `sizes` rows each."""
    length, starts = np.asarray(sizes), np.cumsum((0, *sizes))[:-1]
    place = np.arange(length.max())[None, :]
    run = np.repeat(np.arange(len(sizes)), length)
    row = starts[:, None] + np.minimum(place, length[:, None] - 1)
    return Rings(
        row.astype(np.int32),
        place < length[:, None],
        run.astype(np.int32),
        (np.arange(len(run)) - starts[run]).astype(np.int32),
        length >= state_bits,
    )


def states(codes: jax.Array, widths: jax.Array, runs: Rings, state_bits: int) -> jax.Array:
    """Reads the states off the codes.

    Args:
      codes: int32 [rows, columns], below 2**width.
      widths: int32 [rows, columns], equal within a run.
      runs: the runs of rows.
      state_bits: L.

    Returns:
      int32 [rows, columns].
    """
    length = runs.valid.sum(1)[runs.run]
    state = jnp.zeros_like(codes)
    for back in range(state_bits):  # codes of one bit need the most rows
        place = runs.place - back
        inside = place >= 0
        earlier = runs.row[runs.run, np.where(inside, place, place % length)]
        shift = jnp.minimum(widths * np.int32(back), np.int32(state_bits))
        taken = jnp.asarray(inside | runs.closed[runs.run])[:, None] & ((widths > 0) | (back == 0))
        state = state | jnp.where(taken, jnp.left_shift(codes[earlier], shift), 0)
    return state & np.int32(2**state_bits - 1)


def search(
    target: jax.Array,
    weight: jax.Array,
    width: jax.Array,
    values: jax.Array,
    runs: Rings,
    incumbent: jax.Array | None,
) -> jax.Array:
    """Finds the states of one column with a small weighted squared error.

    The state in which a closed run begins and ends is that of the incumbent, so that the result is never worse;
    without an incumbent, it is read off the best open path through the run turned by half its length.

    Args:
      target: float32 [rows].
      weight: float32 [rows] >= 0.
      width: int32 [runs], bits per code.
      values: float32 [runs, 2**L].
      runs: the runs of rows.
      incumbent: int32 [rows], states now, or None.

    Returns:
      int32 [rows], states.
    """
    valid = jnp.asarray(runs.valid)
    moves = jnp.where(valid, width[:, None], 0)
    target, weight = target[runs.row], jnp.where(valid, weight[runs.row], 0)
    ends = None if incumbent is None else incumbent[runs.row[:, -1]]
    path = paths(target, weight, moves, values, ends, runs.closed, widest=_WIDEST)
    return path[runs.run, runs.place]

"""Best paths through a trellis, on the platform at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.kernels.trellis_paths import gpu, reference

# Programs for steps of up to so many bits: without a kernel the work of a step grows with the largest width.
_PROGRAMS = (2, 4, 8)


def paths(
    target: jax.Array,
    weight: jax.Array,
    moves: jax.Array,
    values: jax.Array,
    ends: jax.Array | None,
    closed: np.ndarray | jax.Array,
    *,
    widest: int,
) -> jax.Array:
    """Best paths of several runs.

    Args:
      target: float32 [runs, m].
      weight: float32 [runs, m] >= 0.
      moves: int32 [runs, m], bits per code, equal in a run but for 0 in the padding at its end.
      values: float32 [runs, 2**L].
      ends: int32 [runs], states in which closed runs begin and end; None for what the run turned by half suggests.
      closed: bool [runs]; others begin at state 0 and end anywhere.
      widest: the largest of `moves`, or more.

    Returns:
      int32 [runs, m], states; undefined in the padding.
    """

    def kernel(*arrays):
        return gpu.paths(*arrays, widest=widest)

    def by_xla(*arrays):
        programs = [functools.partial(reference.paths, widest=min(b, widest)) for b in _PROGRAMS]
        program = jnp.sum(jnp.max(arrays[2]) > np.asarray(_PROGRAMS))
        return jax.lax.switch(program, programs, *arrays)

    closed = jnp.asarray(closed)
    return jax.lax.platform_dependent(target, weight, moves, values, ends, closed, cuda=kernel, default=by_xla)

"""Round to nearest: each weight to the closest point of its row's or group's grid. The baseline of every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxquant import grid
from jaxquant.methods.settings import GridConfig
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import UniformTensor


@dataclasses.dataclass(frozen=True)
class RTNConfig(GridConfig):
    """Settings of `rtn`: those of its grids."""


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def rtn(problem: LayerProblem, config: RTNConfig, *, key: jax.Array) -> UniformTensor:
    """Rounds every weight to the nearest point of its grid.

    Args:
      problem: the layer; its hessian serves only the "hessian" grid search, there by its diagonal.
      config: settings.
      key: unused; every method takes one.

    Returns:
      UniformTensor [out, in].

    Raises:
      ValueError: wrong shapes or dtypes, or a group size that does not divide in.
    """
    del key
    check(problem)
    problem = revive(problem)
    grids = config.fit(problem.weight, jnp.diagonal(problem.hessian))
    scale, zero = (jnp.repeat(x, problem.weight.shape[1] // x.shape[1], axis=1) for x in (grids.scale, grids.zero))
    return grid.tensor(grid.encode(problem.weight, scale, zero, config.bits), grids, config.storage_dtype)

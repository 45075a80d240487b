"""QuantEase: cyclic coordinate descent on the layer objective, one exact minimisation per weight.

Objective: f(V) = tr((W - V) H (W - V)^T). Update of column j, all rows at once: v_j <- q_j(v_j + ((W - V) H)_j / H_jj).

Reference: Behdin et al., QuantEase, https://arxiv.org/abs/2309.01885.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant import grid, linalg, sweep
from jaxquant.methods.settings import GridConfig, Order, check_choice
from jaxquant.problem import LayerProblem, check, revive, row_objective
from jaxquant.tensors import QuantizedTensor, UniformTensor, dense

Start = Literal["weight", "rtn", "gptq"]


@dataclasses.dataclass(frozen=True)
class QuantEaseConfig(GridConfig):
    """Settings of `quantease`.

    Attributes:
      iterations: sweeps over all columns.
      relax: leave every third sweep (1, 4, 7, ... up to 25, never the last) unrounded, as the authors' code does.
      start: the weights themselves (infeasible), their rounding, or their GPTQ solution on the same grids.
      order: order of the columns in a sweep: "natural", or "diagonal" (large H_jj first).
      damp: damping of the factor behind the "gptq" start and the "hessian" search; the descent itself needs none.
      refits: rounds of refitting the scales (exact least squares, one per row and group) with further sweeps, before the
        last sweeps.
    """

    _: dataclasses.KW_ONLY
    iterations: int = 30
    relax: bool = True
    start: Start = "weight"
    order: Order = "natural"
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        check_choice("start", self.start, Start)
        check_choice("order", self.order, Order)
        if self.iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {self.iterations!r}")


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def quantease(problem: LayerProblem, config: QuantEaseConfig, *, key: jax.Array, init=None) -> UniformTensor:
    """x."""
    del key
    check(problem)
    problem = revive(problem)
    columns = problem.weight.shape[1]
    config.check_columns(columns)
    group = config.group_size or columns
    diagonal = jnp.diagonal(problem.hessian)
    order = jnp.argsort(-diagonal) if config.order == "diagonal" else jnp.arange(columns)
    back = jnp.argsort(order)
    weight, hessian = problem.weight[:, order], problem.hessian[order][:, order]
    factor = linalg.inverse_factor(hessian, config.damp)
    importance = 1 / jnp.diagonal(factor) ** 2
    grids = config.fit(problem.weight, importance[back])
    rounding = sweep.grid_rounding(grids, order // group)
    start = weight
    if config.start == "gptq":
        _, start, _ = sweep.error_feedback(weight, factor, rounding)

    def one(i, state):
        value, codes, best = state
        relaxed = config.relax & (i % 3 == 1) & (i < config.iterations - 1) & (i <= 25)
        new_codes, value = sweep.coordinate_descent(weight, value, hessian, rounding, relaxed=relaxed)
        objective = jnp.where(relaxed, jnp.inf, row_objective(value - weight, hessian))
        codes = jnp.where((objective < best)[:, None], new_codes, codes)
        return value, codes, jnp.minimum(objective, best)

    _, codes, _ = jax.lax.fori_loop(0, config.iterations, one, (start, jnp.zeros(weight.shape, jnp.uint8), jnp.full(len(weight), jnp.inf)))
    return grid.tensor(codes[:, back], grids, config.storage_dtype)

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
from jaxquant.methods.settings import GridConfig, Order, check_choice, check_integers, column_order
from jaxquant.problem import LayerProblem, check, revive, row_objective
from jaxquant.tensors import QuantizedTensor, UniformTensor, dense

Start = Literal["weight", "rtn", "gptq"]


@dataclasses.dataclass(frozen=True)
class QuantEaseConfig(GridConfig):
    """Settings of `quantease`. The defaults are the best we know; `paper` gives the authors'.

    Attributes:
      iterations: sweeps over all columns.
      start: where the descent begins: the weights themselves (infeasible), their rounding, or their GPTQ solution, both on
        the same grids.
      order: order of the columns in a sweep: "natural", or "diagonal" (large H_jj first).
      relax: leave every third sweep (the 2nd, 5th, ... 26th, never the last) unrounded, as the authors' code does.
      refit: after each rounded sweep refit every scale to the codes, by exact least squares.
      damp: damping of the factor behind the "gptq" start and the "hessian" search; the descent itself needs none.
    """

    _: dataclasses.KW_ONLY
    iterations: int = 30
    start: Start = "gptq"
    order: Order = "diagonal"
    relax: bool = True
    refit: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        check_choice("start", self.start, Start)
        check_choice("order", self.order, Order)
        check_integers(self, iterations=1)
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")

    @classmethod
    def paper(cls, bits: int, *, iterations: int = 30, search: grid.Search = "minmax") -> "QuantEaseConfig":
        """The authors' settings: from the weights, natural order, relaxed sweeps, fixed asymmetric min-max grids."""
        return cls(bits, iterations=iterations, search=search, start="weight", order="natural", relax=True, refit=False)


def _refit_scales(weight, value, hessian, scale, group_of):
    """One exact least-squares step on each group's scale in turn, for all rows; never raises the objective.

    With v the columns of `value` in group g: s_g <- s_g * (1 + v (W - V) H v / v H v), restricted to the group.

    Args:
      weight: float32 [out, in].
      value: float32 [out, in], the current V on the grids.
      hessian: float32 [in, in].
      scale: float32 [out, groups].
      group_of: int32 [in], the group of each column.

    Returns:
      float32 [out, groups]; a scale that would vanish or change sign is left as it was.
    """

    def refit(group, state):
        value, scale = state
        part = jnp.where(group_of == group, value, 0)
        along = part @ hessian
        slope, curvature = jnp.sum((weight - value) * along, axis=1), jnp.sum(part * along, axis=1)
        factor = jnp.where(curvature > 0, 1 + slope / jnp.where(curvature > 0, curvature, 1), 1)
        factor = jnp.where(factor > 0, factor, 1)
        return value + (factor - 1)[:, None] * part, scale.at[:, group].multiply(factor)

    return jax.lax.fori_loop(0, scale.shape[1], refit, (value, scale))[1]


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def quantease(
    problem: LayerProblem,
    config: QuantEaseConfig,
    *,
    key: jax.Array,
    init: QuantizedTensor | jax.Array | None = None,
) -> UniformTensor:
    """Quantizes a layer by coordinate descent.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.
      init: where the descent begins, [out, in], instead of `config.start`: any quantized tensor or dense array. The grids
        are fitted as usual, whatever its format.

    Returns:
      UniformTensor [out, in], for each row the best rounded iterate that was seen.

    Raises:
      ValueError: wrong shapes or dtypes, or a group size that does not divide in.

    Reference: Behdin et al., QuantEase, algorithm 2. Differs from it: rows keep their best iterate, not their last; the
    default starts from the GPTQ solution, weighs the grid search by conditional variances and refits scales.
    """
    del key
    check(problem)
    problem = revive(problem)
    columns = problem.weight.shape[1]
    config.check_columns(columns)
    order = column_order(problem.hessian, config.order)
    back = jnp.argsort(order)
    group_of = order // (config.group_size or columns)
    weight, hessian = problem.weight[:, order], problem.hessian[order][:, order]

    factor = linalg.inverse_factor(hessian, config.damp)
    grids = config.fit(problem.weight, 1 / jnp.diagonal(factor)[back] ** 2)
    if init is not None:
        value = dense(init).astype(jnp.float32)[:, order]
    elif config.start == "weight":
        value = weight
    else:  # without feedback the sweep is plain rounding
        feedback = factor if config.start == "gptq" else jnp.eye(columns, dtype=weight.dtype)
        _, value, _ = sweep.error_feedback(weight, feedback, sweep.grid_rounding(grids, group_of))

    def iterate(i, state):
        value, scale, best = state
        current = dataclasses.replace(grids, scale=scale)
        relaxed = config.relax & (i % 3 == 1) & (i < config.iterations - 1) & (i <= 25)
        rounding = sweep.grid_rounding(current, group_of)
        codes, value = sweep.coordinate_descent(weight, value, hessian, rounding, relaxed=relaxed)
        objective = jnp.where(relaxed, jnp.inf, row_objective(value - weight, hessian))
        better = objective < best[2]
        best = (
            jnp.where(better[:, None], codes, best[0]),
            jnp.where(better[:, None], scale, best[1]),
            jnp.where(better, objective, best[2]),
        )
        if config.refit:
            refitted = _refit_scales(weight, value, hessian, scale, group_of)
            scale = jnp.where(relaxed, scale, grid.stored_scale(refitted, config.storage_dtype))
        return value, scale, best

    best = (jnp.zeros(weight.shape, jnp.uint8), grids.scale, jnp.full(len(weight), jnp.inf))
    _, _, (codes, scale, _) = jax.lax.fori_loop(0, config.iterations, iterate, (value, grids.scale, best))
    return grid.tensor(codes[:, back], dataclasses.replace(grids, scale=scale), config.storage_dtype)

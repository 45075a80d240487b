"""GPTQ: round column by column, let the columns to come absorb each rounding error.

Objective: tr((W - V) H (W - V)^T). With H_d^-1 = U^T U, column j is rounded at t_j = w_j - sum_{k<j} err_k U_kj, where
err_k = (t_k - q_k) / U_kk.

Reference: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant import grid, linalg, sweep
from jaxquant.methods.settings import GridConfig, Order, check_choice, column_order
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import UniformTensor


@dataclasses.dataclass(frozen=True)
class GPTQConfig(GridConfig):
    """Settings of `gptq`.

    Attributes:
      damp: damping relative to mean(diag H); raised tenfold until the factor exists.
      order: "natural", or "diagonal": columns of large H_jj first (the authors' act-order).
      grids: "static" fits all grids before the sweep; "running" fits a group's grid when the sweep reaches it, to weights
        that have absorbed all errors so far. "running" needs the natural order.
    """

    _: dataclasses.KW_ONLY
    damp: float = 0.01
    order: Order = "diagonal"
    grids: Literal["static", "running"] = "static"

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        check_choice("order", self.order, Order)
        check_choice("grids", self.grids, Literal["static", "running"])
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")
        if self.grids == "running" and self.order != "natural":
            raise ValueError('grids "running": expected order "natural" (groups are runs of columns), got "diagonal"')

    @classmethod
    def paper(cls, bits: int, *, group_size: int | None = None, search: grid.Search = "minmax") -> "GPTQConfig":
        """The authors' settings with act-order: asymmetric min-max grids, damping 0.01."""
        return cls(bits, group_size=group_size, search=search, damp=0.01, order="diagonal")


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def gptq(problem: LayerProblem, config: GPTQConfig, *, key: jax.Array) -> UniformTensor:
    """Quantizes a layer by error feedback.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      UniformTensor [out, in]. Groups are runs of the original columns whatever the order of the sweep, so there is no
      permutation to store.

    Raises:
      ValueError: wrong shapes or dtypes, or a group size that does not divide in.

    Reference: Frantar et al., GPTQ, algorithm 1. Differs from the released code: with running grids a group's grid is fitted
    to fully compensated weights even when the group is narrower than the code's block of 128 columns.
    """
    del key
    check(problem)
    problem = revive(problem)
    columns = problem.weight.shape[1]
    config.check_columns(columns)
    group = config.group_size or columns
    order = column_order(problem.hessian, config.order)
    weight, hessian = problem.weight[:, order], problem.hessian[order][:, order]
    factor = linalg.inverse_factor(hessian, config.damp)
    # Error feedback turns the objective into sum_j (err_j)^2: rounding errors of column j count 1 / U_jj^2 each.
    importance = 1 / jnp.diagonal(factor) ** 2

    if config.grids == "static":
        back = jnp.argsort(order)
        grids = config.fit(problem.weight, importance[back])
        rounding = sweep.grid_rounding(grids, order // group)
        codes, _, _ = sweep.error_feedback(weight, factor, rounding)
        return grid.tensor(codes[:, back], grids, config.storage_dtype)

    # running grids: a block is a group
    def begin_group(start, targets):
        weights = jax.lax.dynamic_slice_in_dim(importance, start, group)
        fitted = dataclasses.replace(config, group_size=None).fit(targets.T, weights)
        return fitted.scale[:, 0], fitted.zero[:, 0]

    def round_running(state, column, target):
        del column
        scale, zero = state
        code = grid.encode(target, scale, zero, config.bits)
        return code.astype(jnp.uint8), scale * (code - zero)

    codes, _, (scale, zero) = sweep.error_feedback(
        weight, factor, round_running, begin_block=begin_group, block_size=group
    )
    return grid.tensor(codes, grid.Grid(scale.T, zero.T, config.bits, config.symmetric), config.storage_dtype)

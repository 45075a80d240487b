"""Outlier-aware QuantEase: coordinate descent on a quantized weight and iterative hard thresholding on a sparse one.

Objective: f(V, S) = tr((V + S - W) H (V + S - W)^T), V on the grid, S with a fixed number of nonzero entries or
columns. V takes one QuantEase sweep on the target W - S, then S one thresholded gradient step; neither raises f.

Reference: Behdin et al., QuantEase, https://arxiv.org/abs/2309.01885, section on outliers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxquant import grid, linalg, outliers, sweep
from jaxquant.methods.settings import GridConfig, Order, check_choice, check_integers, column_order
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.packing import rounded, saturate
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import OutlierTensor, with_outliers


@dataclasses.dataclass(frozen=True)
class OutlierQuantEaseConfig(GridConfig):
    """Settings of `quantease_outlier`. The defaults are the best we know; `paper` gives the authors' grids.

    Attributes:
      outliers: share of the entries, or of the columns, that are kept in 16 bits.
      structured: outliers are whole columns.
      iterations: of a sweep over all columns and a step on the outliers.
      order: order of the columns in a sweep: "natural", or "diagonal" (large H_jj first).
      damp: damping of the factor behind the start by error feedback and the "hessian" search.
    """

    _: dataclasses.KW_ONLY
    outliers: float = 0.01
    structured: bool = False
    iterations: int = 20
    order: Order = "diagonal"
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        check_choice("order", self.order, Order)
        if not 0 <= self.outliers <= 1:
            raise ValueError(f"outliers: expected a share between 0 and 1, got {self.outliers!r}")
        check_integers(self, iterations=1)
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")

    @classmethod
    def paper(cls, bits: int, *, outliers: float = 0.01, structured: bool = False) -> "OutlierQuantEaseConfig":
        """The authors' settings as far as this method has them: min-max grids, natural order, 30 iterations."""
        return cls(bits, search="minmax", outliers=outliers, structured=structured, iterations=30, order="natural")


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def quantease_outlier(
    problem: LayerProblem, config: OutlierQuantEaseConfig, *, key: jax.Array
) -> OutlierTensor | ColumnOutlierTensor:
    """Quantizes a layer to a uniform grid and a few outliers.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      OutlierTensor, or ColumnOutlierTensor if structured, [out, in] over a UniformTensor.

    Raises:
      ValueError: wrong shapes or dtypes, or a group size that does not divide in.

    Reference: Behdin et al., QuantEase. Differs from it: starts from error feedback instead of the weights, so the
    objective falls from the first sweep and no sweep is left unrounded; grids are fitted once, to the weights without
    the first outliers, so that they stay fixed; ends with least squares on the support of the outliers and one more
    sweep.
    """
    del key
    check(problem)
    problem = revive(problem)
    out, columns = problem.weight.shape
    config.check_columns(columns)
    if config.structured:
        count = int(config.outliers * columns)
        keep = functools.partial(outliers.keep_columns, count=count)
    else:
        count = int(config.outliers * out * columns)
        keep = functools.partial(outliers.keep_entries, count=count)

    order = column_order(problem.hessian, config.order)
    back = jnp.argsort(order)
    weight, hessian = problem.weight[:, order], problem.hessian[order][:, order]
    factor = linalg.inverse_factor(hessian, config.damp)
    sparse = keep(weight)
    grids = config.fit((weight - sparse)[:, back], 1 / jnp.diagonal(factor)[back] ** 2)
    rounding = sweep.grid_rounding(grids, order // (config.group_size or columns))
    codes, value, _ = sweep.error_feedback(weight - sparse, factor, rounding)
    eigenvalue = outliers.largest_eigenvalue(hessian)

    def iterate(i, state):
        _, value, sparse = state
        codes, value = sweep.coordinate_descent(weight - sparse, value, hessian, rounding)
        last = i == config.iterations - 1
        residual = weight - value - sparse
        # The last sweep sees the outliers as they will be stored, and nothing moves after it.
        stepped = outliers.threshold_step(sparse, residual, hessian, eigenvalue, keep)
        polish = (i == config.iterations - 2) & (count > 0)
        stepped = jax.lax.cond(
            polish,
            lambda s: outliers.fit_support(s, weight - value - s, hessian, s != 0),
            lambda s: s,
            stepped,
        )
        stepped = rounded(stepped, config.storage_dtype)
        return codes, value, jnp.where(last, sparse, stepped)

    codes, _, sparse = jax.lax.fori_loop(0, config.iterations, iterate, (codes, value, sparse))
    base = grid.tensor(codes[:, back], grids, config.storage_dtype)
    sparse = sparse[:, back]
    if config.structured:
        # Columns that turned out all zero leave unused entries: beyond the weight, with values 0.
        (chosen,) = jnp.nonzero(jnp.any(sparse != 0, axis=0), size=count, fill_value=columns)
        values = sparse.at[:, chosen].get(mode="fill", fill_value=0)
        return ColumnOutlierTensor(base, saturate(values, config.storage_dtype), chosen.astype(jnp.uint16))
    (positions,) = jnp.nonzero(sparse.reshape(-1), size=count, fill_value=out * columns)
    values = sparse.reshape(-1).at[positions].get(mode="fill", fill_value=0)
    return with_outliers(base, values, positions.astype(jnp.int32), config.storage_dtype)

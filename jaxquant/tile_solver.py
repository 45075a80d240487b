"""Weights with a width per tile: widths, error feedback, descent, and levels that learn.

Rows come in classes of similar magnitude, columns in tiles of similar conditional variance; each tile of a class has a
width. What codes of a width stand for is up to a `Codec`; all tiles of a width share it, and a row factor and a column
factor scale it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import linalg, sweep, tiles
from jaxquant.allocate import allocate
from jaxquant.codebook import solve_shared
from jaxquant.outliers import largest
from jaxquant.packing import rounded
from jaxquant.problem import LayerProblem, row_objective
from jaxquant.tensors import OutlierTensor, QuantizedTensor, with_outliers

WIDEST = 8
# Iterations of the scale fit: rows, columns and outliers depend on each other, but settle at once.
_SCALE_STEPS = 6
_CG_STEPS = 10
# Least squares refits the rows, and corrects what their rounding does; a range like float32's keeps any weights.
_ROW_DTYPE, _COLUMN_DTYPE = jnp.bfloat16, jnp.float8_e4m3fn


class Scaled(NamedTuple):
    """A weight taken apart: weight ~ row[:, None] * column * (unit variance), but for outliers."""

    row: jax.Array  # [out], representable in the row dtype; 0 for rows without a weight
    column: jax.Array  # [in], representable in the column dtype
    outlier: jax.Array  # bool [out, in]


class Codec(NamedTuple):
    """What codes stand for: V_ij = row_i * column_j * unit(codes)_ij * levels[index(width, codes)_ij].

    Attributes:
      levels: float32 [count or more], the start; the first `count` are learned and stored in float16.
      count: see above.
      distortion: mean squared errors of a unit normal variable at the widths 0 to 8.
      rounding: (levels, scaled, width int32 [classes, in], codes now or None) -> `sweep.Rounding`; given the codes now,
        no column gets worse ones.
      index: (width int32 [out, in], codes [out, in]) -> int32 [out, in].
      unit: codes -> float32 [out, in], or 1.
      tidy: brings learned levels into the form that `rounding` expects.
      stored: (width int32 [out, in], codes [out, in]) -> what is stored of the codes, uint8 below 2**width.
      state_bits: of `tiles.TiledTensor`.
    """

    levels: jax.Array
    count: int
    distortion: np.ndarray
    rounding: Callable[[jax.Array, Scaled, jax.Array, jax.Array | None], sweep.Rounding]
    index: Callable[[jax.Array, jax.Array], jax.Array]
    unit: Callable[[jax.Array], jax.Array | float]
    tidy: Callable[[jax.Array], jax.Array]
    stored: Callable[[jax.Array, jax.Array], jax.Array]
    state_bits: int


class Budget(NamedTuple):
    """Settings of a solution.

    Attributes:
      average_bits: everything that is stored, over out * in.
      outliers: least share of weights kept in 16 bits.
      classes: of rows, at most out.
      rounds: of fits of levels and row scales, each followed by sweeps.
      sweeps: in a round, and before the first.
      damp: damping of the factor, relative to mean(diag H).
    """

    average_bits: float
    outliers: float
    classes: int
    rounds: int
    sweeps: int
    damp: float


class _Plan(NamedTuple):
    """What is known from shapes and settings alone."""

    classes: int
    words: int  # of the code stream
    outliers: int


def _plan(shape: tuple[int, int], budget: Budget, codec: Codec) -> _Plan:
    """Divides the budget between the code stream and outliers; the rest is measured on an empty tensor."""
    out, n = shape
    classes = budget.classes
    least = int(budget.outliers * out * n)

    def empty() -> QuantizedTensor:
        codes, orders = jnp.zeros(shape, jnp.uint8), (jnp.zeros(out, jnp.int32), jnp.zeros(n, jnp.int32))
        widths = jnp.zeros((classes, -(-n // tiles.TILE)), jnp.int32)
        scales = jnp.zeros(out, _ROW_DTYPE), jnp.zeros(n, _COLUMN_DTYPE)
        levels = jnp.zeros(codec.count, jnp.float16)
        base = tiles.tiled_tensor(codes, widths, levels, *scales, *orders, length=0, widest=WIDEST)
        return with_outliers(base, jnp.zeros(least), jnp.zeros(least, jnp.int32), "float16")

    fixed = jax.eval_shape(empty).storage_bits()
    words = int(budget.average_bits * out * n - fixed) // 32
    rows = tiles.class_sizes(out, classes)[-1]
    if words < rows:
        raise ValueError(
            f"average_bits: expected more than {(fixed + 32 * rows) / (out * n):.3f} for a layer {out}x{n} with "
            f"{budget.outliers:.2%} outliers and {classes} row classes, got {budget.average_bits}"
        )
    # A tile takes a word per row and bit. The words that no tile can use are worth as many outliers: 16 + 16 bits each.
    full = out * WIDEST * -(-n // tiles.TILE)
    spare = words % rows if words < full else words - full
    return _Plan(classes, words - spare, min(least + spare, out * n))


def _fit_scales(weight: jax.Array, count: int) -> Scaled:
    """Root mean squares of rows and columns, without the `count` entries that exceed their scales most."""

    def mean_square(x, keep, axis):
        count = jnp.maximum(jnp.sum(keep, axis=axis), 1).astype(jnp.float32)
        return jnp.maximum(jnp.sum(jnp.where(keep, x**2, 0), axis=axis) / count, 1e-30)

    def step(_, state):
        row, column, keep = state
        row = jnp.sqrt(mean_square(weight / column[None, :], keep, 1))
        column = jnp.sqrt(mean_square(weight / row[:, None], keep, 0))
        # The rows carry the magnitude: columns stay around 1, where their short floating-point format is precise.
        column = column / jnp.exp(jnp.mean(jnp.log(column)))
        return row, column, ~largest(jnp.abs(weight) / (row[:, None] * column[None, :]), count)

    start = (jnp.ones(len(weight)), jnp.ones(weight.shape[1]), jnp.ones(weight.shape, bool))
    row, column, keep = jax.lax.fori_loop(0, _SCALE_STEPS, step, start)
    row = jnp.where(jnp.any(weight != 0, axis=1), row, 0)
    return Scaled(_stored(row, _ROW_DTYPE), _stored(column, _COLUMN_DTYPE), ~keep)


def _stored(scale: jax.Array, dtype) -> jax.Array:
    """Scales as their storage dtype will hold them, float32: positive ones stay so, zero stays zero."""
    info = jnp.finfo(dtype)
    stored = rounded(jnp.maximum(scale, float(info.smallest_normal)), dtype)
    return jnp.where(scale > 0, stored, 0)


def _widths(
    row: jax.Array, row_class: jax.Array, variance: jax.Array, plan: _Plan, distortion: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Allocates widths.

    Args:
      row: float32 [out], scales of the rows.
      row_class: int32 [out].
      variance: float32 [in], conditional variance of each input times the squared scale of its column.
      plan: the budget.
      distortion: float32 [9], of a unit variable at each width.

    Returns:
      (widths int32 [classes, tiles], tile of each column int32 [in]: tiles are runs of falling variance).
    """
    order = jnp.argsort(-variance)
    tile = jnp.pad(variance[order], (0, -len(order) % tiles.TILE)).reshape(-1, tiles.TILE).sum(1)
    rows = jax.ops.segment_sum(row**2, row_class, plan.classes)
    cost = (rows[:, None] * tile[None, :]).reshape(-1, 1) * distortion[None, :]
    # In words: a bit of a tile is a word for each of its rows.
    sizes = np.repeat(np.asarray(tiles.class_sizes(len(row), plan.classes), np.float32), len(tile))
    widths = allocate(cost, jnp.asarray(sizes), jnp.arange(WIDEST + 1, dtype=jnp.float32), float(plan.words))
    return widths.reshape(plan.classes, -1), jnp.argsort(order) // tiles.TILE


class _State(NamedTuple):
    """A solution."""

    levels: jax.Array  # float32, see Codec
    row: jax.Array  # float32 [out]
    codes: jax.Array  # [out, in]
    value: jax.Array  # V, float32 [out, in]


def _learn(state: _State, codec: Codec, weight, hessian, scaled: Scaled, width: jax.Array) -> _State:
    """Least-squares fits of the shared levels, then of the row scales, each kept only if it lowers the objective.

    Codes stay as they are; outliers have codes too, but their value is free.

    Args:
      state: the solution so far.
      codec: what codes stand for.
      weight: float32 [out, in].
      hessian: float32 [in, in].
      scaled: of it the columns and outliers.
      width: int32 [out, in].

    Returns:
      The solution, as the tensor will hold it.
    """
    index, count = codec.index(width, state.codes), codec.count
    unit = jnp.where(scaled.outlier, 0, scaled.column[None, :] * codec.unit(state.codes))
    fixed = jnp.where(scaled.outlier, state.value, 0)

    def decode(levels, row):
        return fixed + row[:, None] * unit * levels[index]

    change = solve_shared(weight - state.value, index, state.row[:, None] * unit, hessian, count, _CG_STEPS)
    moved = rounded(state.levels[:count] + change, jnp.float16)
    levels = state.levels.at[:count].set(moved)
    before, after = (row_objective(weight - decode(x, state.row), hessian).sum() for x in (state.levels, levels))
    levels = jnp.where(after < before, levels, state.levels)

    now = decode(levels, state.row)
    part = now - fixed
    along = part @ hessian
    slope, curvature = jnp.sum((weight - now) * along, axis=1), jnp.sum(part * along, axis=1)
    row = _stored(state.row * (1 + slope / jnp.where(curvature > 0, curvature, jnp.inf)), _ROW_DTYPE)
    before, after = (row_objective(weight - decode(levels, r), hessian) for r in (state.row, row))
    row = jnp.where(after < before, row, state.row)
    return _State(codec.tidy(levels), row, state.codes, decode(levels, row))


def _descend(weight, hessian, factor, scaled: Scaled, widths: jax.Array, codec: Codec, budget: Budget) -> _State:
    """Error feedback, then sweeps of coordinate descent with fits of levels and row scales between them.

    Args:
      weight: float32 [out, in]: rows in stored order, columns in the order of the sweeps, as everywhere here.
      hessian: float32 [in, in].
      factor: U of the inverse Hessian, float32 [in, in].
      scaled: Scaled.
      widths: int32 [classes, in].
      codec: what codes stand for.
      budget: settings.
    """
    width = widths[tiles.class_of_row(len(weight), len(widths))]
    unroll = 1 if codec.state_bits else sweep.UNROLL  # a search is long enough without copies of it

    def rounding(state: _State, codes):
        return codec.rounding(state.levels, scaled._replace(row=state.row), widths, codes)

    state = _State(codec.levels, scaled.row, jnp.zeros(0), jnp.zeros(0))
    codes, value, _ = sweep.error_feedback(weight, factor, rounding(state, None), unroll=unroll)
    state = state._replace(codes=codes, value=value)
    total = (budget.rounds + 1) * budget.sweeps

    def step(i, state):
        descend = rounding(state, state.codes)
        codes, value = sweep.coordinate_descent(weight, state.value, hessian, descend, unroll=unroll)
        state = state._replace(codes=codes, value=value)
        due = ((i + 1) % budget.sweeps == 0) & (i + 1 < total)
        return jax.lax.cond(due, lambda s: _learn(s, codec, weight, hessian, scaled, width), lambda s: s, state)

    return jax.lax.fori_loop(0, total, step, state)


def solve(problem: LayerProblem, budget: Budget, codec: Codec) -> OutlierTensor:
    """Quantizes a layer to tiles and outliers.

    Args:
      problem: the layer, without dead columns.
      budget: settings.
      codec: what codes stand for.

    Returns:
      OutlierTensor over a TiledTensor; its storage is `budget.average_bits` of out * in, to 32 bits from below.

    Raises:
      ValueError: too few bits for what every layer needs.
    """
    out, n = problem.weight.shape
    plan = _plan((out, n), budget, codec)
    # Small H_jj first: a column that is rounded early is judged by its variance given all later ones, so this order
    # makes conditional variances as uneven as they get, which is what uneven widths live on.
    order = jnp.argsort(jnp.diagonal(problem.hessian))
    hessian = problem.hessian[order][:, order]
    factor, _ = linalg.upper_factor(hessian, budget.damp)
    scaled = _fit_scales(problem.weight, plan.outliers)
    row_class = jnp.asarray(tiles.class_of_row(out, plan.classes))[jnp.argsort(jnp.argsort(-scaled.row))]
    row_order = jnp.argsort(row_class)  # as the tensor stores them: by class, in their order in the weight
    weight = problem.weight[row_order][:, order]
    scaled = Scaled(scaled.row[row_order], scaled.column[order], scaled.outlier[row_order][:, order])
    variance = (jnp.diagonal(factor) * scaled.column) ** 2
    widths, tile_of = _widths(scaled.row, row_class[row_order], variance, plan, codec.distortion)
    factor = jax.scipy.linalg.solve_triangular(factor, jnp.eye(n))
    state = _descend(weight, hessian, factor, scaled, widths[:, tile_of], codec, budget)

    rows_back, columns_back = jnp.argsort(row_order), jnp.argsort(order)
    codes = codec.stored(widths[row_class[row_order]][:, tile_of], state.codes)
    base = tiles.tiled_tensor(
        codes[rows_back][:, columns_back],
        widths,
        state.levels[: codec.count].astype(jnp.float16),
        state.row[rows_back].astype(_ROW_DTYPE),
        scaled.column[columns_back].astype(_COLUMN_DTYPE),
        row_class,
        tile_of[columns_back],
        length=plan.words,
        widest=WIDEST,
        state_bits=codec.state_bits,
    )
    value, outlier = (x[rows_back][:, columns_back].reshape(-1) for x in (state.value, scaled.outlier))
    (positions,) = jnp.nonzero(outlier, size=plan.outliers, fill_value=out * n)
    beyond = (value - base.dequantize().reshape(-1)).at[positions].get(mode="fill", fill_value=0)
    return with_outliers(base, beyond, positions.astype(jnp.int32), "float16")

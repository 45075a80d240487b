"""The tiled solver of `cmpq`: widths for tiles of channels, error feedback, descent, and levels that learn.

Rows come in classes of similar magnitude, columns in tiles of similar conditional variance; each tile of a class has a
width. All tiles of a width share their levels, which a row factor and a column factor scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import codebook, linalg, sweep, tiles
from jaxquant.allocate import allocate
from jaxquant.outliers import largest
from jaxquant.problem import LayerProblem, row_objective
from jaxquant.tensors import OutlierTensor, QuantizedTensor, with_outliers

# Widths whose levels are learned and stored; for wider codes the levels of a normal variable do as well.
_LEARNED = 4
_COUNT = 2 ** (_LEARNED + 1) - 1
_WIDEST = 8
# Iterations of the scale fit: rows, columns and outliers depend on each other, but settle at once.
_SCALE_STEPS = 6
_CG_STEPS = 10
_COLUMN_DTYPE = jnp.float8_e4m3fn


Settings = Any  # a CMPQConfig; its module imports this one


class _Plan(NamedTuple):
    """What is known from shapes and settings alone."""

    classes: int
    words: int  # of the code stream
    outliers: int


def _plan(shape: tuple[int, int], config: Settings) -> _Plan:
    """Divides the budget between the code stream and outliers; the rest is measured on an empty tensor."""
    out, n = shape
    classes = min(config.row_classes, out)
    least = int(config.outliers * out * n)

    def empty() -> QuantizedTensor:
        codes, orders = jnp.zeros(shape, jnp.uint8), (jnp.zeros(out, jnp.int32), jnp.zeros(n, jnp.int32))
        widths = jnp.zeros((classes, -(-n // tiles.TILE)), jnp.int32)
        scales = jnp.zeros(out, jnp.float16), jnp.zeros(n, _COLUMN_DTYPE)
        levels = jnp.zeros(_COUNT, jnp.float16)
        base = tiles.tiled_tensor(codes, widths, levels, *scales, *orders, length=0, widest=_WIDEST)
        return with_outliers(base, jnp.zeros(least), jnp.zeros(least, jnp.int32), "float16")

    fixed = jax.eval_shape(empty).storage_bits()
    words = int(config.average_bits * out * n - fixed) // 32
    rows = tiles.class_sizes(out, classes)[-1]
    if words < rows:
        raise ValueError(
            f"average_bits: expected more than {(fixed + 32 * rows) / (out * n):.3f} for a layer {out}x{n} with "
            f"{config.outliers:.2%} outliers and {classes} row classes, got {config.average_bits}"
        )
    # A tile takes a word per row and bit. The words that no tile can use are worth as many outliers: 16 + 16 bits each.
    full = out * _WIDEST * -(-n // tiles.TILE)
    spare = words % rows if words < full else words - full
    return _Plan(classes, words - spare, min(least + spare, out * n))


class _Scaled(NamedTuple):
    """A weight taken apart: weight ~ row[:, None] * column * (unit variance), but for outliers."""

    row: jax.Array  # [out], representable in float16
    column: jax.Array  # [in], representable in the column dtype
    outlier: jax.Array  # bool [out, in]


def _fit_scales(weight: jax.Array, count: int) -> _Scaled:
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
    return _Scaled(_stored(row, jnp.float16), _stored(column, _COLUMN_DTYPE), ~keep)


def _stored(scale: jax.Array, dtype) -> jax.Array:
    """Positive scales as their storage dtype will hold them, float32."""
    info = jnp.finfo(dtype)
    scale = jnp.clip(scale, float(info.smallest_normal), float(info.max))
    return scale.astype(dtype).astype(jnp.float32)


def _widths(row: jax.Array, variance: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Allocates widths.

    Args:
      row: float32 [out], decreasing, scales of the rows.
      variance: float32 [in], conditional variance of each input times the squared scale of its column.
      plan: the budget.

    Returns:
      (widths int32 [classes, tiles], column order int32 [in], by falling variance: tiles are runs of it).
    """
    order = jnp.argsort(-variance)
    tile = jnp.pad(variance[order], (0, -len(order) % tiles.TILE)).reshape(-1, tiles.TILE).sum(1)
    rows = jax.ops.segment_sum(row**2, tiles.class_of_row(len(row), plan.classes), plan.classes)
    options = range(_WIDEST + 1)
    distortion = np.asarray([codebook.gaussian_levels(2**b)[1] for b in options], np.float32)
    cost = (rows[:, None] * tile[None, :]).reshape(-1, 1) * distortion[None, :]
    # In words: a bit of a tile is a word for each of its rows.
    sizes = np.repeat(np.asarray(tiles.class_sizes(len(row), plan.classes), np.float32), len(tile))
    widths = allocate(cost, jnp.asarray(sizes), jnp.arange(_WIDEST + 1, dtype=jnp.float32), float(plan.words))
    return widths.reshape(plan.classes, -1), order


class _Levels(NamedTuple):
    """What the codes stand for; the outcome of learning."""

    table: jax.Array  # float32 [2**(_WIDEST + 1) - 1], all widths, as `tiles.level_table` returns it
    row: jax.Array  # float32 [out]


def _rounding(levels: _Levels, scaled: _Scaled, width: jax.Array, class_of_row: np.ndarray) -> sweep.Rounding:
    """Rounding of a column to the levels of each class's width; outliers stay as they are.

    Rows are in stored order and columns in the order of the sweep, also those of `width` int32 [classes, in].
    """
    steps = [np.arange(2**b, dtype=np.int32) + 2**b - 1 for b in range(_WIDEST + 1)]
    pad = 2**_WIDEST
    by_width = jnp.stack([jnp.pad(levels.table[s], (0, pad - len(s)), constant_values=jnp.inf) for s in steps])
    middle = jnp.where(jnp.isfinite(by_width[:, 1:]), (by_width[:, 1:] + by_width[:, :-1]) / 2, jnp.inf).reshape(-1)
    outlier = scaled.outlier.T

    def rounding(state, column, target):
        del state
        b = width[:, column][class_of_row]
        scale = levels.row * scaled.column[column]
        value = target / scale
        first, code = b * (pad - 1), jnp.zeros(b.shape, jnp.int32)
        for p in reversed(range(_WIDEST)):  # binary search; levels that a width lacks lie at infinity
            step = np.int32(2**p)
            code = code + jnp.where(value > middle[first + code + step - 1], step, np.int32(0))
        rounded = scale * levels.table[tiles.table_index(b, code)]
        return code.astype(jnp.uint8), jnp.where(outlier[column], target, rounded)

    return rounding


def _sort_levels(table: jax.Array) -> jax.Array:
    """Sorts the levels of every width."""
    parts = [jnp.sort(table[2**b - 1 : 2 ** (b + 1) - 1]) for b in range(_WIDEST + 1)]
    return jnp.concatenate(parts)


def _learn(levels, codes, value, weight, hessian, scaled, width) -> tuple[_Levels, jax.Array]:
    """Least-squares fits of the shared levels, then of the row scales, each kept only if it lowers the objective.

    Args:
      levels: _Levels now.
      codes: uint8 [out, in]; outliers have codes too, but their value is free.
      value: float32 [out, in], the current V.
      weight: float32 [out, in].
      hessian: float32 [in, in].
      scaled: _Scaled; of it the columns and outliers.
      width: int32 [out, in].

    Returns:
      (_Levels, V for the same codes), both as the tensor will hold them.
    """
    index = tiles.table_index(width, codes.astype(jnp.int32))
    fixed = jnp.where(scaled.outlier, value, 0)

    def decode(table, row):
        return jnp.where(scaled.outlier, fixed, row[:, None] * scaled.column[None, :] * table[index])

    movable = jnp.where(scaled.outlier, 0, levels.row[:, None] * scaled.column[None, :])
    change = codebook.solve_shared(weight - value, index, movable, hessian, _COUNT, _CG_STEPS)
    table = levels.table.at[:_COUNT].add(change)
    table = table.at[:_COUNT].set(table[:_COUNT].astype(jnp.float16).astype(jnp.float32))
    before, after = (row_objective(weight - decode(t, levels.row), hessian).sum() for t in (levels.table, table))
    table = jnp.where(after < before, table, levels.table)

    now = decode(table, levels.row)
    part = now - fixed
    along = part @ hessian
    slope, curvature = jnp.sum((weight - now) * along, axis=1), jnp.sum(part * along, axis=1)
    row = _stored(levels.row * (1 + slope / jnp.where(curvature > 0, curvature, jnp.inf)), jnp.float16)
    before, after = (row_objective(weight - decode(table, r), hessian) for r in (levels.row, row))
    row = jnp.where(after < before, row, levels.row)
    return _Levels(table, row), decode(table, row)


def _descend(weight, hessian, factor, scaled, widths, config) -> tuple[_Levels, jax.Array, jax.Array]:
    """Error feedback, then sweeps of coordinate descent with fits of levels and row scales between them.

    Args:
      weight: float32 [out, in]: rows in stored order, columns in the order of the sweeps, as everywhere here.
      hessian: float32 [in, in].
      factor: U of the inverse Hessian, float32 [in, in].
      scaled: _Scaled.
      widths: int32 [classes, in].
      config: settings.

    Returns:
      (levels, codes uint8 [out, in], V float32 [out, in]).
    """
    rows = tiles.class_of_row(len(weight), len(widths))
    table = tiles.level_table(jnp.zeros(0), _WIDEST)
    levels = _Levels(table, scaled.row)
    codes, value, _ = sweep.error_feedback(weight, factor, _rounding(levels, scaled, widths, rows))
    total = (config.rounds + 1) * config.sweeps

    def step(i, state):
        levels, codes, value = state
        codes, value = sweep.coordinate_descent(weight, value, hessian, _rounding(levels, scaled, widths, rows))

        def learn(_):
            new, moved = _learn(levels, codes, value, weight, hessian, scaled, widths[rows])
            return _Levels(_sort_levels(new.table), new.row), moved

        due = ((i + 1) % config.sweeps == 0) & (i + 1 < total)
        levels, value = jax.lax.cond(due, learn, lambda _: (levels, value), None)
        return levels, codes, value

    return jax.lax.fori_loop(0, total, step, (levels, codes, value))


def solve(problem: LayerProblem, config: Settings) -> OutlierTensor:
    """Quantizes a layer to tiles and outliers.

    Args:
      problem: the layer, without dead columns.
      config: settings.

    Returns:
      OutlierTensor over a TiledTensor; its storage is `config.average_bits` of out * in, to 32 bits from below.

    Raises:
      ValueError: too few bits for what every layer needs.
    """
    out, n = problem.weight.shape
    plan = _plan((out, n), config)
    # Small H_jj first: a column that is rounded early is judged by its variance given all later ones, so this order
    # makes conditional variances as uneven as they get, which is what uneven widths live on.
    order = jnp.argsort(jnp.diagonal(problem.hessian))
    hessian = problem.hessian[order][:, order]
    factor, _ = linalg.upper_factor(hessian, config.damp)
    scaled = _fit_scales(problem.weight, plan.outliers)
    row_order = jnp.argsort(-scaled.row)
    weight = problem.weight[row_order][:, order]
    scaled = _Scaled(scaled.row[row_order], scaled.column[order], scaled.outlier[row_order][:, order])
    widths, by_variance = _widths(scaled.row, (jnp.diagonal(factor) * scaled.column) ** 2, plan)
    class_of_row, tile_of = jnp.asarray(tiles.class_of_row(out, plan.classes)), jnp.argsort(by_variance) // tiles.TILE
    factor = jax.scipy.linalg.solve_triangular(factor, jnp.eye(n))
    levels, codes, value = _descend(weight, hessian, factor, scaled, widths[:, tile_of], config)

    rows_back, columns_back = jnp.argsort(row_order), jnp.argsort(order)
    base = tiles.tiled_tensor(
        codes[rows_back][:, columns_back],
        widths,
        levels.table[:_COUNT].astype(jnp.float16),
        levels.row[rows_back].astype(jnp.float16),
        scaled.column[columns_back].astype(_COLUMN_DTYPE),
        class_of_row[rows_back],
        tile_of[columns_back],
        length=plan.words,
        widest=_WIDEST,
    )
    value, outlier = (x[rows_back][:, columns_back].reshape(-1) for x in (value, scaled.outlier))
    (positions,) = jnp.nonzero(outlier, size=plan.outliers, fill_value=out * n)
    beyond = (value - base.dequantize().reshape(-1)).at[positions].get(mode="fill", fill_value=0)
    return with_outliers(base, beyond, positions.astype(jnp.int32), "float16")

"""Trellis codes with as many bits per channel as the channel deserves.

Objective and widths are those of `cmpq`: tr((W - V) H (W - V)^T), tiles of 32 columns by a class of rows, reverse
water-filling. A tile's codes are paths through a trellis (see `jaxquant.trellis`) instead of levels: the rows of a
class form a ring in every column, and error feedback and coordinate descent choose whole rings.

Reference: the composition is ours; its parts are those of CMPQ, https://arxiv.org/abs/2410.13056, QuantEase,
https://arxiv.org/abs/2309.01885, and QTIP, https://arxiv.org/abs/2406.11235.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import sweep, tile_solver, tiles, trellis
from jaxquant.methods.settings import check_budget, check_integers
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import OutlierTensor

# Rows of a ring: longer rings lose less where they close (0.03 bits at 64 rows), shorter ones are searched side by side.
_RING = 64


@dataclasses.dataclass(frozen=True)
class TrellisConfig:
    """Settings of `trellis_quantize`.

    Attributes:
      average_bits: everything that is stored, in bits over out * in.
      outliers: least share of weights kept in 16 bits; whatever codes cannot use of the budget goes there too.
      state_bits: L, 8 or 10; the table has 2**L values. Fewer are faster, more are better.
      rounds: of least-squares fits of a gain per width and of row scales, each followed by sweeps.
      sweeps: coordinate-descent sweeps in a round, and before the first.
      damp: damping of the factor, relative to mean(diag H).
    """

    average_bits: float = 2.25
    _: dataclasses.KW_ONLY
    outliers: float = 0.0007
    state_bits: int = 10
    rounds: int = 2
    sweeps: int = 1
    damp: float = 1e-4

    def __post_init__(self) -> None:
        """Checks every field."""
        check_budget(self)
        if self.state_bits not in trellis.TRELLISES:
            raise ValueError(f"state_bits: expected one of {list(trellis.TRELLISES)}, got {self.state_bits!r}")
        check_integers(self, rounds=0, sweeps=1)


def _codec(state_bits: int) -> tile_solver.Codec:
    """Values of states, times a gain for each width that learns."""
    constants, table = trellis.TRELLISES[state_bits], trellis.table(state_bits)

    def rounding(
        levels: jax.Array, scaled: tile_solver.Scaled, width: jax.Array, codes: jax.Array | None
    ) -> sweep.Rounding:
        runs = trellis.rings(tiles.class_sizes(len(scaled.row), len(width)), state_bits)
        # Only ratios matter, and squares of small scales could leave the range of float32.
        importance = (scaled.row / jnp.maximum(scaled.row.max(), jnp.finfo(jnp.float32).tiny)) ** 2
        outlier = scaled.outlier.T
        columns = None if codes is None else codes.T

        def one(state, column, target):
            del state
            b, scale = width[:, column], scaled.row * scaled.column[column]
            weight = jnp.where(outlier[column], 0, importance)
            incumbent = None if columns is None else columns[column].astype(jnp.int32)
            target_unit = target / jnp.where(scale > 0, scale, 1)
            path = trellis.search(target_unit, weight, b, levels[b][:, None] * table[None, :], runs, incumbent)
            value = scale * levels[b][runs.run] * jnp.asarray(table)[path]
            return path.astype(jnp.uint16), jnp.where(outlier[column], target, value)

        return one

    return tile_solver.Codec(
        levels=jnp.asarray(constants.gain),
        count=len(constants.gain),
        distortion=np.asarray(constants.distortion, np.float32),
        rounding=rounding,
        index=lambda width, codes: width,
        unit=lambda codes: jnp.asarray(table)[codes.astype(jnp.int32)],
        tidy=lambda levels: levels.at[0].set(0.0),
        stored=lambda width, codes: (codes.astype(jnp.int32) & (jnp.left_shift(1, width) - 1)).astype(jnp.uint8),
        state_bits=state_bits,
    )


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def trellis_quantize(problem: LayerProblem, config: TrellisConfig, *, key: jax.Array) -> OutlierTensor:
    """Quantizes a layer to trellis codes of 0 to 8 bits.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      OutlierTensor [out, in] over a `tiles.TiledTensor` with states.

    Raises:
      ValueError: wrong shapes or dtypes, or too few bits for what every layer needs.
    """
    del key
    check(problem)
    budget = tile_solver.Budget(
        config.average_bits,
        config.outliers,
        max(1, len(problem.weight) // _RING),
        config.rounds,
        config.sweeps,
        config.damp,
    )
    return tile_solver.solve(revive(problem), budget, _codec(config.state_bits))

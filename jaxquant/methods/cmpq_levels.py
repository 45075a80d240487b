"""Scalar codes of `cmpq`: every width has levels of its own, learned and shared by the whole layer."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import codebook, sweep, tiles
from jaxquant.tile_solver import WIDEST, Codec, Scaled

# Widths whose levels are learned and stored; for wider codes the levels of a normal variable do as well.
_LEARNED = 4


def _rounding(levels: jax.Array, scaled: Scaled, width: jax.Array, codes: jax.Array | None) -> sweep.Rounding:
    """Rounding of a column to the levels of each class's width; outliers stay as they are. See `Codec.rounding`."""
    del codes
    class_of_row = tiles.class_of_row(len(scaled.row), len(width))
    steps = [np.arange(2**b, dtype=np.int32) + 2**b - 1 for b in range(WIDEST + 1)]
    pad = 2**WIDEST
    by_width = jnp.stack([jnp.pad(levels[s], (0, pad - len(s)), constant_values=jnp.inf) for s in steps])
    middle = jnp.where(jnp.isfinite(by_width[:, 1:]), (by_width[:, 1:] + by_width[:, :-1]) / 2, jnp.inf).reshape(-1)
    outlier = scaled.outlier.T

    def rounding(state, column, target):
        del state
        b = width[:, column][class_of_row]
        scale = scaled.row * scaled.column[column]
        value = target / jnp.where(scale > 0, scale, 1)
        first, code = b * (pad - 1), jnp.zeros(b.shape, jnp.int32)
        for p in reversed(range(WIDEST)):  # binary search; levels that a width lacks lie at infinity
            step = np.int32(2**p)
            code = code + jnp.where(value > middle[first + code + step - 1], step, np.int32(0))
        rounded = scale * levels[tiles.table_index(b, code)]
        return code.astype(jnp.uint8), jnp.where(outlier[column], target, rounded)

    return rounding


def _sorted(levels: jax.Array) -> jax.Array:
    """Sorts the levels of every width."""
    return jnp.concatenate([jnp.sort(levels[2**b - 1 : 2 ** (b + 1) - 1]) for b in range(WIDEST + 1)])


def codec() -> Codec:
    """Levels of a normal variable to start from; those of the widths 0 to 4 learn."""
    return Codec(
        levels=tiles.level_table(jnp.zeros(0), WIDEST),
        count=2 ** (_LEARNED + 1) - 1,
        distortion=np.asarray([codebook.gaussian_levels(2**b)[1] for b in range(WIDEST + 1)], np.float32),
        rounding=_rounding,
        index=lambda width, codes: tiles.table_index(width, codes.astype(jnp.int32)),
        unit=lambda codes: 1.0,
        tidy=_sorted,
        stored=lambda width, codes: codes,
        state_bits=0,
    )

"""Lookup of partial products through XLA on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels.codebook_matmul import layout

# Slots per pass over the outputs: their tables (1 KiB each at 256 entries) and a stretch of sums stay in the first
# cache, and the sums are read and written once per pass.
_SLOTS = 16


def _sum_of_lookups(table: jax.Array, slots: jax.Array, start: int, stop: int) -> jax.Array:
    """Sums table[s, slots[s, o]] over s, for start <= o < stop: float32 [stop - start] of table [S, K], slots [S, ...].

    `slots` may be longer in both directions; it is cut inside the loop, because a copy of it would cost as much.
    """
    count = len(table)

    def add(first, step, sums):
        part = lax.dynamic_slice_in_dim(table, first, step)
        for s in range(step):
            codes = lax.dynamic_slice(slots, (first + s, start), (1, stop - start))[0]
            sums = sums + part[s].at[codes].get(mode="promise_in_bounds")
        return sums

    sums = jnp.zeros(stop - start, jnp.float32)
    whole = count // _SLOTS
    if whole:
        sums = lax.fori_loop(0, whole, lambda i, sums: add(i * _SLOTS, _SLOTS, sums), sums)
    return add(whole * _SLOTS, count % _SLOTS, sums) if count % _SLOTS else sums


def lookup_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    out: int,
) -> jax.Array:
    """Returns x @ W.T by partial products, float32 [tokens, out].

    Args:
      x: float [tokens, in].
      slots: uint8 [in / d * M, out or more], see `layout`.
      codebooks: float [R * C * M, K * d].
      scale: float [out or 1, 1] or [1, in / d], or None.
      blocks: (R, C).
      dimension: d.
      out: outputs without padding.
    """
    row_scale, column_scale = layout.split_scale(scale)
    table = layout.partial_products(x, codebooks, column_scale, blocks=blocks, dimension=dimension)
    rows = out // blocks[0]

    def token(table):  # [R, S, K]
        parts = [_sum_of_lookups(table[r], slots, r * rows, (r + 1) * rows) for r in range(blocks[0])]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    tables = jnp.moveaxis(table, 2, 0)
    y = token(tables[0])[None] if len(x) == 1 else lax.map(token, tables)
    return y if row_scale is None else y * row_scale.astype(jnp.float32)[None, :]

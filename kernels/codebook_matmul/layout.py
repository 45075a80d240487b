"""How additive codes lie for the kernels, and the table that they look up.

A product with a weight of codebook entries is a sum of partial products: y[o] = sum_s T[s, codes[s, o]] over the slots
s = (group j, codebook m), with T[(j, m), k] = x_j . C_m[k]. The table costs K / out of the dense product and is built
once per token; then a lookup and an addition stand for the d multiplications of a group. A slot's table serves all
outputs, so kernels read codes [slots, out]. Group before codebook is the order in which the table is computed.

A GPU reads words of four codes, `banked_words`. Its slots come in sets of 64, which is 64 / M groups, here codebook
before group. The 32 outputs o of a warp are looked up together and, lest their table entries meet in one of the 32 banks
of shared memory, in different orders: step i of each half of a set is slot i ^ (o % 32).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SET, LANES = 64, 32  # slots in a set, banks and threads of a warp
# Banked words uint32 [4 * sets, out, 4], codebooks float [M, K * d] and scale float [out or 1, 1] or [1, in / d] or None.
Weight = tuple[Any, Any, Any]


def to_slots(codes: jax.Array) -> jax.Array:
    """Codes [M, out, in / d] of up to 8 bits as uint8 [in / d * M, out]."""
    count, out, groups = codes.shape
    return jnp.transpose(codes, (2, 0, 1)).reshape(groups * count, out).astype(jnp.uint8)


def from_slots(slots: jax.Array, count: int) -> jax.Array:
    """Inverse of `to_slots` with M = count: uint8 [M, out, in / d]."""
    return jnp.transpose(slots.reshape(-1, count, slots.shape[-1]), (1, 2, 0))


def banked_words(codes: jax.Array) -> jax.Array:
    """Codes [M, out, in / d] of up to 8 bits, M dividing 64, as uint32 [4 * sets, out, 4]; what fills a set is zero."""
    count, out, groups = codes.shape
    codes = jnp.pad(codes.astype(jnp.uint8), ((0, 0), (0, 0), (0, -groups % (SET // count))))
    slots = jnp.transpose(codes.reshape(count, out, -1, SET // count), (2, 1, 0, 3)).reshape(-1, out, 2, LANES)
    lines = jnp.transpose(_turned(slots).reshape(-1, out, 4, 4, 4), (0, 2, 1, 3, 4))
    return lax.bitcast_convert_type(lines, jnp.uint32).reshape(-1, out, 4)


def from_banked_words(words: jax.Array, count: int, groups: int) -> jax.Array:
    """Inverse of `banked_words` with M = count and in / d = groups: uint8 [M, out, in / d]."""
    out = words.shape[1]
    lines = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1, 4, out, 16)
    slots = _turned(jnp.transpose(lines, (0, 2, 1, 3)).reshape(-1, out, 2, LANES))
    codes = jnp.transpose(slots.reshape(-1, out, count, SET // count), (2, 1, 0, 3))
    return codes.reshape(count, out, -1)[..., :groups]


def alike(weights: Sequence[Weight]) -> bool:
    """Whether weights of the same inputs differ in their outputs only, of shapes and dtypes."""
    kinds = {
        (words.shape[0], books.shape, books.dtype, None if scale is None else (scale.shape[1] > 1, scale.dtype))
        for words, books, scale in weights
    }
    return len(kinds) == 1


def _turned(slots: jax.Array) -> jax.Array:
    """Exchanges slots and steps of [sets, out, 2, 32]; its own inverse."""
    step = np.arange(LANES)[None, :] ^ (np.arange(slots.shape[1]) % LANES)[:, None]
    return jnp.take_along_axis(slots, step[None, :, None, :], axis=3)


def partial_products(
    x: jax.Array, codebooks: jax.Array, column_scale: jax.Array | None, *, blocks: tuple[int, int], dimension: int
) -> jax.Array:
    """The table of products of input groups with codebook entries.

    Args:
      x: float [tokens, in].
      codebooks: float [R * C * M, K * d].
      column_scale: float [in / d], or None for ones.
      blocks: (R, C).
      dimension: d.

    Returns:
      float32 [R, in / d * M, tokens, K].
    """
    (r, c), tokens = blocks, len(x)
    books = codebooks.astype(jnp.float32).reshape(r, c, len(codebooks) // (r * c), -1, dimension)
    groups = x.astype(jnp.float32).reshape(tokens, c, -1, dimension)
    if column_scale is not None:
        groups = groups * column_scale.astype(jnp.float32).reshape(1, c, -1, 1)
    # In this order one token's table needs no transposition.
    table = jnp.einsum("tcgj,rcmkj->ctgrmk", groups, books, precision="highest")
    return jnp.transpose(table, (3, 0, 2, 4, 1, 5)).reshape(r, -1, tokens, books.shape[3])


def split_scale(scale: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """A scale [out or 1, in / d or 1] as one of rows [out or 1] and one of groups [in / d], either None for ones."""
    if scale is None:
        return None, None
    if scale.shape[1] == 1:
        return scale[:, 0], None
    return None, scale[0]

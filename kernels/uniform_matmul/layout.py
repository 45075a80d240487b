"""How scalar codes lie for the kernels: in half words, outputs side by side.

A half word of 16 bits holds the codes of 16 // bits columns for one output: 4 of 4 bits, 5 of 3 (one bit is lost), 8 of
2; an 8-bit code takes the place of two of 4 bits, low one first. Line l of the half words holds in position p the
column p * lines + l, so that what a shift and a mask bring out of consecutive lines are consecutive columns. Lines 2r
and 2r + 1 are the low and high halves of word r: the order in which a vector of 16-bit lanes reads a vector of words.
"""

import jax
import jax.numpy as jnp
import numpy as np


def positions(bits: int) -> int:
    """Columns whose codes share a half word."""
    return 16 // bits


def num_lines(columns: int, bits: int, multiple: int) -> int:
    """Half words per output: columns / positions, rounded up to a multiple."""
    return -(-columns // (positions(bits) * multiple)) * multiple


def to_words(codes: jax.Array, bits: int, lines: int) -> jax.Array:
    """Packs codes.

    Args:
      codes: unsigned integers [out, in] below 2**bits.
      bits: 2, 3, 4 or 8.
      lines: even, at least in / positions(bits).

    Returns:
      uint32 [lines / 2, out].
    """
    count = positions(bits)
    out, columns = codes.shape
    padded = jnp.pad(codes.astype(jnp.uint32), ((0, 0), (0, count * lines - columns)))
    shift = (np.arange(count) * bits).astype(np.uint32)[None, :, None]
    halves = (padded.reshape(out, count, lines) << shift).sum(1, dtype=jnp.uint32)
    return (halves[:, 0::2] | (halves[:, 1::2] << np.uint32(16))).T


def from_words(words: jax.Array, bits: int, columns: int) -> jax.Array:
    """Inverse of `to_words`: uint8 [out, columns]."""
    count, halves = positions(bits), words.T
    lines = jnp.stack([halves & np.uint32(0xFFFF), halves >> np.uint32(16)], axis=-1).reshape(len(halves), 1, -1)
    shift = (np.arange(count) * bits).astype(np.uint32)[None, :, None]
    codes = (lines >> shift) & np.uint32(2**bits - 1)
    return codes.reshape(len(halves), -1)[:, :columns].astype(jnp.uint8)

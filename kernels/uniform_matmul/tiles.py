"""How scalar codes lie for the GPU kernel: in the order in which threads bring them to the matrix unit.

A tile is 16 outputs, a chunk as many columns as a thread's registers of one load hold codes of: 128 columns of 2 or 3
bits, 64 of 4, 32 of 8. Four chunks side by side are a block, one chunk for each warp of a warpgroup. With g, t =
lane // 4, lane % 4 of a warp's 32 lanes, a lane holds the codes of rows g and g + 8 of a tile, and of every 32 columns
of the chunk the 8 from 8 t on. Columns come in pairs, and a word holds 16 // bits of them, the first one lowest.

On a grid, a pair is a code in each half of a word, so that a mask cuts out two codes at the same place of both halves.
For tables, a pair is one number, the second code above the first. Of 3 bits, words hold five pairs, and three words
share the sixteenth pair between the bits that are left. Nothing is lost: a word holds 32 bits of codes.

Codes of entries of d columns are d such codes, their digits, the first one lowest. The entries' tables, one for every block
of the weight, follow each other along the outputs, and copies of them consist of units.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 16  # of a tile
WARPS = 4  # of a warpgroup
_MOST_PADDING = 1.25  # times the codes, what is not worth a kernel
UNIT = 64  # values of a unit, at most; copies are of a multiple of as many


def thread_words(bits: int) -> int:
    """Words of a lane and chunk, half of them for each of its rows."""
    return 6 if bits == 3 else 4


def load_words(bits: int) -> int:
    """Words that lie side by side, in one load of a lane."""
    return 2 if bits == 3 else 4


def chunk_columns(bits: int) -> int:
    """Columns of a chunk."""
    return 4 * (thread_words(bits) // 2 * 32 // bits)


def block_columns(bits: int) -> int:
    """Columns of a block."""
    return WARPS * chunk_columns(bits)


def padded_size(out: int, columns: int, bits: int) -> int:
    """Codes that fill whole tiles and blocks."""
    return -(-out // ROWS) * ROWS * -(-columns // block_columns(bits)) * block_columns(bits)


def worth_padding(out: int, columns: int, bits: int) -> bool:
    """Whether few columns are not padded to many."""
    return padded_size(out, columns, bits) <= _MOST_PADDING * out * columns


def _spread(bits: int, table: bool) -> tuple[int, int]:
    """Distances, in bits, between the codes of a pair, and between pairs."""
    return (bits, 2 * bits) if table else (16, bits)


def _left(bits: int, table: bool) -> tuple[int, int, int]:
    """Of the sixteenth pair of 3 bits: the mask of what a word holds, how far the pair is shifted per word, and where."""
    return (0b11, 2 * bits // 3, 30) if table else (0x00010001, 1, 15)


def _shifts(count: int, step: int, ndim: int) -> np.ndarray:
    """Multiples of a step, along the last of so many axes."""
    return (np.arange(count) * step).astype(np.uint32).reshape((1,) * (ndim - 1) + (count,))


def to_tiles(codes: jax.Array, bits: int, *, table: bool) -> jax.Array:
    """Packs codes.

    Args:
      codes: unsigned integers [out, in] below 2**bits.
      bits: 2, 3, 4 or 8.
      table: pairs are numbers.

    Returns:
      uint32 [tiles, blocks, thread_words / load_words, lanes of a warpgroup, load_words].
    """
    out, columns = codes.shape
    width, block = chunk_columns(bits), block_columns(bits)
    padding = ((0, -out % ROWS), (0, -columns % block))
    codes = jnp.pad(codes.astype(jnp.uint32), padding)
    tiles, blocks = len(codes) // ROWS, codes.shape[1] // block
    codes = codes.reshape(
        tiles, 2, 8, blocks, WARPS, width // 32, 4, 4, 2
    )  # tile, half, g, block, warp, 32s, t, pair, 2
    codes = codes.transpose(0, 3, 4, 2, 6, 1, 5, 7, 8)
    apart, step = _spread(bits, table)
    pairs = (codes[..., 0] | (codes[..., 1] << np.uint32(apart))).reshape(tiles, blocks, WARPS, 8, 4, 2, -1)
    count, number = 16 // bits, thread_words(bits) // 2
    words = pairs[..., : count * number].reshape(*pairs.shape[:-1], number, count) << _shifts(
        count, step, pairs.ndim + 1
    )
    words = words.sum(-1, dtype=jnp.uint32)
    if bits == 3:
        mask, part, place = _left(bits, table)
        last = (pairs[..., -1:] >> _shifts(3, part, pairs.ndim)) & np.uint32(mask)
        words = words | (last << np.uint32(place))
    side = load_words(bits)
    words = words.reshape(tiles, blocks, WARPS * 32, -1, side)
    return jnp.swapaxes(words, 2, 3)


def from_tiles(words: jax.Array, bits: int, out: int, columns: int, *, table: bool) -> jax.Array:
    """Inverse of `to_tiles`: uint8 [out, columns]."""
    tiles, blocks = words.shape[:2]
    words = jnp.swapaxes(words, 2, 3).reshape(tiles, blocks, WARPS, 8, 4, 2, -1)
    apart, step = _spread(bits, table)
    mask = np.uint32(2**bits - 1)
    both = mask | mask << np.uint32(apart)
    pairs = ((words[..., None] >> _shifts(16 // bits, step, words.ndim + 1)) & both).reshape(*words.shape[:-1], -1)
    if bits == 3:
        left, part, place = _left(bits, table)
        last = (words >> np.uint32(place)) & np.uint32(left)
        last = (last << _shifts(3, part, last.ndim)).sum(-1, keepdims=True, dtype=jnp.uint32)
        pairs = jnp.concatenate([pairs, last], axis=-1)
    codes = jnp.stack([pairs & mask, pairs >> np.uint32(apart)], axis=-1)
    codes = codes.reshape(tiles, blocks, WARPS, 8, 4, 2, chunk_columns(bits) // 32, 8)
    codes = codes.transpose(0, 5, 3, 1, 2, 6, 4, 7).reshape(tiles * ROWS, -1)
    return codes[:out, :columns].astype(jnp.uint8)


def to_digits(codes: jax.Array, bits: int, dimension: int) -> jax.Array:
    """Codes [out, in / d] of entries of d columns as unsigned integers [out, in] of `bits` bits."""
    if dimension == 1:
        return codes
    digits = codes.astype(jnp.uint32)[..., None] >> _shifts(dimension, bits, codes.ndim + 1)
    return (digits & np.uint32(2**bits - 1)).reshape(len(codes), -1)


def from_digits(digits: jax.Array, bits: int, dimension: int) -> jax.Array:
    """Inverse of `to_digits`: uint32 [out, in / d]."""
    digits = digits.astype(jnp.uint32).reshape(len(digits), -1, dimension)
    return (digits << _shifts(dimension, bits, digits.ndim)).sum(-1, dtype=jnp.uint32)


def unit_size(values: int) -> int:
    """Values of a unit, for tables of so many: part of a table or, lest it has less than 16 bytes, several."""
    return math.gcd(UNIT, max(8, values))


def to_units(tables: jax.Array) -> jax.Array:
    """Tables [R, C, values] as [C, units, unit]."""
    unit = unit_size(tables.shape[-1])
    lines = jnp.swapaxes(tables, 0, 1).reshape(tables.shape[1], -1)
    return jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % unit))).reshape(len(lines), -1, unit)


def from_units(units: jax.Array, rows: int, values: int) -> jax.Array:
    """Inverse of `to_units` for R = rows."""
    tables = units.reshape(len(units), -1)[:, : rows * values]
    return jnp.swapaxes(tables.reshape(len(units), rows, values), 0, 1)


def cover(size: int, block: int, grain: int) -> int:
    """Blocks of which a piece of a row may have a part, if pieces start at multiples of `grain`, a divisor of blocks."""
    return 1 + -(-(size - grain) // block)

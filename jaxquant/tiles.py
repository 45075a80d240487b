"""Weights whose code width changes from tile to tile, in a stream of words whose length is fixed beforehand.

Which columns deserve how many bits is known only from the data; panels of one width each would have shapes that
depend on it, and a program could neither be compiled once for many layers nor be asked for its size beforehand. Here
the words of all tiles lie one after another, and only the places of the tiles in the stream depend on the data.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import trellis
from jaxquant.codebook import gaussian_levels
from jaxquant.packing import PackedArray, pack
from jaxquant.tensors import QuantizedTensor

# Columns of a tile: one bit of each fills a word, so tiles of any width leave no gap.
TILE = 32
_WIDTH_BITS = 4


def class_sizes(rows: int, classes: int) -> tuple[int, ...]:
    """Rows of each class when `rows` are split as evenly as possible, larger classes first."""
    return tuple(rows // classes + (c < rows % classes) for c in range(classes))


def class_of_row(rows: int, classes: int) -> np.ndarray:
    """Class of each stored row, int32 [rows]."""
    return np.repeat(np.arange(classes, dtype=np.int32), class_sizes(rows, classes))


def table_index(width: jax.Array, code: jax.Array) -> jax.Array:
    """Place of a level in a table that holds the levels of all widths: 2**width - 1 + code."""
    return jnp.left_shift(np.int32(1), width) - 1 + code


def level_table(levels: jax.Array, widest: int) -> jax.Array:
    """Returns the levels of all widths, float32 [2**(widest + 1) - 1]: `levels`, then Gaussian ones."""
    stored = (levels.shape[-1] + 1).bit_length() - 2
    rest = [np.asarray(gaussian_levels(2**b)[0], np.float32) for b in range(stored + 1, widest + 1)]
    return jnp.concatenate([levels.astype(jnp.float32), *rest])


def _tile_starts(widths: jax.Array, rows: int) -> jax.Array:
    """First word of each tile, int32 [classes, tiles]: class after class, tile after tile."""
    sizes = np.asarray(class_sizes(rows, len(widths)), np.int32)
    words = (widths * sizes[:, None]).reshape(-1)
    return (jnp.cumsum(words) - words).reshape(widths.shape)


def _places(widths: jax.Array, rows: int, top: int) -> jax.Array:
    """Place in the stream of bit p of row i's codes in tile c, int32 [rows, tiles, top]; -1 where p >= width."""
    classes = class_of_row(rows, len(widths))
    starts = np.cumsum((0, *class_sizes(rows, len(widths))))[classes]
    sizes = np.asarray(class_sizes(rows, len(widths)), np.int32)[classes]
    local = (np.arange(rows) - starts).astype(np.int32)
    bit = np.arange(top, dtype=np.int32)
    place = (
        _tile_starts(widths, rows)[classes][:, :, None]
        + bit[None, None, :] * sizes[:, None, None]
        + local[:, None, None]
    )
    return jnp.where(bit[None, None, :] < widths[classes][:, :, None], place, np.int32(-1))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "widths", "levels", "row_scale", "column_scale", "row_class", "column_tile"],
    meta_fields=["widest", "state_bits"],
)
@dataclasses.dataclass(frozen=True)
class TiledTensor(QuantizedTensor):
    """weight[i, j] = row_scale[i] * column_scale[j] * table[2**b - 1 + code], with b bits for a code of this tile.

    Rows fall into classes as equal as possible (`class_sizes`), columns into tiles of 32 (the last may have fewer);
    class r and tile c have the width b = widths[r, c]. The rows and columns of a class or tile are stored side by
    side, in their order in the weight. A tile of a class with m rows is b planes of m words: bit k of word i of plane
    p is bit p of the code of row i and column k. Tiles follow each other in the stream, those of a class together;
    what is left of it is zero.

    With `state_bits` L, codes are those of a trellis (see `jaxquant.trellis`): the rows of a class are a ring in every
    column, and table[...] is gain[b] * trellis.table(L)[state], where `levels` are the gains of the widths 0 to 8.
    Without, the table holds the one level of width 0, then the two of width 1, and so on: first `levels`, then, for widths that
    `levels` does not reach, those of `codebook.gaussian_levels`, which need no storage.

    Attributes:
      words: uint32 [length].
      widths: PackedArray [classes, ceil(in / 32)], 0 to 8.
      levels: float16 or float32 [2**(b + 1) - 1], the levels of the widths 0 to some b; or gains [9].
      row_scale: float [out].
      column_scale: float [in].
      row_class: PackedArray [out].
      column_tile: PackedArray [in].
      widest: the largest width, at most 8 (static).
      state_bits: L of the trellis, or 0 for plain codes (static).
    """

    words: jax.Array
    widths: PackedArray
    levels: jax.Array
    row_scale: jax.Array
    column_scale: jax.Array
    row_class: PackedArray
    column_tile: PackedArray
    widest: int
    state_bits: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.row_scale.shape[-1], self.column_scale.shape[-1]

    def row_order(self) -> jax.Array:
        """Returns the rows of the weight in the order in which they are stored, int32 [out]."""
        return jnp.argsort(self.row_class.unpack())

    def column_order(self) -> jax.Array:
        """Returns the columns of the weight in the order in which they are stored, int32 [in]."""
        return jnp.argsort(self.column_tile.unpack())

    def codes(self) -> jax.Array:
        """Returns the codes in stored order, uint8 [out, tiles * 32]."""
        place = _places(self.widths.unpack().astype(jnp.int32), self.shape[0], self.widest)
        words = jnp.where(place >= 0, self.words[jnp.maximum(place, np.int32(0))], np.uint32(0))
        column = np.arange(TILE, dtype=np.uint32)[None, None, :]
        codes = jnp.zeros((*place.shape[:2], TILE), jnp.uint32)
        for p in range(self.widest):
            codes = codes | (((words[:, :, p, None] >> column) & np.uint32(1)) << np.uint32(p))
        return codes.reshape(len(codes), -1).astype(jnp.uint8)

    def code_widths(self) -> jax.Array:
        """Returns the width of every code in stored order, int32 [out, tiles * 32]."""
        widths = self.widths.unpack().astype(jnp.int32)[class_of_row(self.shape[0], self.widths.shape[-2])]
        return jnp.repeat(widths, TILE, axis=1)

    def code_levels(self, codes: jax.Array) -> jax.Array:
        """Returns the levels of codes [out, tiles * 32] in stored order, float32 of the same shape."""
        codes, widths = codes.astype(jnp.int32), self.code_widths()
        if not self.state_bits:
            return level_table(self.levels, self.widest)[table_index(widths, codes)]
        runs = trellis.rings(class_sizes(self.shape[0], self.widths.shape[-2]), self.state_bits)
        state = trellis.states(codes, widths, runs, self.state_bits)
        # Looked up once per tile: the derivative adds up the tiles first, not every weight in one of nine places.
        gains = self.levels.astype(jnp.float32)[self.widths.unpack().astype(jnp.int32)]
        gains = jnp.repeat(gains[class_of_row(self.shape[0], len(gains))], TILE, axis=1)
        return gains * jnp.asarray(trellis.table(self.state_bits))[state]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        values = self.code_levels(self.codes())[:, : self.shape[1]]
        rows, columns = jnp.argsort(self.row_order()), jnp.argsort(self.column_order())
        # Said to be permutations, so that the derivative need not add up.
        values = values.at[rows].get(unique_indices=True).at[:, columns].get(unique_indices=True)
        scale = self.row_scale.astype(jnp.float32)[:, None] * self.column_scale.astype(jnp.float32)[None, :]
        return values * scale

    @property
    def format(self) -> str:
        """Short description for tables."""
        mean = self.words.shape[-1] * 32 / (self.shape[0] * self.shape[1])
        kind = f"trellis of {2**self.state_bits} states, " if self.state_bits else ""
        return f"{kind}tiles of 0 to {self.widest} bits, mean {mean:.2f}, {self.widths.shape[-2]} row classes"


def pack_tiles(codes: jax.Array, widths: jax.Array, length: int, widest: int) -> jax.Array:
    """Writes codes into a stream of words.

    Args:
      codes: integers [rows, tiles * 32] in stored order, below 2**width of their tile.
      widths: int32 [classes, tiles].
      length: words of the stream; tiles that do not fit would be lost, so the caller chooses widths that do.
      widest: largest width.

    Returns:
      uint32 [length].
    """
    codes = codes.astype(jnp.uint32).reshape(len(codes), -1, TILE)
    column = np.arange(TILE, dtype=np.uint32)[None, None, :]
    planes = [(((codes >> np.uint32(p)) & np.uint32(1)) << column).sum(-1, dtype=jnp.uint32) for p in range(widest)]
    place = _places(widths, len(codes), widest)
    place = jnp.where(place >= 0, place, np.int32(length))
    return jnp.zeros(length, jnp.uint32).at[place].set(jnp.stack(planes, axis=-1), mode="drop")


def tiled_tensor(
    codes: jax.Array,
    widths: jax.Array,
    levels: jax.Array,
    row_scale: jax.Array,
    column_scale: jax.Array,
    row_class: jax.Array,
    column_tile: jax.Array,
    *,
    length: int,
    widest: int,
    state_bits: int = 0,
) -> TiledTensor:
    """Builds a TiledTensor.

    Args:
      codes: integers [out, in], in the order of the weight.
      widths: int32 [classes, tiles].
      levels: [2**(b + 1) - 1] in their storage dtype.
      row_scale: [out] in its storage dtype.
      column_scale: [in] in its storage dtype.
      row_class: int32 [out], `class_sizes(out, classes)` of each.
      column_tile: int32 [in], 32 of each but the last.
      length: words of the stream, at least as many as the widths ask for.
      widest: the largest width.
      state_bits: of a trellis, or 0.
    """
    stored = codes[jnp.argsort(row_class)][:, jnp.argsort(column_tile)]
    stored = jnp.pad(stored, ((0, 0), (0, -codes.shape[1] % TILE)))
    words = pack_tiles(stored, widths, length, widest)
    row_bits, column_bits = (max(1, (n - 1).bit_length()) for n in widths.shape)
    classes, columns = pack(row_class, row_bits), pack(column_tile, column_bits)
    return TiledTensor(
        words, pack(widths, _WIDTH_BITS), levels, row_scale, column_scale, classes, columns, widest, state_bits
    )

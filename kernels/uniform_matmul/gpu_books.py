"""Codes of entries of a table per block of the weight, on GPUs: the tables come with the codes and are read like them.

An entry is d consecutive columns, and its code lies in a thread's words as d scalar codes do (see `tiles`), so the digits
of d columns are the entry's place. Tables of the rows and columns of a step are copied to shared memory with its codes,
where threads gather entries; those of d = 1 are few enough for registers, and byte permutations.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import gpu_decode, gpu_plan
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.uniform_matmul import gpu_batch, tiles

_OCTET = 8  # consecutive columns of a thread, of every 32


@dataclasses.dataclass(frozen=True)
class BookDecoder(gpu_batch.TileDecoder):
    """Words in tiles for tables, and tables float16 [C, units, unit], see `gpu_plan.Decoder`.

    Attributes:
      dimension: d.
      block: rows and columns that share a table; columns are a multiple of 8.
    """

    dimension: int
    block: tuple[int, int]
    dtype, scaled = jnp.float16, False

    @property
    def values(self) -> int:
        """Of a table."""
        return 2 ** (self.bits * self.dimension) * self.dimension

    @property
    def unit(self) -> int:
        """Values that lie side by side."""
        return tiles.unit_size(self.values)

    @property
    def box(self) -> tuple[int, int, int]:
        """What a step reads of the tables: for its columns, of its rows' tables so many units."""
        rows, columns = self.block
        books = tiles.cover(self.rows, rows, math.gcd(self.rows, rows))
        units = tiles.cover(books * self.values, self.unit, math.gcd(self.values, self.unit))
        units += -units % (tiles.UNIT // self.unit)
        return tiles.cover(self.columns, columns, math.gcd(self.columns, columns)), units, self.unit

    def source(self, stream: int, copy: int, step: Any, row: Any) -> tuple[Any, ...]:
        """The words of a step, or its tables."""
        if stream == 0:
            return super().source(stream, copy, step, row)
        return step * self.columns // self.block[1], row // self.block[0] * self.values // self.unit, 0

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_plan.Step) -> Sequence[gr.Pairs]:
        """The fragments of a chunk."""
        words, pairs = self._words(r, call, blocks, state), []
        lines = [self._line(r, call, group, state) for group in range(self.groups)]
        for b in range(blocks):
            mine = []
            for h in range(2):
                table = self._table(r, r.row(b, h), state)
                tables = [table if line is None else r.add(table, line) for line in lines]
                mine.append(self._values(r, words[b][h], tables))
            pairs.append(mine)
        return self._fragments(pairs)

    def _line(self, r: gr.Registers, call: int, group: int, state: gpu_plan.Step) -> Any:
        """Bytes from a step's first tables to those of a thread's columns in a group of 32; None for none."""
        columns, line_bytes = self.block[1], 2 * math.prod(self.box[1:])
        first = call * tiles.chunk_columns(self.bits) + 32 * group
        if self.box[0] == 1:
            return None
        if self.columns % columns == 0 and columns % 32 == 0:
            return r.constant(first // columns * line_bytes)
        begin = r.times(state.step, self.columns)
        column = r.add(r.add(begin, r.constant(first)), r.times(r.mask(r.thread(), 3), _OCTET))
        line = r.subtract(r.divide(column, columns), r.divide(begin, columns))
        return r.times(line, line_bytes)

    def _table(self, r: gr.Registers, row: Any, state: gpu_plan.Step) -> Any:
        """Where a row's first table is; `row` is one of the warpgroup's."""
        rows, book_bytes, unit_bytes = self.block[0], 2 * self.values, 2 * self.unit
        tile = r.subtract(state.row, state.inner)
        start = r.times(r.divide(r.times(r.divide(tile, rows), book_bytes), unit_bytes), unit_bytes)
        place = r.times(r.divide(r.add(state.row, row), rows), book_bytes)
        return r.add(state.streams[1], r.subtract(place, start))

    def _values(self, r: gr.Registers, words: Sequence[Any], tables: Sequence[Any]) -> list[Any]:
        """Pairs of columns of a row's words, in the order of the columns."""
        if self.dimension == 1:
            count, planes = 2**self.bits // 2, {}
            for table in tables:
                if id(table) not in planes:
                    loads = [r.load(table, min(4, count), offset) for offset in range(0, 4 * count, 16)]
                    planes[id(table)] = gpu_batch.byte_planes(r, [word for load in loads for word in load])
            return gpu_batch.look_up(r, self.bits, words, [planes[id(table)] for table in tables])
        pairs = []
        for i, place in enumerate(self._places(r, words)):
            group = i * self.dimension // _OCTET
            pairs += r.load(r.add(tables[group], place), self.dimension // 2, 0)
        return pairs

    def _places(self, r: gr.Registers, words: Sequence[Any]) -> list[Any]:
        """Bytes from a table to the entries of a row's words, in the order of the columns."""
        width, scale = self.bits * self.dimension, self.dimension.bit_length()  # an entry has 2**scale bytes
        mask = (2**width - 1) << scale
        places = [r.mask(r.shift(x, width * i - scale), mask) for x in words for i in range(32 // width)]
        if self.bits == 3:
            places.append(gpu_batch.sixteenth(r, words, scale))
        return places


def _decoder(bits: int, inputs: int, config: gpu_plan.BlockConfig, **sizes: Any) -> BookDecoder:
    """That with the longest steps of which enough fit into shared memory."""

    def decoder(calls: int) -> BookDecoder:
        return BookDecoder(bits, inputs, config.rows, calls, gpu_batch.WIDTH, **sizes)

    return decoder(gpu_batch.step_chunks(bits, config, lambda calls: 2 * math.prod(decoder(calls).box)))


def book_matmul(
    x: jax.Array,
    words: jax.Array,
    tables: jax.Array,
    factor: jax.Array | None,
    *,
    bits: int,
    dimension: int,
    block: tuple[int, int],
    out: int,
    dtype: Any = jnp.float32,
    config: gpu_plan.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for W = factor * tables[block of the row and column][codes], [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [tiles, blocks, ...] of the codes' digits, see `tiles.to_tiles` with table = True.
      tables: float16 [C, units, unit], of a block of columns the tables of all blocks of rows, see `tiles.to_units`.
      factor: float [out], or None.
      bits: of a code per column.
      dimension: d.
      block: rows and columns that share a table.
      out: outputs.
      dtype: of the result.
      config: sizes, by default from `gpu_plan.block_config`.
    """
    config = config or gpu_plan.block_config(len(x), out)
    decoder = _decoder(bits, x.shape[1], config, dimension=dimension, block=block)
    streams = [decoder.stream(words), gpu_plan.Stream(tables, decoder.box)]
    return gpu_decode.matmul(x, streams, [], decoder, out=out, config=config, factor=factor, dtype=dtype)

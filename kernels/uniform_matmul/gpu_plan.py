"""Sizes of a product with scalar codes on a GPU, and how the work is divided."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxquant.kernels.uniform_matmul import tiles

MULTIPROCESSORS = 132  # of an H200
MOST_ROWS = 8  # of inputs, of the matrix unit
PAIR_BYTES = 256  # of a pair of levels: for 32 lanes and both rows of a lane
WARPGROUP = 128  # threads


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How the work is divided.

    Attributes:
      warpgroups: of a block of threads; they divide the columns.
      ahead: blocks of codes that a thread has on their way, at most.
      early: fetch the first codes into the second cache before the kernel before has ended.
    """

    warpgroups: int = 4
    ahead: int = 8
    early: bool = True


@dataclasses.dataclass(frozen=True)
class Book:
    """Sizes of tables of entries per block of the weight.

    Attributes:
      dimension: d, columns of an entry.
      values: of a table.
      block: rows and columns that share a table; columns are a multiple of 8.
      lines: blocks along the columns.
      line: values of all tables of a line.
    """

    dimension: int
    values: int
    block: tuple[int, int]
    lines: int
    line: int

    @property
    def count(self) -> int:
        """Tables of a line that a tile's rows have a part in."""
        return tiles.cover(tiles.ROWS, self.block[0], math.gcd(tiles.ROWS, self.block[0]))

    @property
    def line_bytes(self) -> int:
        """Bytes of a tile's tables for a block of columns."""
        return 2 * self.count * self.values


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one product.

    Attributes:
      config: division of the work.
      bits: of a code.
      tokens: at most MOST_ROWS, with tables MOST_ROWS / parts.
      parts: float16 numbers that make an input, with tables.
      columns: of x, a multiple of 8.
      out: outputs.
      blocks: of the words, along the columns.
      groups: of columns that share a scale; one for whole rows.
      table: codes name levels of rows, or entries of tables.
      dtypes: of x and y; of scale and zero where they are given.
      book: of tables per block.
    """

    config: BlockConfig
    bits: int
    tokens: int
    parts: int
    columns: int
    out: int
    blocks: int
    groups: int
    table: bool
    dtypes: dict[str, Any]
    book: Book | None = None

    @property
    def warps(self) -> int:
        """Of a block of threads."""
        return tiles.WARPS * self.config.warpgroups

    @property
    def tiles(self) -> int:
        """Of the outputs."""
        return -(-self.out // tiles.ROWS)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(self.tiles, MULTIPROCESSORS)

    @property
    def own(self) -> int:
        """Blocks of a warpgroup, at most; beyond the last one, the last one meets inputs of zero."""
        return -(-self.blocks // self.config.warpgroups)

    @property
    def turns(self) -> int:
        """Parts of a tile's columns: a thread holds the codes of one and waits for those of the next."""
        return -(-self.own // self.config.ahead)

    @property
    def steps(self) -> int:
        """Blocks of a warpgroup in a turn."""
        return -(-self.own // self.turns)

    @property
    def width(self) -> int:
        """Columns of a chunk."""
        return tiles.chunk_columns(self.bits)

    @property
    def padded(self) -> int:
        """Columns with those of no weight."""
        return self.turns * self.steps * self.config.warpgroups * tiles.block_columns(self.bits)

    @property
    def repeats(self) -> bool:
        """True where some warpgroup has a block beyond the last one."""
        return self.padded != self.blocks * tiles.block_columns(self.bits)

    @property
    def segment(self) -> int:
        """Columns of a chunk that share a scale."""
        return self.width if self.groups == 1 else math.gcd(self.width, self.columns // self.groups)

    @property
    def rows(self) -> int:
        """Rows of inputs."""
        return self.tokens * (self.parts if self.table else 3)

    @property
    def slots(self) -> int:
        """Products of the matrix unit that all tokens need on a grid, a power of two."""
        return 1 << (-(-self.tokens // 2) - 1).bit_length()

    @property
    def values(self) -> int:
        """Numbers that each thread adds to the sums of a tile."""
        return 4 // self.parts if self.table else self.slots

    @property
    def stride(self) -> int:
        """Bytes from one row of inputs to the next; 64 more than whole lines, so that no two rows meet in a bank."""
        return self.padded * (2 if self.table else 1) + 64

    def size(self, name: str) -> int:
        """Bytes of an element."""
        return jnp.dtype(self.dtypes[name]).itemsize

    def scratch(self) -> dict[str, tuple[int, Any]]:
        """Shared memory: inputs, what they were divided by, the warps' largest, the warps' sums and tables, both twice."""
        memory = {
            "inputs": (self.rows * self.stride, jnp.uint8),
            "factors": (MOST_ROWS, jnp.float32),
            "largest": (self.tokens * self.warps, jnp.uint32),
            "sums": (2 * self.warps * 32 * self.values, jnp.float32),
        }
        if self.table:
            memory["tables"] = (2 * self.table_bytes // 4, jnp.uint32)
        return memory

    @property
    def table_bytes(self) -> int:
        """Bytes of a tile's tables."""
        return 4**self.bits * PAIR_BYTES if self.book is None else self.book.lines * self.book.line_bytes

    def shared_bytes(self) -> int:
        """Bytes of shared memory, with what aligning its parts may cost."""
        return sum(count * jnp.dtype(dtype).itemsize + 1024 for count, dtype in self.scratch().values())

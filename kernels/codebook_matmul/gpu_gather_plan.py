"""How products by gathered entries are divided on a GPU: what is known when the kernel is compiled."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxquant.kernels.codebook_matmul.gpu_plan import traits
from jaxquant.kernels.codebook_matmul.layout import SET, Weight, alike
from jaxquant.prologue import Prologue

OUTPUTS = 8  # of a warp
WARP, WARPGROUP = 32, 128
_WARPS, _TILES = 32, 8  # of a block, at most
_BLOCKS = 132  # that run at once
_TOKENS = 4  # that a block has, at most
PIECE = 16  # bytes that a thread reads at once
_SHARED = 200 * 1024  # bytes, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a product, and its division: what is the same for all weights of a launch.

    Attributes:
      tokens: rows of x.
      chunk: tokens of a block.
      columns: in.
      dimension: d.
      count: M, codebooks.
      entries: K, of a codebook.
      lines: of words, 4 per set.
      turns: lines of a warp.
      tiles: of 8 outputs, of a block.
      scale: "rows", "columns" or None.
      norm: eps and offset, if the prologue is an RMSNorm.
      activation: if the prologue is a Gate.
      dtypes: of "x", "books", "y", and of "scale", "prologue" (norm's weight or gate) and "residual" if there are such.
    """

    tokens: int
    chunk: int
    columns: int
    dimension: int
    count: int
    entries: int
    lines: int
    turns: int
    tiles: int
    scale: str | None
    norm: tuple[float, float] | None
    activation: str | None
    dtypes: dict[str, Any]

    def size(self, name: str) -> int:
        """Bytes of an element."""
        return jnp.dtype(self.dtypes[name]).itemsize

    @property
    def warps(self) -> int:
        """Warps of a tile."""
        return -(-self.lines // self.turns)

    @property
    def threads(self) -> int:
        """Threads of a block, those of a last incomplete warpgroup included."""
        return -(-WARP * self.warps * self.tiles // WARPGROUP) * WARPGROUP

    @property
    def groups(self) -> int:
        """Groups of inputs in a set."""
        return SET // self.count

    @property
    def room(self) -> int:
        """Groups of inputs in shared memory: as many as the lines of all warps ask for."""
        return -(-self.turns * self.warps // 4) * self.groups

    @property
    def book_bytes(self) -> int:
        """Bytes of all codebooks."""
        return self.count * self.entries * self.dimension * self.size("books")

    @property
    def sums(self) -> int:
        """Sums of a tile and token, one per warp and output."""
        return self.warps * OUTPUTS

    @property
    def shared(self) -> tuple[int, int, int]:
        """Numbers of float32 in shared memory: inputs, codebooks, and sums, those of squares of a token and warp last."""
        sums = self.tiles * self.chunk * self.sums
        return self.chunk * self.room * self.dimension, self.book_bytes // 4, sums + self.chunk * self.threads // WARP

    def blocks(self, out: int) -> int:
        """Blocks along the outputs."""
        return -(-out // (OUTPUTS * self.tiles))


def make_plan(
    x: Any,
    weights: Sequence[Weight],
    prologue: Prologue | None = None,
    residual: Any = None,
    *,
    dimension: int,
    dtype: Any,
) -> Plan | None:
    """The plan for these arrays, of which shapes and dtypes suffice; None if the kernel does not take them together.

    It does if all but the outputs are alike, shared memory has room, and codebooks consist of the pieces that are copied.
    """
    if not alike(weights):
        return None
    words, books, _ = weights[0]
    lines, (count, columns) = len(words), books.shape
    tiles = min(_TILES, -(-sum(-(-words.shape[1] // OUTPUTS) for words, _, _ in weights) // _BLOCKS))
    turns = -(-lines // (_WARPS // tiles))
    plan = Plan(
        tokens=len(x),
        chunk=min(len(x), _TOKENS),
        columns=x.shape[1],
        dimension=dimension,
        count=count,
        entries=columns // dimension,
        lines=lines,
        turns=turns,
        tiles=tiles,
        **traits(x, weights, prologue, residual, dtype),
    )
    return plan if plan.book_bytes % PIECE == 0 and 4 * sum(plan.shared) <= _SHARED else None

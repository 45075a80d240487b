"""What the GPU kernel for several tokens asks of a format, and how it divides its work."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxquant.kernels import gpu_registers as gr

MOST_TOKENS = 256  # of one instruction
_FEW_TILES = 4
_IDLE = 16  # one of so many multiprocessors may be left without work
SHARED = 224 * 1024  # bytes of shared memory of a block, without barriers and alignment


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a kernel cuts its work.

    Attributes:
      warpgroups: that decode and multiply, 2 to 4.
      blocks: of 64 outputs per warpgroup, 1 or 2.
      tokens: per tile, a multiple of 8, at most 256.
      stages: steps in flight, at most; as many as fit.
      cores: multiprocessors.
      cluster: blocks, each with outputs of its own, that copy inputs once for all of them.
    """

    warpgroups: int = 4
    blocks: int = 1
    tokens: int = 16
    stages: int = 4
    cores: int = 132
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Outputs per tile of a block."""
        return gr.FRAGMENT_ROWS * self.blocks * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is read at each step of an array, by as few copies as possible: each costs the threads some time.

    Attributes:
      array: all strides but the last are multiples of 16 bytes.
      box: sizes of a copy, at most 256 elements each; copies follow each other in shared memory.
      copies: per step.
    """

    array: jax.Array
    box: tuple[int, ...]
    copies: int = 1

    @property
    def bytes(self) -> int:
        """Of a copy."""
        return math.prod(self.box) * self.array.dtype.itemsize


class Decoder(Protocol):
    """A format: how a step's codes become fragments, of consecutive columns.

    Attributes:
      dtype: of the fragments and of the inputs, 16 bits.
      steps: of the whole weight.
      calls: of `decode` per step.
      fragments: per call.
      width: columns of a fragment: 16, 32 or 64.
      scaled: whether a fragment's sums are multiplied by values of the last stream, whose copies have lines with one for
        each output of a tile.
    """

    @property
    def dtype(self) -> Any: ...  # noqa: D102

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def calls(self) -> int: ...  # noqa: D102

    @property
    def fragments(self) -> int: ...  # noqa: D102

    @property
    def width(self) -> int: ...  # noqa: D102

    @property
    def scaled(self) -> bool: ...  # noqa: D102

    def source(self, stream: int, copy: int, step: Any, row: Any) -> tuple[Any, ...]:
        """Where in a stream's array a copy begins, for a step and for a tile with a first output."""
        ...

    def line(self, fragment: int) -> int:
        """Of the last stream: the line of a step with the scales of a fragment, number call * fragments + i."""
        ...

    def shared(self) -> Sequence[Any]:
        """Types of the arrays that `fill` makes in shared memory."""
        ...

    def fill(self, r: gr.Registers, tables: Sequence[Any], shared: Sequence[Any], thread: Any, threads: int) -> None:
        """Makes them, once per block; every thread does a part.

        Args:
          r: the operations.
          tables: references to device memory.
          shared: addresses.
          thread: index among `threads`.
          threads: in all.
        """
        ...

    def decode(self, r: gr.Registers, call: int, blocks: int, state: "Step") -> Sequence[gr.Pairs]:
        """Returns the fragments of a call."""
        ...


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a decoder finds things.

    Attributes:
      streams: addresses of their first copies.
      shared: addresses of `Decoder.shared`.
      tables: references to device memory.
      row: first output of the warpgroup.
      inner: the same within the tile.
      step: of the weight's.
    """

    streams: Sequence[Any]
    shared: Sequence[Any]
    tables: Sequence[Any]
    row: Any
    inner: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class Shares:
    """Cuts tiles * steps into `count` equal shares of consecutive steps; arguments may be of numpy or of a kernel.

    Attributes:
      steps: of a tile.
      total: tiles * steps.
      count: shares.
    """

    steps: int
    total: int
    count: int

    def start(self, share: Any) -> Any:
        """First step of a share, and one past the last of the one before."""
        return share * self.total // self.count

    @property
    def most(self) -> int:
        """Shares that have a part of the same tile, at most."""
        first = np.arange(0, self.total, self.steps)
        return int((self.owner(first + self.steps - 1) - self.owner(first)).max()) + 1

    def owner(self, step: Any) -> Any:
        """The share that has a step."""
        return ((step + 1) * self.count - 1) // self.total


def num_shares(tiles: int, steps: int, cores: int) -> int:
    """As many shares as multiprocessors, or a few less if then shares have whole tiles or tiles have whole shares.

    Adding up the sums of a tile that is cut costs as much as the steps of many a small weight. A share of more tiles than
    _FEW_TILES loses more by idle multiprocessors than it gains.
    """
    count = min(cores, tiles * steps)
    if tiles <= count:
        even = count // tiles * tiles
    else:
        whole = -(-tiles // count)
        even = tiles // whole if tiles % whole == 0 and whole <= _FEW_TILES else 0
    return even if even * _IDLE >= count * (_IDLE - 1) else count


def block_config(tokens: int, out: int, *, scaled: bool = False) -> BlockConfig:
    """Sizes for a number of tokens and of outputs: equal tiles of tokens, few of them.

    Large tiles are what the second cache has to deliver most of: pairs of blocks read them once. Where pairs are so few that
    all their tiles would be cut, small ones have fewer parts to add up. Sums that are scaled take twice the registers, and
    those of more than 64 tokens leave none to four warpgroups.
    """
    most = MOST_TOKENS // 2 if scaled else MOST_TOKENS
    config = BlockConfig(warpgroups=2, tokens=_tile(tokens, most, 16), cluster=2)
    pairs = -(-tokens // config.tokens) * -(-out // (2 * config.rows))
    if config.tokens > most // 2 and 4 * pairs > config.cores:
        return config
    config = BlockConfig(warpgroups=2, tokens=_tile(tokens, MOST_TOKENS // 2, 8))
    tiles = -(-tokens // config.tokens) * -(-out // config.rows)
    few = tiles <= config.cores
    return config if few or config.tokens > MOST_TOKENS // 4 else dataclasses.replace(config, warpgroups=4)


def _tile(tokens: int, most: int, multiple: int) -> int:
    """Tokens of equal tiles of a multiple of tokens, at most `most`."""
    return -(-tokens // -(-tokens // most) // multiple) * multiple

"""Scalar codes on GPUs for several tokens: masks and byte permutations make them the tensor cores' left operand.

A thread's words are the codes of its rows and columns, see `tiles`. Codes of uniform grids become the integers
code - zero, which float16 and bfloat16 hold exactly; scales of groups are applied to the float32 sums of a group, scales
of rows at the end. Levels are looked up in registers, their bytes by themselves: byte permutations look up four at once.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.kernels import gpu_decode, gpu_fields, gpu_plan
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.uniform_matmul import tiles

WIDTH = 64  # columns of a fragment, at most
_STAGES = 3  # steps in flight that shared memory should hold
_PAIR = 0x10001  # a number of 16 bits times this: twice
# 1024 in float16 and 128 in bfloat16, twice: a number of up to 10 or 7 bits in their place is added to it.
_ONE_UNIT = {jnp.dtype(jnp.float16): 0x64006400, jnp.dtype(jnp.bfloat16): 0x43004300}

Planes = tuple[list[Any], list[Any]]  # low and high bytes of a table's levels, four to a register


@dataclasses.dataclass(frozen=True)
class TileDecoder:
    """What decoders of scalar codes in tiles have in common, see `gpu_plan.Decoder`.

    Attributes:
      bits: of a code.
      inputs: columns of the weight.
      rows: outputs of a tile of the product.
      calls: chunks per step, a divisor of those of a block.
      width: columns of a fragment, a divisor of those of a chunk.
    """

    bits: int
    inputs: int
    rows: int
    calls: int
    width: int

    @property
    def loads(self) -> int:
        """Of a thread for a chunk."""
        return tiles.thread_words(self.bits) // tiles.load_words(self.bits)

    @property
    def fragments(self) -> int:
        """Of a chunk."""
        return tiles.chunk_columns(self.bits) // self.width

    @property
    def groups(self) -> int:
        """Of 32 columns in a chunk."""
        return tiles.chunk_columns(self.bits) // 32

    @property
    def steps(self) -> int:
        """Steps of the whole weight: not of what fills its last block."""
        return -(-self.inputs // self.columns)

    @property
    def columns(self) -> int:
        """Of a step."""
        return self.calls * tiles.chunk_columns(self.bits)

    def source(self, stream: int, copy: int, step: Any, row: Any) -> tuple[Any, ...]:
        """The words of a step."""
        del stream, copy
        parts = tiles.WARPS // self.calls  # steps of a block
        return row // tiles.ROWS, step // parts, 0, step % parts * self.calls, 0

    def stream(self, words: jax.Array) -> gpu_plan.Stream:
        """Words in tiles as the first stream."""
        side = tiles.load_words(self.bits)
        words = words.reshape(*words.shape[:2], self.loads, tiles.WARPS, 32 * side)
        return gpu_plan.Stream(words, (self.rows // tiles.ROWS, 1, self.loads, self.calls, 32 * side))

    def line(self, fragment: int) -> int:
        """There are no scales."""
        raise NotImplementedError

    def shared(self) -> Sequence[Any]:
        """Nothing."""
        return []

    def fill(self, r: gr.Registers, tables: Sequence[Any], shared: Sequence[Any], thread: Any, threads: int) -> None:
        """Makes nothing."""

    def _words(self, r: gr.Registers, call: int, blocks: int, state: gpu_plan.Step) -> list[list[list[Any]]]:
        """Words of a thread for a chunk: [block][h]."""
        side, words = tiles.load_words(self.bits), []
        load = 32 * 4 * side  # bytes of a chunk
        tile = load * self.loads * self.calls
        warp, lane = r.shift(r.thread(), 5), r.mask(r.thread(), 31)
        start = r.add(state.streams[0], r.add(r.times(lane, 4 * side), r.times(warp, tile)))
        start = r.add(start, r.times(state.inner, tile // tiles.ROWS))
        for b in range(blocks):
            mine = []
            for i in range(self.loads):
                mine += r.load(start, side, b * tiles.WARPS * tile + (i * self.calls + call) * load)
            words.append([mine[: len(mine) // 2], mine[len(mine) // 2 :]])
        return words

    def _fragments(self, pairs: list[list[list[Any]]]) -> list[gr.Pairs]:
        """Fragments of a chunk's pairs [block][h][columns / 8]."""
        eights = self.width // 8
        return [
            [[[rows[h][f * eights + k] for h in range(2)] for k in range(eights)] for rows in pairs]
            for f in range(self.fragments)
        ]


@dataclasses.dataclass(frozen=True)
class UniformDecoder(TileDecoder):
    """Words in tiles, perhaps zeros uint8 [groups, out] and scales [groups, out].

    Attributes:
      group: columns that share a zero and a scale.
      has_zero: if not, zero is 2**(bits - 1).
      scaled: whether there are scales.
      dtype: float16 or bfloat16.
    """

    group: int
    has_zero: bool
    scaled: bool
    dtype: Any

    def source(self, stream: int, copy: int, step: Any, row: Any) -> tuple[Any, ...]:
        """The words of a step, or the lines of its groups."""
        if stream == 0:
            return super().source(stream, copy, step, row)
        return (step * self.columns + copy * self.width) // self.group, row

    def line(self, fragment: int) -> int:
        """Of a fragment's group among those of a step: all are copied at once, unless that depends on the step."""
        return fragment * self.width // self.group if self._aligned else fragment

    @property
    def _aligned(self) -> bool:
        return self.columns % self.group == 0 or self.group % self.columns == 0

    def lines(self, array: jax.Array) -> gpu_plan.Stream:
        """Zeros or scales [groups, out] as a stream."""
        fragments = self.calls * self.fragments
        count, copies = (self.line(fragments - 1) + 1, 1) if self._aligned else (1, fragments)
        return gpu_plan.Stream(gpu_fields.pad_lines(array), (count, self.rows), copies)

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_plan.Step) -> Sequence[gr.Pairs]:
        """The fragments of a chunk."""
        words = self._words(r, call, blocks, state)
        numbers = [[[self._number(r, x) for x in self._codes(r, mine)] for mine in rows] for rows in words]
        fragments = self._fragments(numbers)
        for f, fragment in enumerate(fragments):
            zeros = self._zeros(r, blocks, state, self.line(call * self.fragments + f))
            for b, k, h in np.ndindex(blocks, len(fragment[0]), 2):
                fragment[b][k][h] = self._subtract(r, fragment[b][k][h], zeros[b][h])
        return fragments

    def _codes(self, r: gr.Registers, words: list[Any]) -> list[Any]:
        """Pairs of codes, one in each half of a register."""
        mask = (2**self.bits - 1) * _PAIR
        codes = [r.mask(r.shift(x, self.bits * i), mask) for x in words for i in range(16 // self.bits)]
        if self.bits == 3:  # the sixteenth pair is in the words' last bits
            last = [r.shift(r.mask(x, 0x8000 * _PAIR), 15 - i) for i, x in enumerate(words)]
            codes.append(r.either(r.either(last[0], last[1]), last[2]))
        return codes

    def _number(self, r: gr.Registers, codes: Any) -> Any:
        """Two codes as floating-point numbers, all greater by the same number."""
        one = _ONE_UNIT[jnp.dtype(self.dtype)]
        if self.bits < 8 or self.dtype == jnp.float16:
            return r.either(codes, r.constant(one))
        # A bfloat16 takes 7 bits in its unit's place; the eighth becomes 128 by multiplication.
        low = self._subtract(r, r.either(r.mask(codes, 0x7F * _PAIR), r.constant(one)), r.constant(one))
        return r.packed("add.rn.bf16x2", low, r.times(r.mask(codes, 0x80 * _PAIR), (one & 0xFFFF) >> 7))

    def _subtract(self, r: gr.Registers, a: Any, b: Any) -> Any:
        return r.packed("sub.rn.bf16x2" if self.dtype == jnp.bfloat16 else "sub.f16x2", a, b)

    def _zeros(self, r: gr.Registers, blocks: int, state: gpu_plan.Step, line: int) -> list[list[Any]]:
        """What is subtracted from the numbers of the thread's rows, twice each: [block][h]."""
        if not self.has_zero:
            return [[self._number(r, r.constant(2 ** (self.bits - 1) * _PAIR))] * 2] * blocks
        start = r.add(state.streams[1], r.add(state.inner, r.constant(line * self.rows)))
        codes = [[r.load_byte(r.add(start, r.row(b, h))) for h in range(2)] for b in range(blocks)]
        return [[self._number(r, r.times(code, _PAIR)) for code in rows] for rows in codes]


@dataclasses.dataclass(frozen=True)
class LevelDecoder(TileDecoder):
    """Words in tiles for tables, and levels float16 [out, 2**bits].

    Attributes:
      out: rows of the table.
    """

    out: int
    dtype, scaled = jnp.float16, False

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_plan.Step) -> Sequence[gr.Pairs]:
        """The fragments of a chunk."""
        words, pairs = self._words(r, call, blocks, state), []
        for b in range(blocks):
            planes = [self._planes(r, state.tables[0], r.add(state.row, r.row(b, h))) for h in range(2)]
            pairs.append([look_up(r, self.bits, words[b][h], [planes[h]] * self.groups) for h in range(2)])
        return self._fragments(pairs)

    def _planes(self, r: gr.Registers, levels: Any, row: Any) -> Planes:
        """Those of a row's levels."""
        row_bytes, words = 2 * 2**self.bits, []
        start = r.times(r.least(row, self.out - 1), row_bytes)
        for offset in range(0, row_bytes, 16):
            words += r.load_global(levels, r.add(start, r.constant(offset)), min(4, row_bytes // 4))
        return byte_planes(r, words)


def byte_planes(r: gr.Registers, words: Sequence[Any]) -> Planes:
    """Bytes of the levels of a table, of which a word holds two."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    low, high = r.constant(0x6420), r.constant(0x7531)
    return [r.permute(a, b, low) for a, b in pairs], [r.permute(a, b, high) for a, b in pairs]


def look_up(r: gr.Registers, bits: int, words: Sequence[Any], planes: Sequence[Planes]) -> list[Any]:
    """Pairs of levels of a row's words, in the order of the columns; a table for every 32 columns."""
    pairs = []
    if bits == 4:
        for i, half in enumerate(half for word in words for half in (word, r.shift(word, 16))):
            low, high = _four_of_sixteen(r, half, planes[i // 2])
            pairs += [r.permute(low, high, r.constant(order)) for order in (0x5140, 0x7362)]
        return pairs
    codes = [r.shift(x, 2 * bits * i) for x in words for i in range(16 // bits)]
    if bits == 3:
        codes.append(sixteenth(r, words, 0))
    one = 2**bits - 1
    for i, code in enumerate(codes):
        second = r.mask(r.shift(code, bits - 4), one << 4)
        selector = r.either(r.mask(code, one), second)
        low, high = (r.permute(plane[0], plane[-1], selector) for plane in planes[i // 4])
        pairs.append(r.permute(low, high, r.constant(0x5140)))
    return pairs


def sixteenth(r: gr.Registers, words: Sequence[Any], at: int) -> Any:
    """The sixteenth pair of 3 bits, two bits of which are in each word's last bits, shifted to bit `at`."""
    last = [r.shift(r.mask(x, 3 << 30), 30 - at - 2 * i) for i, x in enumerate(words)]
    return r.either(r.either(last[0], last[1]), last[2])


def _four_of_sixteen(r: gr.Registers, codes: Any, planes: Planes) -> list[Any]:
    """Low and high bytes of four levels: lookups in both halves of the levels, and a choice by the codes' last bit."""
    selector = r.mask(codes, 0x7777)
    choice = r.either(r.mask(r.shift(codes, 1), 0x4444), r.constant(0x3210))
    return [r.permute(r.permute(a, b, selector), r.permute(c, d, selector), choice) for a, b, c, d in planes]


def step_chunks(bits: int, config: gpu_plan.BlockConfig, more: Callable[[int], int] = lambda _: 0) -> int:
    """Chunks of the longest step of which enough fit into shared memory, with `more(chunks)` bytes beside codes and inputs."""
    chunk = tiles.chunk_columns(bits) * (2 * config.tokens + config.rows * bits // 8)  # bytes
    return next((calls for calls in (4, 2) if _STAGES * (calls * chunk + more(calls)) <= gpu_plan.SHARED), 1)


def uniform_matmul(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: gpu_plan.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for W = scale * (codes - zero), [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [tiles, blocks, ...], see `tiles.to_tiles` with table = False.
      scale: float [groups, out], groups of a multiple of 32 columns.
      zero: uint32 [groups, out * bits / 32, rounded up], codes packed along out; or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
      dtype: of the result.
      config: sizes, by default from `gpu_plan.block_config`.
    """
    (groups, out), columns = scale.shape, x.shape[1]
    scaled = groups > 1
    config = config or gpu_plan.block_config(len(x), out, scaled=scaled)
    calls = step_chunks(bits, config)
    group = columns // groups if scaled else words.shape[1] * tiles.block_columns(bits)
    half = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float16
    width = math.gcd(WIDTH, tiles.chunk_columns(bits), group)
    decoder = UniformDecoder(bits, columns, config.rows, calls, width, group, zero is not None, scaled, half)
    streams = [decoder.stream(words)]
    if zero is not None:
        streams.append(decoder.lines(gpu_fields.unpack(zero, bits, out)))
    if scaled:
        streams.append(decoder.lines(scale))
    factor = gpu_fields.row_factor([None if scaled else scale[0]], out)
    return gpu_decode.matmul(x, streams, [], decoder, out=out, config=config, factor=factor, dtype=dtype)


def level_matmul(
    x: jax.Array,
    words: jax.Array,
    levels: jax.Array,
    scale: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: gpu_plan.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for W = scale * levels[row, codes], [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [tiles, blocks, ...], see `tiles.to_tiles` with table = True.
      levels: float [out, 2**bits].
      scale: float [out, 1] or [1, in], or None.
      bits: 2, 3 or 4.
      dtype: of the result.
      config: sizes, by default from `gpu_plan.block_config`.
    """
    out, config = len(levels), config or gpu_plan.block_config(len(x), len(levels))
    levels, level_scale = gpu_fields.as_half(levels)
    row_scale = None if scale is None or scale.shape[1] > 1 else scale[:, 0]
    if scale is not None and row_scale is None:
        x = x.astype(jnp.float32) * scale.astype(jnp.float32)
    decoder = LevelDecoder(bits, x.shape[1], config.rows, step_chunks(bits, config), WIDTH, out)
    factor = gpu_fields.row_factor([row_scale, None if level_scale is None else level_scale[:, 0]], out)
    return gpu_decode.matmul(
        x, [decoder.stream(words)], [levels], decoder, out=out, config=config, factor=factor, dtype=dtype
    )

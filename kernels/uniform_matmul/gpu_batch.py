"""Scalar codes on GPUs for several tokens: shifts and byte permutations make them the tensor cores' left operand.

A half word's position is a stretch of consecutive columns (see `layout`), so a word brings pairs of columns for as many
fragments as it has positions, each with inputs of its own. Codes of uniform grids become the integers code - zero,
which float16 and bfloat16 hold exactly; scales of groups are applied to the float32 sums of a group, scales of rows at
the end. Levels are looked up in registers, their bytes by themselves, because byte permutations look up four at once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import gpu_decode
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.uniform_matmul import layout

_STEPS = (64, 32, 16)  # half words per step, and columns of a fragment at most
_STAGES = 3  # steps in flight that shared memory should hold
# 1024 in float16 and 128 in bfloat16, twice: a number of up to 10 or 7 bits in their place is added to it.
_ONE_UNIT = {jnp.dtype(jnp.float16): 0x64006400, jnp.dtype(jnp.bfloat16): 0x43004300}
_PAIR = 0x10001  # a number of 16 bits times this: twice


@dataclasses.dataclass(frozen=True)
class _WordDecoder:
    """What uniform codes and levels have in common, see `gpu_decode.Decoder`.

    Attributes:
      bits: of a code.
      lines: half words per output, a multiple of `step`.
      step: lines of a step, one of _STEPS.
      width: columns of a fragment, a divisor of `step`.
    """

    bits: int
    lines: int
    step: int
    width: int

    calls = 1

    @property
    def steps(self) -> int:
        """Steps of the whole weight."""
        return self.lines // self.step

    @property
    def fragments(self) -> int:
        """Fragments per step: positions, and within them stretches."""
        return layout.positions(self.bits) * self.step // self.width

    def column(self, step: Any, fragment: int) -> Any:
        """First input of a fragment."""
        position, stretch = divmod(fragment, self.step // self.width)
        return step * self.step + (position * self.lines + stretch * self.width)

    def stream_row(self, stream: int, step: Any, copy: int) -> Any:
        """First row of words."""
        del stream, copy
        return step * (self.step // 2)

    def shared(self) -> Sequence[Any]:
        """Nothing."""
        return []

    def fill(self, r: gr.Registers, tables: Sequence[Any], shared: Sequence[Any], thread: Any, threads: int) -> None:
        """Makes nothing."""

    def _words(self, r: gr.Registers, blocks: int, state: gpu_decode.Step) -> list[list[Any]]:
        """Words of the thread's rows: [column // 8 of a position][row]."""
        pitch = state.pitches[0][0]
        start = r.add(state.streams[0], r.times(r.first_row(blocks), 4))
        start = r.add(start, r.times(r.mask(r.thread(), 3), pitch))
        return [r.load(start, 2 * blocks, 4 * k * pitch) for k in range(self.step // 8)]

    def _fragments(self, blocks: int, value: Any) -> list[gr.Pairs]:
        """Fragments of value(fragment, position, column // 8 of the position, row)."""
        eights, stretches = self.width // 8, self.step // self.width
        return [
            [
                [
                    [value(f, f // stretches, f % stretches * eights + k, 2 * b + h) for h in range(2)]
                    for k in range(eights)
                ]
                for b in range(blocks)
            ]
            for f in range(self.fragments)
        ]


@dataclasses.dataclass(frozen=True)
class UniformDecoder(_WordDecoder):
    """Words uint32 [lines / 2, out], perhaps zeros uint8 [groups, out] and scales [groups, out].

    Attributes:
      group: columns that share a zero and a scale, None for all.
      has_zero: if not, zero is 2**(bits - 1).
      scaled: whether there are scales.
      dtype: float16 or bfloat16.
    """

    group: int | None
    has_zero: bool
    scaled: bool
    dtype: Any

    def stream_row(self, stream: int, step: Any, copy: int) -> Any:
        """First row of words, or of a fragment's group."""
        if stream == 0:
            return step * (self.step // 2)
        return 0 if self.group is None else self.column(step, copy) // self.group

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_decode.Step) -> Sequence[gr.Pairs]:
        """All fragments of a step."""
        del call
        words, one = self._words(r, blocks, state), _ONE_UNIT[jnp.dtype(self.dtype)]
        zeros = {f: self._zeros(r, blocks, state, f) for f in range(self.fragments if self.group else 1)}

        def value(fragment, position, k, row):
            word, zero = r.shift(words[k][row], self.bits * position), zeros[fragment if self.group else 0][row]
            codes = r.mask(word, (2**self.bits - 1) * _PAIR)
            return self._subtract(r, self._numbers(r, codes, one), zero)

        return self._fragments(blocks, value)

    def _subtract(self, r: gr.Registers, a: Any, b: Any) -> Any:
        return r.packed("sub.rn.bf16x2" if self.dtype == jnp.bfloat16 else "sub.f16x2", a, b)

    def _numbers(self, r: gr.Registers, codes: Any, one: int) -> Any:
        """Two codes as floating-point numbers, all greater by the same number."""
        if self.bits < 8 or self.dtype == jnp.float16:
            return r.either(codes, r.constant(one))
        # A bfloat16 takes 7 bits in its unit's place; the eighth becomes 128 by multiplication.
        low = self._subtract(r, r.either(r.mask(codes, 0x7F * _PAIR), r.constant(one)), r.constant(one))
        return r.packed("add.rn.bf16x2", low, r.times(r.mask(codes, 0x80 * _PAIR), (one & 0xFFFF) >> 7))

    def _zeros(self, r: gr.Registers, blocks: int, state: gpu_decode.Step, copy: int) -> list[Any]:
        """What is subtracted from the codes of the thread's rows, twice each."""
        if not self.has_zero:
            zeros = [r.constant(2 ** (self.bits - 1) * _PAIR)] * (2 * blocks)
        else:
            start = r.add(state.streams[1], r.first_row(blocks))
            word = r.load(start, blocks // 2, copy * state.pitches[1][1])[0]
            zeros = [r.times(r.mask(r.shift(word, 8 * row), 255), _PAIR) for row in range(2 * blocks)]
        one = _ONE_UNIT[jnp.dtype(self.dtype)]
        return [self._numbers(r, zero, one) for zero in zeros]


@dataclasses.dataclass(frozen=True)
class LevelDecoder(_WordDecoder):
    """Words uint32 [lines / 2, out] and a table of levels float16 [out, 2**bits].

    Attributes:
      out: rows of the table.
    """

    out: int
    dtype, scaled = jnp.float16, False

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_decode.Step) -> Sequence[gr.Pairs]:
        """All fragments of a step."""
        del call
        first = r.add(state.row, r.first_row(blocks))
        tables = [self._planes(r, state.tables[0], r.add(first, r.constant(i))) for i in range(2 * blocks)]
        words = self._words(r, blocks, state)
        look_up = self._look_up_nibbles if self.bits == 4 else self._look_up
        pairs = [[look_up(r, word, tables[row]) for row, word in enumerate(line)] for line in words]
        return self._fragments(blocks, lambda fragment, position, k, row: pairs[k][row][position])

    def _planes(self, r: gr.Registers, levels: Any, row: Any) -> tuple[list[Any], list[Any]]:
        """Low and high bytes of a row's levels, four to a register."""
        row_bytes = 2 * 2**self.bits
        start = r.times(r.least(row, self.out - 1), row_bytes)
        words = []
        for offset in range(0, row_bytes, 16):
            words += r.load_global(levels, r.add(start, r.constant(offset)), min(4, row_bytes // 4))
        pairs = list(zip(words[::2], words[1::2], strict=True))
        low, high = r.constant(0x6420), r.constant(0x7531)
        return [r.permute(a, b, low) for a, b in pairs], [r.permute(a, b, high) for a, b in pairs]

    def _look_up(self, r: gr.Registers, word: Any, planes: tuple[list[Any], list[Any]]) -> list[Any]:
        """Pairs of levels of a word's positions, for up to 3 bits: two lookups of one byte each at once."""
        pairs = []
        for position in range(layout.positions(self.bits)):
            code = r.mask(r.shift(word, self.bits * position), (2**self.bits - 1) * _PAIR)
            selector = r.mask(r.either(code, r.shift(code, 12)), 0x77)
            low, high = (r.permute(plane[0], plane[-1], selector) for plane in planes)
            pairs.append(r.permute(low, high, r.constant(0x5140)))
        return pairs

    def _look_up_nibbles(self, r: gr.Registers, word: Any, planes: tuple[list[Any], list[Any]]) -> list[Any]:
        """The same for 4 bits: four lookups at once in each half of the 16 levels, then a choice between them."""
        halves = []
        for half in (word, r.shift(word, 16)):
            selector = r.mask(half, 0x7777)
            choice = r.either(r.mask(r.shift(half, 1), 0x4444), r.constant(0x3210))
            low, high = (
                r.permute(r.permute(a, b, selector), r.permute(c, d, selector), choice) for a, b, c, d in planes
            )
            halves.append([r.permute(low, high, r.constant(order)) for order in (0x5140, 0x7362)])
        orders = (0x5410, 0x7632)
        return [r.permute(halves[0][i], halves[1][i], r.constant(order)) for i in range(2) for order in orders]


def _step(bits: int, config: gpu_decode.BlockConfig) -> int:
    """The longest step of which enough fit into shared memory."""
    line = 2 * (layout.positions(bits) * config.tokens + config.rows)  # bytes
    return next((step for step in _STEPS if _STAGES * step * line <= gpu_decode.SHARED), _STEPS[-1])


def uniform_matmul(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: gpu_decode.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for W = scale * (codes - zero), [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [lines / 2, out], see `layout`; lines a multiple of 64.
      scale: float [out, groups].
      zero: unsigned integers [groups, out], or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
      dtype: of the result.
      config: sizes, by default from `gpu_decode.block_config`.
    """
    (out, groups), columns = scale.shape, x.shape[1]
    x, x_scale = (x, None) if x.dtype == jnp.bfloat16 else gpu_decode.as_half(x)
    group = None if groups == 1 else columns // groups
    config = config or gpu_decode.block_config(len(x))
    step = _step(bits, config)
    width = math.gcd(step, group or step)
    decoder = UniformDecoder(bits, 2 * len(words), step, width, group, zero is not None, group is not None, x.dtype)
    streams = [gpu_decode.Stream(gpu_decode.pad_outputs(words), step // 2)]
    copies = decoder.fragments if group else 1
    if zero is not None:
        streams.append(gpu_decode.Stream(gpu_decode.pad_outputs(zero.astype(jnp.uint8)), 1, copies))
    if group is not None:
        streams.append(gpu_decode.Stream(gpu_decode.pad_outputs(scale.T), 1, copies))
    factors = gpu_decode.factors(x_scale, [scale[:, 0] if group is None else None], out)
    return gpu_decode.matmul(x, streams, [], decoder, out=out, config=config, factors=factors, dtype=dtype)


def level_matmul(
    x: jax.Array,
    words: jax.Array,
    levels: jax.Array,
    scale: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: gpu_decode.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for W = scale * levels[row, codes], [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [lines / 2, out], see `layout`; lines a multiple of 64.
      levels: float [out, 2**bits].
      scale: float [out, 1] or [1, in], or None.
      bits: 2, 3 or 4.
      dtype: of the result.
      config: sizes, by default from `gpu_decode.block_config`.
    """
    out = len(levels)
    levels, level_scale = gpu_decode.as_half(levels)
    row_scale = None if scale is None or scale.shape[1] > 1 else scale[:, 0]
    if scale is not None and row_scale is None:
        x = x.astype(jnp.float32) * scale.astype(jnp.float32)
    x, x_scale = gpu_decode.as_half(x)
    config = config or gpu_decode.block_config(len(x))
    step = _step(bits, config)
    decoder = LevelDecoder(bits, 2 * len(words), step, step, out)
    streams = [gpu_decode.Stream(gpu_decode.pad_outputs(words), step // 2)]
    factors = gpu_decode.factors(x_scale, [row_scale, None if level_scale is None else level_scale[:, 0]], out)
    return gpu_decode.matmul(x, streams, [levels], decoder, out=out, config=config, factors=factors, dtype=dtype)

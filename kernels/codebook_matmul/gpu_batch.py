"""Additive codes on GPUs for several tokens: entries are gathered from shared memory into the tensor cores' registers.

A thread gathers 16 bytes at once, an entry of 8 values or half of one of 16. Eight threads of such a load are served at a
time, one per 16 bytes of a row of banks, so the codebooks lie eight times side by side, and each of the eight threads has
its own copy: no two ever meet. Entries are added in float16, which rounds four times less than bfloat16 would.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxquant.kernels import gpu_decode, gpu_fields, gpu_plan
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.codebook_matmul import layout

_ENTRIES, _VECTOR, _COPIES = 256, 8, 8  # of a codebook; values that a thread gathers at once; copies
_VECTOR_BYTES = 2 * _VECTOR
_LINE = _VECTOR_BYTES * _COPIES  # bytes of a vector's copies
_ROWS, _WORDS = 4, 4  # rows of words of a set, words of a row and output
_PIECE = 64  # outputs whose words of a row are as many as a copy may have side by side


@dataclasses.dataclass(frozen=True)
class AdditiveDecoder:
    """Banked words uint32 [4 * sets, out / 64, 256] and codebooks float16 [M * 256, d], see `gpu_plan.Decoder`.

    Attributes:
      dimension: d, 8 or 16.
      count: M, codebooks.
      columns: of the weight.
      pieces: of 64 outputs of a tile, a power of two.
      calls: fragments of 64 columns per step, a divisor of those of a set; its codes are read anew for every step.
    """

    dimension: int
    count: int
    columns: int
    pieces: int
    calls: int

    dtype = jnp.float16
    fragments, width, scaled = 1, 64, False

    @property
    def vectors(self) -> int:
        """Of 8 values in an entry."""
        return self.dimension // _VECTOR

    @property
    def groups(self) -> int:
        """Of columns, of an entry each, in a fragment."""
        return self.width // self.dimension

    @property
    def book_bytes(self) -> int:
        """Of a codebook's copies."""
        return _ENTRIES * self.vectors * _LINE

    @property
    def parts(self) -> int:
        """Steps of a set."""
        return layout.SET // self.count // (self.groups * self.calls)

    @property
    def steps(self) -> int:
        """Steps of the whole weight: not of what fills its last set."""
        return -(-self.columns // (self.width * self.calls))

    def source(self, stream: int, copy: int, step: Any, row: Any) -> tuple[Any, ...]:
        """The words of a step's set."""
        del stream, copy
        return step // self.parts * _ROWS, row // _PIECE, 0

    def line(self, fragment: int) -> int:
        """There are no scales."""
        raise NotImplementedError

    def shared(self) -> Sequence[Any]:
        """The codebooks' copies."""
        return [plgpu.SMEM((self.count * self.book_bytes // 2,), jnp.float16)]

    def fill(self, r: gr.Registers, tables: Sequence[Any], shared: Sequence[Any], thread: Any, threads: int) -> None:
        """Copies the codebooks eight times; a thread starts with its own copy, so that stores do not meet either."""
        vectors = self.count * _ENTRIES * self.vectors
        for first in range(0, vectors, threads):
            vector = r.mask(r.add(thread, r.constant(first)), vectors - 1)
            values = r.load_global(tables[0], r.times(vector, _VECTOR_BYTES), 4)
            line = r.add(shared[0], r.times(vector, _LINE))
            for i in range(_COPIES):
                copy = r.mask(r.add(thread, r.constant(i)), _COPIES - 1)
                r.store(r.add(line, r.times(copy, _VECTOR_BYTES)), values)

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_plan.Step) -> Sequence[gr.Pairs]:
        """One fragment: thread (., c) has the columns 8 (4 u + c) and the 7 next for half u, see `gpu_inputs`."""
        thread, row_bytes = r.thread(), self.pieces * _PIECE * 4 * _WORDS
        table = r.add(state.shared[0], r.times(r.mask(thread, _COPIES - 1), _VECTOR_BYTES))
        column = r.mask(thread, 3)
        if self.vectors > 1:
            table, column = r.add(table, r.times(r.mask(column, 1), _LINE)), r.shift(column, 1)
        # The group of this thread in half 0; other halves, calls and codebooks differ from it in other bits of the slot.
        group = r.add(column, r.times(r.mask(state.step, self.parts - 1), self.groups * self.calls))
        pairs: gr.Pairs = [[[None] * 2 for _ in range(8)] for _ in range(blocks)]
        for b in range(blocks):
            for h in range(2):
                row = r.row(b, h)
                codes = r.add(state.streams[0], r.times(r.add(state.inner, row), 4 * _WORDS))
                turned = r.differ(group, r.mask(row, layout.LANES - 1))
                turned = r.add(r.mask(turned, 15), r.times(r.shift(turned, 4), row_bytes))
                for u in range(2):
                    entry: list[Any] = []
                    for m in range(self.count):
                        slot = m * (layout.SET // self.count) + self.groups * call + self.groups // 2 * u
                        place = r.differ(turned, r.constant(slot % 16 + slot // 16 * row_bytes))
                        code = r.load_byte(r.add(codes, place))
                        entry = self._add_entry(r, entry, r.add(table, r.times(code, self.vectors * _LINE)), m)
                    for j in range(4):
                        pairs[b][4 * u + j][h] = entry[j]
        return [pairs]

    def _add_entry(self, r: gr.Registers, total: list[Any], place: Any, book: int) -> list[Any]:
        """The sum of entries and another one, in 4 registers."""
        entry = r.load(place, 4, book * self.book_bytes, constant=True)
        if not total:
            return entry
        return [r.packed("add.f16x2", a, b) for a, b in zip(total, entry, strict=True)]


def _decoder(dimension: int, count: int, columns: int, config: gpu_plan.BlockConfig) -> AdditiveDecoder:
    """As long steps as leave room for three of them; of many tokens for two, lest every fragment waits for its product."""
    stages, pieces = 3 if config.tokens <= 128 else 2, config.rows // _PIECE
    if pieces & (pieces - 1):
        raise ValueError(
            f"additive decoding: expected a power of two of 64 outputs per tile, got {config.rows} outputs"
        )
    decoder = AdditiveDecoder(dimension, count, columns, pieces, layout.SET * dimension // (64 * count))
    words = layout.SET * config.rows
    while decoder.calls > 1 and (
        count * decoder.book_bytes + stages * (words + 128 * decoder.calls * config.tokens) > gpu_plan.SHARED
    ):
        decoder = dataclasses.replace(decoder, calls=decoder.calls // 2)
    return decoder


def decode_matmul(
    x: jax.Array,
    words: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    dimension: int,
    dtype: Any = jnp.float32,
    config: gpu_plan.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T, [tokens, out].

    Args:
      x: float [tokens, in].
      words: uint32 [4 * sets, out, 4], see `layout.banked_words`.
      codebooks: float [M, K * d], K at most 256.
      scale: float [out, 1] or [1, in / d], or None.
      dimension: d, 8 or 16.
      dtype: of the result.
      config: sizes, by default from `gpu_plan.block_config`.
    """
    config = config or gpu_plan.block_config(len(x), words.shape[1])
    (lines, out, _), count = words.shape, len(codebooks)
    decoder = _decoder(dimension, count, x.shape[1], config)
    row_scale, column_scale = layout.split_scale(scale)
    if column_scale is not None:
        x = x.astype(jnp.float32) * jnp.repeat(column_scale.astype(jnp.float32), dimension)[None, :]
    books = jnp.pad(codebooks, ((0, 0), (0, _ENTRIES * dimension - codebooks.shape[1])))
    books, book_scale = gpu_fields.as_half(books.reshape(1, -1))
    words = jnp.pad(words, ((0, 0), (0, -out % _PIECE), (0, 0))).reshape(lines, -1, _PIECE * _WORDS)
    stream = gpu_plan.Stream(words, (_ROWS, decoder.pieces, _PIECE * _WORDS))
    books = books.reshape(-1, dimension)
    factor = gpu_fields.row_factor([row_scale, None if book_scale is None else book_scale[0]], out)
    return gpu_decode.matmul(x, [stream], [books], decoder, out=out, config=config, factor=factor, dtype=dtype)

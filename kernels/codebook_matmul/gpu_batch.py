"""Additive codes on GPUs for several tokens: entries are gathered from shared memory into the tensor cores' registers.

A thread gathers the 16 bytes of an entry of 8 values at once. Eight threads of such a load are served at a time, one per
16 bytes of a row of banks, so the codebooks lie eight times side by side, and each of the eight threads has its own
copy: no two ever meet. Entries are added in float16, which rounds four times less than bfloat16 would.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxquant.kernels import gpu_decode
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.codebook_matmul import layout

_ENTRIES, _VECTOR, _COPIES = 256, 8, 8
_ENTRY_BYTES = 2 * _VECTOR
_LINE = _ENTRY_BYTES * _COPIES  # bytes from an entry to the next
_BOOK = _LINE * _ENTRIES  # bytes of a codebook's copies
_SHIFT = 7  # log2 of _LINE


@dataclasses.dataclass(frozen=True)
class AdditiveDecoder:
    """Slots [in / 8 * M, out] and codebooks float16 [M * 256, 8], see `gpu_decode.Decoder`.

    Attributes:
      count: M, codebooks.
      columns: of the weight.
      calls: fragments of 64 columns per step.
    """

    count: int
    columns: int
    calls: int

    dtype = jnp.float16
    fragments, width, scaled = 1, 64, False

    @property
    def rows(self) -> int:
        """Slots per step."""
        return self.calls * self.width // _VECTOR * self.count

    @property
    def steps(self) -> int:
        """Steps of the whole weight."""
        return -(-self.columns // (self.calls * self.width))

    def column(self, step: Any, fragment: int) -> Any:
        """First input of a fragment."""
        return (step * self.calls + fragment) * self.width

    def stream_row(self, stream: int, step: Any, copy: int) -> Any:
        """First slot of a step."""
        del stream, copy
        return step * self.rows

    def shared(self) -> Sequence[Any]:
        """The codebooks' copies."""
        return [plgpu.SMEM((self.count * _BOOK // 2,), jnp.float16)]

    def fill(self, r: gr.Registers, tables: Sequence[Any], shared: Sequence[Any], thread: Any, threads: int) -> None:
        """Copies the codebooks eight times; a thread starts with its own copy, so that stores do not meet either."""
        entries = self.count * _ENTRIES
        for first in range(0, entries, threads):
            entry = r.mask(r.add(thread, r.constant(first)), entries - 1)
            values = r.load_global(tables[0], r.times(entry, _ENTRY_BYTES), 4)
            line = r.add(shared[0], r.times(entry, _LINE))
            for i in range(_COPIES):
                copy = r.mask(r.add(thread, r.constant(i)), _COPIES - 1)
                r.store(r.add(line, r.times(copy, _ENTRY_BYTES)), values)

    def decode(self, r: gr.Registers, call: int, blocks: int, state: gpu_decode.Step) -> Sequence[gr.Pairs]:
        """One fragment: the entry of thread (., c) for half u is that of group 4 u + c, see `permute_columns`."""
        thread, (pitch, _) = r.thread(), state.pitches[0]
        table = r.add(state.shared[0], r.times(r.mask(thread, _COPIES - 1), _ENTRY_BYTES))
        codes = r.add(state.streams[0], r.first_row(blocks))
        codes = r.add(codes, r.times(r.mask(thread, 3), self.count * pitch))
        pairs: gr.Pairs = [[[None] * 2 for _ in range(8)] for _ in range(blocks)]
        for u in range(2):
            slot = (call * 8 + 4 * u) * self.count
            words = [r.load(codes, blocks // 2, (slot + m) * pitch)[0] for m in range(self.count)]
            for b in range(blocks):
                for h in range(2):
                    entry = self._entry(r, table, words, 2 * b + h)
                    for j in range(4):
                        pairs[b][4 * u + j][h] = entry[j]
        return [pairs]

    def _entry(self, r: gr.Registers, table: Any, words: Sequence[Any], byte: int) -> list[Any]:
        """Sum of the entries that a byte of the words of all codebooks names, in 4 registers."""
        total = None
        for m, word in enumerate(words):
            place = r.mask(r.shift(word, 8 * byte - _SHIFT), (_ENTRIES - 1) << _SHIFT)
            entry = r.load(r.add(place, table), 4, m * _BOOK, constant=True)
            total = entry if total is None else [r.packed("add.f16x2", a, b) for a, b in zip(total, entry, strict=True)]
        assert total is not None
        return total


def permute_columns(x: jax.Array) -> jax.Array:
    """Inputs [tokens, in] as fragments of gathered entries need them; in is a multiple of 32.

    In a fragment thread (., c) has columns 8 k + 2 c and the next; of its entry (c, pairs j = 0 .. 3) it puts pair j
    into k = j. So what is column 8 c + 2 j in the weight is column 8 j + 2 c in the fragment.
    """
    tokens, columns = x.shape
    return x.reshape(tokens, columns // 32, 4, 4, 2).swapaxes(2, 3).reshape(tokens, columns)


def block_config(tokens: int) -> gpu_decode.BlockConfig:
    """Sizes for a number of tokens."""
    return gpu_decode.block_config(tokens)


def decode_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    out: int,
    config: gpu_decode.BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T, float32 [tokens, out].

    Args:
      x: float [tokens, in].
      slots: uint8 [in / 8 * M, out or more], see `layout`.
      codebooks: float [M * 256, 8], or that many numbers in another shape.
      scale: float [out, 1] or [1, in / 8], or None.
      blocks: (1, 1).
      dimension: 8.
      out: outputs without padding.
      config: sizes, by default from `block_config`.
    """
    assert blocks == (1, 1)
    assert dimension == _VECTOR
    config = config or block_config(len(x))
    books, book_scale = gpu_decode.as_half(codebooks.reshape(1, -1))
    row_scale, column_scale = layout.split_scale(scale)
    if column_scale is not None:
        x = x.astype(jnp.float32) * jnp.repeat(column_scale.astype(jnp.float32), _VECTOR)[None, :]
    x, x_scale = gpu_decode.as_half(x)
    count = books.size // (_ENTRIES * _VECTOR)
    decoder = AdditiveDecoder(count, x.shape[1], 1 if config.tokens > 128 or count > 2 else 2)
    streams = [gpu_decode.Stream(gpu_decode.pad_outputs(slots), decoder.rows)]
    x = permute_columns(jnp.pad(x, ((0, 0), (0, -x.shape[1] % 32))))
    y = gpu_decode.matmul(
        x, streams, [books.reshape(-1, _VECTOR)], decoder, out=streams[0].array.shape[1], config=config
    )
    y = y[:, :out]
    for factor in (x_scale, book_scale, None if row_scale is None else row_scale.astype(jnp.float32)[None, :]):
        y = y if factor is None else y * factor
    return y

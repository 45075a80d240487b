"""Products of several tokens with weights held as codes, on Hopper GPUs: decode into the tensor cores' registers.

    y = matmul(x, streams, tables, decoder, out=out, config=config)

Weights are the left operand of `wgmma`, from registers; inputs are the right one, from shared memory. So a decoded
weight goes nowhere but to the tensor cores, and codes are read once for up to 256 tokens.

A block of threads has one warpgroup that copies (codes and inputs, several steps ahead, by TMA) and several that decode
and multiply, each its own rows of the weight. There is one block per multiprocessor, and all have the same share of the
work, a tile being cut where a share ends: see `shares`. The parts of a cut tile are added up outside, in a fixed order.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils

from jaxquant.kernels import gpu_registers as gr

MOST_TOKENS = 256  # of one instruction
SHARED = 224 * 1024  # bytes of shared memory of a block, without barriers and alignment
_COPY_REGISTERS = 40
# Registers of a thread that computes, by the number of its warpgroups: what 64 Ki registers leave.
_REGISTERS = {2: 232, 3: 152, 4: 104}
_TMA_BOX = 256  # elements of a copy along a dimension, at most
_FILLED = 9  # number of the hardware's barrier that says so


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a kernel cuts its work.

    Attributes:
      warpgroups: that decode and multiply, 2 to 4.
      blocks: of 64 outputs per warpgroup, 1 or 2.
      tokens: per tile, a multiple of 8, at most 256.
      stages: steps in flight, at most; as many as fit.
      cores: multiprocessors.
    """

    warpgroups: int = 4
    blocks: int = 1
    tokens: int = 16
    stages: int = 4
    cores: int = 132

    @property
    def rows(self) -> int:
        """Outputs per tile."""
        return gr.FRAGMENT_ROWS * self.blocks * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is read at each step of an array [rows, out * width]: `copies` times `rows` rows, for the outputs of a tile.

    Attributes:
      array: its rows are a multiple of 16 bytes.
      rows: of a copy.
      copies: per step.
      width: elements per output.
    """

    array: jax.Array
    rows: int
    copies: int = 1
    width: int = 1

    def pieces(self, outputs: int) -> int:
        """Copies of at most 256 elements of a row that a tile of outputs takes."""
        return pl.cdiv(outputs * self.width, _TMA_BOX)

    def piece(self, outputs: int) -> int:
        """Elements of such a copy's rows."""
        return outputs * self.width // self.pieces(outputs)


class Decoder(Protocol):
    """A format: how a step's codes become fragments.

    Attributes:
      dtype: of the fragments and of the inputs, 16 bits.
      steps: of the whole weight.
      calls: of `decode` per step.
      fragments: per call.
      width: columns of a fragment: 16, 32 or 64.
      scaled: whether a fragment's sums are multiplied by the values of the last stream, a copy per fragment.
    """

    dtype: Any
    steps: int
    calls: int
    fragments: int
    width: int
    scaled: bool

    def column(self, step: Any, fragment: int) -> Any:
        """First of the inputs that fragment number call * fragments + i of a step multiplies."""
        ...

    def stream_row(self, stream: int, step: Any, copy: int) -> Any:
        """First row of a stream's copy."""
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
      streams: addresses of the first of the warpgroup's outputs in the first copy's first row.
      pitches: bytes from a row to the next, from a copy to the next, and from a piece of outputs to the next.
      shared: addresses of `Decoder.shared`.
      tables: references to device memory.
      row: first output of the warpgroup.
      step: of the weight's.
    """

    streams: Sequence[Any]
    pitches: Sequence[tuple[int, int, int]]
    shared: Sequence[Any]
    tables: Sequence[Any]
    row: Any
    step: Any


def shares(tiles: int, steps: int, cores: int) -> tuple[int, np.ndarray]:
    """Cuts tiles * steps into equal shares of consecutive steps.

    Share i has the steps from i * tiles * steps // count on.

    Returns:
      count, and the number of shares that have a part of each tile.
    """
    total = tiles * steps
    count = min(cores, total)
    first = owner(np.arange(tiles) * steps, total, count)
    last = owner(np.arange(1, tiles + 1) * steps - 1, total, count)
    return count, last - first + 1


def owner(step: Any, total: int, count: int) -> Any:
    """The share that has a step."""
    return ((step + 1) * count - 1) // total


def matmul(
    x: jax.Array,
    streams: Sequence[Stream],
    tables: Sequence[jax.Array],
    decoder: Decoder,
    *,
    out: int,
    config: BlockConfig,
) -> jax.Array:
    """Returns x @ W.T, float32 [tokens, out].

    Args:
      x: [tokens, in], in the decoder's dtype; columns beyond are zero.
      streams: what is read step by step; the first are codes.
      tables: what is read otherwise.
      decoder: the format.
      out: outputs.
      config: sizes.
    """
    tokens, wanted = len(x), out
    out += -out % 4  # threads write several at once
    x = jnp.pad(x, ((0, -tokens % 8), (0, -x.shape[1] % 64)))
    token_tiles = pl.cdiv(tokens, config.tokens)
    tiles = pl.cdiv(out, config.rows) * token_tiles
    count, parts = shares(tiles, decoder.steps, config.cores)
    body = _Kernel(decoder, streams, len(tables), config, tokens, out, token_tiles, tiles * decoder.steps, count)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((int(parts.max()), tokens, out), jnp.float32),
        grid=(count,),
        grid_names=("share",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        # The barriers of Pallas would order reads and writes of shared memory by one thread: there are none.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        scratch_types=body.scratch(),
    )
    y = kernel(x, *(stream.array for stream in streams), *tables)
    # A part that no share has was never written.
    held = np.repeat(parts.reshape(-1, token_tiles), config.rows, axis=0)[:out]
    held = np.repeat(held.T, config.tokens, axis=0)[:tokens] if token_tiles > 1 else held.T
    total = y[0]
    for part in range(1, len(y)):
        total = total + jnp.where(jnp.asarray(held > part), y[part], 0)
    return total[:, :wanted]


class _Kernel:
    """The body of the kernel."""

    __name__ = "decode_matmul"

    def __init__(self, decoder, streams, num_tables, config, tokens, out, token_tiles, total, count):
        self.decoder, self.streams, self.num_tables, self.config = decoder, streams, num_tables, config
        self.tokens, self.out, self.token_tiles, self.total, self.count = tokens, out, token_tiles, total, count
        self.fragments = decoder.calls * decoder.fragments
        stage = self.fragments * config.tokens * decoder.width * 2
        stage += sum(s.copies * s.rows * config.rows * s.width * s.array.dtype.itemsize for s in streams)
        fixed = sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in decoder.shared())
        self.stages = min(config.stages, (SHARED - fixed) // stage)
        if self.stages < 2:
            raise ValueError(f"decode: shared memory has no room for two steps of {stage} bytes beside {fixed}")

    def scratch(self) -> list[Any]:
        """Shared memory and barriers."""
        config, width = self.config, self.decoder.width
        swizzle = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
        inputs = plgpu.SMEM((self.stages, self.fragments, config.tokens, width), self.decoder.dtype, transforms=swizzle)
        rows = config.rows
        codes = [
            plgpu.SMEM((self.stages, s.pieces(rows), s.copies, s.rows, s.piece(rows)), s.array.dtype)
            for s in self.streams
        ]
        copies = self.fragments + sum(s.pieces(rows) * s.copies for s in self.streams)
        filled = plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages)
        free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=self.stages)
        return [inputs, codes, list(self.decoder.shared()), filled, free]

    def __call__(self, x, *refs):
        streams, tables = refs[: len(self.streams)], refs[len(self.streams) : len(self.streams) + self.num_tables]
        y, inputs, codes, shared, filled, free = refs[len(streams) + len(tables) :]
        share, group = lax.axis_index("share"), lax.axis_index("warpgroup")
        start, stop = (lax.div((share + i) * self.total, self.count) for i in range(2))

        @pl.when(group == self.config.warpgroups)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @pl.loop(start, stop)
            def _(step):
                self._copy(step, step - start, x, streams, inputs, codes, filled, free)

        @pl.when(group < self.config.warpgroups)
        def _():
            plgpu.set_max_registers(_REGISTERS[self.config.warpgroups], action="increase")
            self._fill(tables, shared, group)

            @pl.loop(lax.div(start, self.decoder.steps), lax.div(stop - 1, self.decoder.steps) + 1)
            def _(tile):
                self._tile(tile, start, stop, share, group, y, inputs, codes, shared, tables, filled, free)

    def _place(self, tile):
        """First output and first token of a tile; tiles of the same outputs follow each other."""
        return lax.div(tile, self.token_tiles) * self.config.rows, lax.rem(tile, self.token_tiles) * self.config.tokens

    def _copy(self, step, index, x, streams, inputs, codes, filled, free):
        slot = lax.rem(index, self.stages)

        @pl.when(index >= self.stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        row, token = self._place(lax.div(step, self.decoder.steps))
        step = lax.rem(step, self.decoder.steps)
        for number, (stream, ref, to) in enumerate(zip(self.streams, streams, codes, strict=True)):
            piece = stream.piece(self.config.rows)
            for copy in range(stream.copies):
                lines = pl.ds(self.decoder.stream_row(number, step, copy), stream.rows)
                for p in range(stream.pieces(self.config.rows)):
                    source = ref.at[lines, pl.ds(row * stream.width + p * piece, piece)]
                    plgpu.copy_gmem_to_smem(source, to.at[slot, p, copy], filled.at[slot])
        for f in range(self.fragments):
            columns = pl.ds(self.decoder.column(step, f), self.decoder.width)
            source = x.at[pl.ds(token, self.config.tokens), columns]
            plgpu.copy_gmem_to_smem(source, inputs.at[slot, f], filled.at[slot])

    def _fill(self, tables, shared, group):
        if not shared:
            return
        threads = self.config.warpgroups * gr.WARPGROUP

        @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * len(tables), [plgpu.RefType()] * len(shared), gr.SCALAR))
        def fill(ctx, tables, shared, group):
            del ctx
            r = gr.Registers()
            thread = r.add(r.times(gr.scalar(group), gr.WARPGROUP), r.thread())
            self.decoder.fill(r, tables, [gr.address(ref) for ref in shared], thread, threads)
            utils.inline_ptx(f"bar.sync {_FILLED}, {threads};", convergent=True)

        fill(list(tables), list(shared), group)

    def _decode(self, call, codes, shared, tables, row, step):
        """Fragments of a call; `codes` are references to the warpgroup's outputs of all streams' first copies."""
        decoder, config = self.decoder, self.config
        pitches = []
        for stream in self.streams:
            line = stream.piece(config.rows) * stream.array.dtype.itemsize
            pitches.append((line, line * stream.rows, line * stream.rows * stream.copies))
        kind = gr.fragment_type(config.blocks, decoder.width, decoder.dtype)

        @plgpu.inline_mgpu(
            arg_types=(*([plgpu.RefType()] * len(refs) for refs in (codes, shared, tables)), gr.SCALAR, gr.SCALAR),
            return_type=(kind,) * decoder.fragments,
        )
        def decode(ctx, codes, shared, tables, row, step):
            del ctx
            addresses = [[gr.address(ref) for ref in refs] for refs in (codes, shared)]
            state = Step(addresses[0], pitches, addresses[1], tables, gr.scalar(row), gr.scalar(step))
            pairs = decoder.decode(gr.Registers(), call, config.blocks, state)
            return tuple(gr.fragment(p, decoder.dtype) for p in pairs)

        return decode(codes, list(shared), list(tables), row, step)

    def _tile(self, tile, start, stop, share, group, y, inputs, codes, shared, tables, filled, free):
        """Multiplies the steps of a tile that are within the share, and writes the sums."""
        decoder, config = self.decoder, self.config
        rows = gr.FRAGMENT_ROWS * config.blocks
        first, last = lax.max(start, tile * decoder.steps), lax.min(stop, (tile + 1) * decoder.steps)
        row, token = self._place(tile)
        row = row + group * rows
        kind = plgpu.ACC((rows, config.tokens), jnp.float32)

        def fragments(slot, step):
            step = step - tile * decoder.steps
            mine = [self._mine(number, group, ref.at[slot], 0) for number, ref in enumerate(codes)]
            for call in range(decoder.calls):
                for i, weight in enumerate(self._decode(call, mine, shared, tables, row, step)):
                    f = call * decoder.fragments + i
                    yield f, weight, inputs.at[slot, f].transpose((1, 0))

        def unscaled(sums):
            @pl.loop(first, last)
            def _(step):
                slot = lax.rem(step - start, self.stages)
                plgpu.barrier_wait(filled.at[slot])
                for _, weight, x in fragments(slot, step):
                    plgpu.wgmma_wait(0)
                    plgpu.wgmma(sums, weight, x)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return sums[...]

        def scaled(step, sums):
            slot = lax.rem(step - start, self.stages)
            plgpu.barrier_wait(filled.at[slot])
            for f, weight, x in fragments(slot, step):

                def product(part, weight=weight, x=x):
                    plgpu.wgmma(part, weight, x)
                    return part[...]

                scale = self._mine(len(codes) - 1, group, codes[-1].at[slot], f)
                sums = self._add_scaled(sums, pl.run_scoped(product, kind), scale)
            plgpu.barrier_arrive(free.at[slot])
            return sums

        if decoder.scaled:
            zeros = plgpu.layout_cast(jnp.zeros((rows, config.tokens), jnp.float32), plgpu.Layout.WGMMA)
            sums = lax.fori_loop(first, last, scaled, zeros)
        else:
            sums = pl.run_scoped(unscaled, kind)
        # The parts of a tile are numbered from the share that has its first step.
        part = share - lax.div((tile * decoder.steps + 1) * self.count - 1, self.total)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), gr.SCALAR, gr.SCALAR, gr.SCALAR))
        def store(ctx, sums, y, *place):
            del ctx
            gr.store_rows(sums, y, *map(gr.scalar, place), tokens=self.tokens, rows=self.out)

        store(sums, y, part, token, row)

    def _mine(self, number, group, ref, copy):
        """Of a copy of a stream, [pieces, copies, rows, piece], what belongs to a warpgroup; the first piece if several."""
        stream = self.streams[number]
        piece, mine = stream.piece(self.config.rows), gr.FRAGMENT_ROWS * self.config.blocks * stream.width
        size = min(piece, mine)
        if max(piece, mine) % size:
            raise ValueError(f"decode: pieces of {piece} elements do not fit warpgroups of {mine}")
        return ref.at[lax.div(group * mine, piece), copy, :, pl.ds(lax.rem(group * mine, piece), size)]

    def _add_scaled(self, sums, part, scale):
        """Sums + scale * part; `scale` refers to the warpgroup's values, one per output."""
        kind = plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType()), return_type=kind)
        def add(ctx, sums, part, scale):
            del ctx
            return gr.add_scaled(sums, part, gr.address(scale), self.streams[-1].array.dtype)

        return add(sums, part, scale)


def as_half(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Rows as float16 and the float32 factors [rows, 1] that undo their scaling, None for ones.

    Rows of other dtypes are multiplied by powers of two that bring their largest number to between 1 and 2 to the 14th,
    so that nothing overflows and little underflows.
    """
    if x.dtype == jnp.float16:
        return x, None
    x = x.astype(jnp.float32)
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=1, keepdims=True))[1] - 14
    return jnp.ldexp(x, -exponent).astype(jnp.float16), jnp.ldexp(jnp.float32(1), exponent)


def pad_outputs(array: jax.Array) -> jax.Array:
    """An array [rows, out] with zeros up to a multiple of 16 bytes, of which copies consist."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % (16 // array.dtype.itemsize))))


def block_config(tokens: int) -> BlockConfig:
    """Sizes for a number of tokens: equal tiles of tokens, few of them."""
    tile = -(-tokens // pl.cdiv(tokens, MOST_TOKENS) // 8) * 8
    if tile > 128:
        return BlockConfig(warpgroups=2, blocks=1, tokens=tile)
    return BlockConfig(warpgroups=4, blocks=1, tokens=tile)

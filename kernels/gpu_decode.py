"""Products of several tokens with weights held as codes, on Hopper GPUs: decode into the tensor cores' registers.

    y = matmul(x, streams, tables, decoder, out=out, config=config)

Weights are the left operand of `wgmma`, from registers; inputs are the right one, from shared memory. So a decoded
weight goes nowhere but to the tensor cores, and codes are read once for up to 256 tokens.

A block of threads has one warpgroup that copies (codes and inputs, several steps ahead, by TMA) and several that decode
and multiply, each its own rows of the weight. Blocks of a cluster have different rows and the same inputs, of which each
copies its part to all of them. There is one block per multiprocessor, and all have the same share of the work, a tile
being cut where a share ends: see `Shares`. The share with a tile's first steps comes to them last, and adds the sums of
the others, in their order.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils

from jaxquant.kernels import gpu_inputs, gpu_sums
from jaxquant.kernels import gpu_registers as gr
from jaxquant.kernels.gpu_plan import SHARED, BlockConfig, Decoder, Shares, Step, Stream, num_shares

_COPY_REGISTERS = 40
# Registers of a thread that computes, by the number of its warpgroups: what 64 Ki registers leave.
_REGISTERS = {2: 232, 3: 152, 4: 104}
_FILLED = 9  # number of the hardware's barrier that says so
_CLUSTER = "block"  # the axis of the blocks of a cluster


def matmul(
    x: jax.Array,
    streams: Sequence[Stream],
    tables: Sequence[jax.Array],
    decoder: Decoder,
    *,
    out: int,
    config: BlockConfig,
    factor: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Returns x @ W.T, [tokens, out].

    Args:
      x: float [tokens, in]; columns beyond are zero.
      streams: what is read step by step; the first are codes.
      tables: what is read otherwise.
      decoder: the format.
      out: outputs.
      config: sizes.
      factor: float [out] that the product is multiplied by, None for ones.
      dtype: of the result.
    """
    tokens, columns = x.shape
    if (decoder.steps - 1) * decoder.calls * decoder.fragments * decoder.width >= columns:
        # Such a step has been seen to read the inputs of another one.
        raise ValueError(f"decode: expected every step to have some of {columns} columns, got {decoder.steps} steps")
    x, of_tokens = gpu_inputs.prepare(x, decoder.dtype)
    given = [factor for factor in (of_tokens, factor) if factor is not None]
    tiles = pl.cdiv(out, config.rows * config.cluster) * pl.cdiv(tokens, config.tokens)
    count = num_shares(tiles, decoder.steps, config.cores // config.cluster)
    shares = Shares(decoder.steps, tiles * decoder.steps, count)
    body = _Kernel(
        decoder,
        streams,
        len(tables),
        config,
        shares,
        (tokens, out),
        dtype,
        [f is not None for f in (of_tokens, factor)],
    )
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((tokens, out), dtype), body.parts()),
        grid=(shares.count,),
        grid_names=("share",),
        cluster=(config.cluster,),
        cluster_names=(_CLUSTER,),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        # The barriers of Pallas would order reads and writes of shared memory by one thread: there are none.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        scratch_types=body.scratch(),
    )
    y, _ = kernel(x, *(stream.array for stream in streams), *tables, *given)
    return y


class _Kernel:
    """The body of the kernel."""

    __name__ = "decode_matmul"

    def __init__(self, decoder, streams, num_tables, config, shares, shape, dtype, factors):
        self.decoder, self.streams, self.num_tables, self.config = decoder, streams, num_tables, config
        self.shares, (self.tokens, self.rows), self.dtype, self.factors = shares, shape, dtype, factors
        self.token_tiles = pl.cdiv(self.tokens, config.tokens)
        self.groups = config.cluster * config.warpgroups  # that have rows of a tile
        self.columns = decoder.calls * decoder.fragments * decoder.width  # of a step
        stage = config.tokens * self.columns * 2
        stage += sum(s.copies * s.bytes for s in streams)
        fixed = sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in decoder.shared())
        self.stages = min(config.stages, (SHARED - fixed) // stage)
        if self.stages < 2:
            raise ValueError(f"decode: shared memory has no room for two steps of {stage} bytes beside {fixed}")

    def parts(self) -> jax.ShapeDtypeStruct:
        """Sums of the steps of tiles that a share does not begin: every share has at most one."""
        values = gr.FRAGMENT_ROWS * self.config.blocks * self.config.tokens // gr.WARPGROUP
        return jax.ShapeDtypeStruct((self.shares.count * self.groups, values // 4, gr.WARPGROUP, 4), jnp.float32)

    def scratch(self) -> list[Any]:
        """Shared memory and barriers."""
        config, width = self.config, self.decoder.width
        swizzle = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
        inputs = plgpu.SMEM((self.stages, config.tokens, self.columns), self.decoder.dtype, transforms=swizzle)
        codes = [plgpu.SMEM((self.stages, s.copies, *s.box), s.array.dtype) for s in self.streams]
        copies = 1 + sum(s.copies for s in self.streams)
        filled = plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages)
        free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=self.stages)
        if config.cluster > 1:  # what one block copies, it writes to all
            free = plgpu.ClusterBarrier(
                collective_axes=(_CLUSTER,), num_arrivals=config.warpgroups, num_barriers=self.stages
            )
        return [inputs, codes, list(self.decoder.shared()), filled, free]

    def __call__(self, x, *refs):
        split = np.cumsum([len(self.streams), self.num_tables, sum(self.factors), 2])
        streams, tables, factors, (y, parts) = (list(refs[i:j]) for i, j in zip([0, *split[:-1]], split, strict=True))
        inputs, codes, shared, filled, free = refs[split[-1] :]
        tiles = self.shares.total // self.decoder.steps
        flags = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles * self.groups,)))
        share, group, block = (lax.axis_index(name) for name in ("share", "warpgroup", _CLUSTER))
        start, stop = self.shares.start(share), self.shares.start(share + 1)

        @pl.when(group == self.config.warpgroups)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @pl.loop(start, stop)
            def _(step):
                self._copy(step, step - start, block, x, streams, inputs, codes, filled, free)

        @pl.when(group < self.config.warpgroups)
        def _():
            plgpu.set_max_registers(_REGISTERS[self.config.warpgroups], action="increase")
            self._fill(tables, shared, group)

            @pl.loop(start // self.decoder.steps, (stop - 1) // self.decoder.steps + 1)
            def _(tile):
                first, last = lax.max(start, tile * self.decoder.steps), lax.min(stop, (tile + 1) * self.decoder.steps)
                sums = self._sum(tile, first, last, start, group, block, inputs, codes, shared, tables, filled, free)
                self._finish(tile, first, share, group, block, sums, y, parts, flags, factors)

        if self.config.cluster > 1:
            self._leave()

    def _leave(self):
        """Waits for the other blocks, which may still say that they have read what this one copied."""

        @gr.inline()
        def leave(ctx):
            del ctx
            gr.ptx("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")

        leave()

    def _place(self, tile, block):
        """A block's first output, and first token, of a tile; tiles of the same outputs follow each other."""
        row = (tile // self.token_tiles * self.config.cluster + block) * self.config.rows
        return row, tile % self.token_tiles * self.config.tokens

    def _copy(self, step, index, block, x, streams, inputs, codes, filled, free):
        slot = lax.rem(index, self.stages)

        @pl.when(index >= self.stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        row, token = self._place(step // self.decoder.steps, block)
        step = step % self.decoder.steps
        for number, (stream, ref, to) in enumerate(zip(self.streams, streams, codes, strict=True)):
            for copy in range(stream.copies):
                begin = self.decoder.source(number, copy, step, row)
                source = ref.at[tuple(pl.ds(i, size) for i, size in zip(begin, stream.box, strict=True))]
                plgpu.copy_gmem_to_smem(source, to.at[slot, copy], filled.at[slot])
        source = x.at[pl.ds(token, self.config.tokens), pl.ds(step * self.columns, self.columns)]
        together = _CLUSTER if self.config.cluster > 1 else None
        plgpu.copy_gmem_to_smem(source, inputs.at[slot], filled.at[slot], collective_axes=together)

    def _fill(self, tables, shared, group):
        if not shared:
            return
        threads = self.config.warpgroups * gr.WARPGROUP

        @gr.inline(arg_types=([plgpu.RefType()] * len(tables), [plgpu.RefType()] * len(shared), gr.SCALAR))
        def fill(ctx, tables, shared, group):
            del ctx
            r = gr.Registers()
            thread = r.add(r.times(gr.scalar(group), gr.WARPGROUP), r.thread())
            self.decoder.fill(r, tables, [gr.address(ref) for ref in shared], thread, threads)
            gr.ptx(f"bar.sync {_FILLED}, {threads};")

        fill(list(tables), list(shared), group)

    def _decode(self, call, codes, shared, tables, place):
        """Fragments of a call; `place` is row, inner and step of `Step`."""
        decoder, blocks = self.decoder, self.config.blocks
        kinds = (gr.fragment_type(blocks, decoder.width, decoder.dtype),) * decoder.fragments
        refs = ([plgpu.RefType()] * len(refs) for refs in (codes, shared, tables))

        @gr.inline(arg_types=(*refs, (gr.SCALAR,) * 3), return_type=kinds)
        def decode(ctx, codes, shared, tables, place):
            del ctx
            streams, tables_made = ([gr.address(ref) for ref in refs] for refs in (codes, shared))
            row, inner, step = map(gr.scalar, place)
            state = Step(streams, tables_made, tables, row, inner, step)
            return tuple(
                gr.fragment(pairs, decoder.dtype) for pairs in decoder.decode(gr.Registers(), call, blocks, state)
            )

        return decode(codes, list(shared), list(tables), place)

    def _free(self, barrier):
        """Says that the warpgroup has read a step."""
        if self.config.cluster > 1:  # one thread says it for all

            @gr.inline()
            def together(ctx):
                del ctx
                utils.warpgroup_barrier()

            together()
        plgpu.barrier_arrive(barrier)

    def _sum(self, tile, first, last, start, group, block, inputs, codes, shared, tables, filled, free):
        """Returns the sums of a tile's steps from `first` to `last`; the share starts with step `start`."""
        decoder, config = self.decoder, self.config
        rows = gr.FRAGMENT_ROWS * config.blocks
        row, inner = self._place(tile, block)[0], group * rows
        kind = plgpu.WGMMAAccumulatorRef((rows, config.tokens), jnp.float32)

        def fragments(slot, step):
            place = row + inner, inner, step - tile * decoder.steps
            for call in range(decoder.calls):
                for i, weight in enumerate(self._decode(call, [ref.at[slot] for ref in codes], shared, tables, place)):
                    f = call * decoder.fragments + i
                    columns = slice(f * decoder.width, (f + 1) * decoder.width)
                    yield f, weight, inputs.at[slot, :, columns].transpose((1, 0))

        def unscaled(sums):
            @pl.loop(first, last)
            def _(step):
                slot = lax.rem(step - start, self.stages)
                plgpu.barrier_wait(filled.at[slot])
                before = None
                for _, weight, x in fragments(slot, step):
                    # This fragment was decoded while the one before was multiplied.
                    self._wait(before)
                    plgpu.wgmma(sums, weight, x)
                    before = weight
                self._wait(before)
                self._free(free.at[slot])

            return sums[...]

        def scaled(step, sums):
            slot = lax.rem(step - start, self.stages)
            plgpu.barrier_wait(filled.at[slot])
            for f, weight, x in fragments(slot, step):

                def product(part, weight=weight, x=x):
                    plgpu.wgmma(part, weight, x)
                    return part[...]

                copy, line = divmod(decoder.line(f), self.streams[-1].box[0])
                scale = codes[-1].at[slot, copy, line, pl.ds(inner, rows)]
                part = pl.run_scoped(product, kind)
                self._wait(weight)
                sums = self._add_scaled(sums, part, scale)
            self._free(free.at[slot])
            return sums

        if not decoder.scaled:
            return pl.run_scoped(unscaled, kind)
        zeros = plgpu.layout_cast(jnp.zeros((rows, config.tokens), jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(first, last, scaled, zeros)

    def _wait(self, weight):
        """Waits for the product with a fragment."""
        if weight is None:
            return
        plgpu.wgmma_wait(0)

        @gr.inline(arg_types=(plgpu.Layout.WGMMA,))
        def keep(ctx, weight):
            del ctx
            gr.keep(weight)

        keep(weight)

    def _finish(self, tile, first, share, group, block, sums, y, parts, flags, factors):
        """Writes a tile with its first steps, adding what others have of it; hands others to the share that has them."""
        groups, begin, mine = self.groups, tile * self.decoder.steps, block * self.config.warpgroups + group
        layout, ref, kind = plgpu.Layout.WGMMA, plgpu.RefType(), gr.sums_type(sums.shape)

        @gr.inline(arg_types=(layout, ref, ref, gr.SCALAR))
        def hand(ctx, sums, parts, flag, place):
            del ctx
            gpu_sums.store_part(sums, parts, gr.scalar(place))
            gpu_sums.signal(flag)

        @gr.inline(arg_types=(layout, ref, ref, gr.SCALAR, gr.SCALAR), return_type=kind)
        def add(ctx, sums, parts, flag, place, count):
            del ctx
            gpu_sums.wait(flag, gr.scalar(count))
            return gpu_sums.add_parts(sums, parts, gr.scalar(place), groups, gr.scalar(count), self.shares.most - 1)

        @gr.inline(arg_types=(layout, ref, [ref] * len(factors), gr.SCALAR, gr.SCALAR))
        def store(ctx, sums, y, factors, token, row):
            del ctx
            rest = iter(factors)
            given = [next(rest) if there else None for there in self.factors]
            place = gr.scalar(token), gr.scalar(row)
            gpu_sums.store_rows(sums, y, *place, *given, tokens=self.tokens, rows=self.rows, dtype=self.dtype)

        flag = flags.at[tile * groups + mine]

        @pl.when(first > begin)
        def _():
            hand(sums, parts, flag, share * groups + mine)

        @pl.when(first == begin)
        def _():
            total, others = sums, self.shares.owner(begin + self.decoder.steps - 1) - share
            if self.shares.most > 1:
                total = add(sums, parts, flag, (share + 1) * groups + mine, others)
            row, token = self._place(tile, block)
            store(total, y, factors, token, row + group * gr.FRAGMENT_ROWS * self.config.blocks)

    def _add_scaled(self, sums, part, scale):
        """Sums + scale * part; `scale` refers to the warpgroup's values, one per output."""
        layout = plgpu.Layout.WGMMA

        @gr.inline(arg_types=(layout, layout, plgpu.RefType()), return_type=gr.sums_type(sums.shape))
        def add(ctx, sums, part, scale):
            del ctx
            return gpu_sums.add_scaled(sums, part, gr.address(scale), self.streams[-1].array.dtype)

        return add(sums, part, scale)

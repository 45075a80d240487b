"""Additive codes on a GPU for few tokens, by Pallas Mosaic GPU: lookups of partial products in shared memory.

A product is a sum of partial products T[slot, code] (see `layout`); 132 multiprocessors of a Hopper GPU look up 32 each
per clock, if those 32 lie in different banks of shared memory. They always do: the entry of slot s lies in bank s % 32,
and the 32 threads of a warp, each with an output of its own, take the slots in 32 different orders, which is how the
codes are stored (`layout.banked_words`). A lookup is then three instructions: a permutation of bytes that puts a code
over the slot's place in the table's row, the load, and an addition.

A cluster of blocks has the same outputs and divides the inputs. Each block builds the tables of its slots on the matrix
unit, a pass of a few sets at a time, streams the codes through registers, and holds its sums in shared memory; after
the last pass the blocks add up each other's sums, in a fixed order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul.gpu_plan import TABLE_BYTES, TABLES, WARP, BlockConfig, Plan, block_config
from jaxquant.kernels.codebook_matmul.gpu_tables import TableBuilder
from jaxquant.kernels.codebook_matmul.layout import LANES


class _Thread:
    """The program of one thread.

    Args:
      plan: sizes.
      place: index of the block in its cluster, of the cluster along the outputs, and of the chunk of tokens.
      refs: x [tokens, in], words [4 * sets, out, 4], codebooks [M, K * d], y [tokens, out], tables, sums, and the scale.
    """

    def __init__(self, plan: Plan, place: tuple[ir.Value, ...], refs: tuple[ir.Value, ...]):
        self.plan = plan
        self.block, cluster, self.chunk = place
        x, self.words, books, self.y, self.tables, self.sums, *scale = map(t.pointer, refs)
        self.scale = scale[0] if scale else None
        self.thread = self.member = t.utils.thread_idx()
        self.team = t.i32(0)
        if plan.config.teams > 1:
            # The same for all of a warp and known to be: addresses of tables then need no instruction of their own.
            self.team = arith.divui(t.utils.warp_idx(sync=True), t.i32(plan.members // WARP))
            self.member = t.sub(self.thread, t.mul(self.team, plan.members))
        self.first_output = t.mul(cluster, plan.config.width)
        column_scale = self.scale if plan.scale == "columns" else None
        self.builder = TableBuilder(plan, self.first_set, self.chunk, x, books, column_scale)
        # Places in a row of a table, four steps in a word.
        steps = [t.shift_left(t.xor(t.lane(), i), 2) for i in range(LANES)]
        self.places = [
            functools.reduce(arith.ori, (t.shift_left(steps[i + j], 8 * j) for j in range(4)))
            for i in range(0, LANES, 4)
        ]

    def first_set(self, index: ir.Value) -> ir.Value:
        """First set of this block in a pass."""
        return t.mul(t.add(t.mul(self.block, self.plan.passes), index), self.plan.config.sets)

    def run(self) -> None:
        """Everything."""
        plan = self.plan
        steps, ahead, unit = plan.passes * plan.tiles, plan.config.ahead, 16 * plan.own_sets
        words = [word for i in range(ahead) for word in self.load_words(t.i32(min(i, steps - 1)))]

        def one_pass(index, words):
            inputs = self.builder.load_inputs(index)
            gpu.barrier()  # all lookups of the pass before are done
            self.builder.build(inputs, self.tables)
            gpu.barrier()

            def tile(i, words):
                step = t.add(t.mul(index, plan.tiles), i)
                new = self.load_words(t.least(t.add(step, ahead), steps - 1))
                self.accumulate(index, i, self.look_up(words[:unit]))
                return words[unit:] + new

            return t.loop(plan.tiles, tile, words)

        t.loop(plan.passes, one_pass, words)
        self.reduce()

    def load_words(self, step: ir.Value) -> list[ir.Value]:
        """Words of this thread's output and its team's sets, for step = pass * tiles + tile."""
        plan = self.plan
        index, tile = arith.divui(step, t.i32(plan.tiles)), arith.remui(step, t.i32(plan.tiles))
        output = t.add(self.first_output, t.least(t.add(t.mul(tile, plan.members), self.member), plan.config.width - 1))
        output = t.least(output, plan.out - 1)
        first = t.add(self.first_set(index), t.mul(self.team, plan.own_sets))
        words = []
        for s in range(plan.own_sets):
            own = t.add(first, s)
            if plan.room != plan.total_sets:
                own = t.least(own, plan.total_sets - 1)
            # A set's four lines are 16 bytes per output each.
            line = t.at(self.words, t.mul(own, 64 * plan.out), t.mul(output, 16))
            words += [word for q in range(4) for word in t.stream_words(t.at(line, 16 * plan.out * q))]
        return words

    def look_up(self, words: list[ir.Value]) -> list[ir.Value]:
        """Sums of the partial products that a unit of words names, one per token."""
        plan = self.plan
        tables = t.at(self.tables, t.mul(self.team, plan.own_sets * TABLE_BYTES))
        sums: list[list[Any]] = [[None] * 4 for _ in range(plan.chunk)]
        for i, word in enumerate(words):
            s, half, q = i // 16, i // 8 % 2, i % 8
            for j in range(4):
                # Byte 0: the place, byte 1: the code, bytes 2 and 3: the sign of the place, which is 0.
                place = t.permute(word, self.places[q], (4 + j) | j << 4 | (12 + j) << 8 | (12 + j) << 12)
                for token in range(plan.chunk):
                    table = (token * plan.config.sets + s) * TABLE_BYTES + 128 * half
                    (found,) = t.load(t.at(tables, place, table), jnp.float32)
                    old = sums[token][j]
                    sums[token][j] = found if old is None else arith.addf(old, found)
        return [arith.addf(arith.addf(a, b), arith.addf(c, d)) for a, b, c, d in sums]

    def accumulate(self, index: ir.Value, tile: ir.Value, found: list[ir.Value]) -> None:
        """Adds to this block's sums, [token, team, output]."""
        width = self.plan.config.width
        output = t.add(t.mul(tile, self.plan.members), self.member)
        place = t.add(output, t.mul(self.team, width))
        first = t.less(index, 1)

        def add():
            for token, value in enumerate(found):
                address = t.at(self.sums, t.mul(place, 4), 4 * width * self.plan.config.teams * token)
                if self.plan.passes > 1:
                    (old,) = t.load(address, jnp.float32)
                    value = arith.addf(value, t.select(first, t.constant(0.0), old))
                t.store(value, address)

        if width % self.plan.members:
            with t.utils.when(t.less(output, width)):
                add()
        else:
            add()

    def reduce(self) -> None:
        """Sums over the cluster, scales and writes this block's share of the outputs."""
        plan, config = self.plan, self.plan.config
        nvvm.cluster_arrive(aligned=True)
        nvvm.cluster_wait(aligned=True)
        for start in range(0, plan.share, plan.threads):
            index = t.add(self.thread, start)
            local = t.add(t.mul(self.block, plan.share), index)
            output = t.add(self.first_output, local)
            mine = arith.andi(
                t.less(index, plan.share), arith.andi(t.less(local, config.width), t.less(output, plan.out))
            )
            with t.utils.when(mine):
                for token in range(plan.chunk):
                    self.finish(local, output, token)
        # Nobody leaves while others read its sums.
        nvvm.cluster_arrive(aligned=True)
        nvvm.cluster_wait(aligned=True)

    def finish(self, local: ir.Value, output: ir.Value, token: int) -> None:
        """Writes one output of one token."""
        plan = self.plan
        teams = plan.config.teams
        parts = []
        for rank in range(plan.config.cluster):
            for team in range(teams):
                address = t.at(self.sums, t.mul(local, 4), 4 * plan.config.width * (teams * token + team))
                parts += t.load(t.of_block(address, rank), jnp.float32)
        value = functools.reduce(arith.addf, parts)
        if plan.scale == "rows":
            kind = plan.dtypes["scale"]
            (factor,) = t.load(t.at(self.scale, t.mul(output, jnp.dtype(kind).itemsize)), kind)
            value = arith.mulf(value, factor)
        line = t.add(t.mul(self.chunk, plan.chunk), token)
        kind = plan.dtypes["y"]
        size = jnp.dtype(kind).itemsize
        address = t.at(self.y, t.mul(line, plan.out * size), t.mul(output, size))
        if plan.tokens % plan.chunk:
            with t.utils.when(t.less(line, plan.tokens)):
                t.store(value, address, kind)
        else:
            t.store(value, address, kind)


def _kernel(*refs, plan: Plan):
    place = [lax.axis_index(name) for name in ("block", "cluster", "chunk")]
    if plan.config.overlap:
        plgpu.griddepcontrol_launch_dependents()
        plgpu.griddepcontrol_wait()
    x, words, books, *rest = refs
    scale, (y, tables, sums) = rest[:-3], rest[-3:]
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,) * 3 + (plgpu.RefType(),) * len(refs))
    def thread(_, block, cluster, chunk, *refs):
        _Thread(plan, tuple(i.registers.item() for i in (block, cluster, chunk)), refs).run()

    thread(*place, x, words, books, y, tables, sums, *scale)


def lookup_matmul(
    x: jax.Array,
    words: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    dimension: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T by partial products, [tokens, out] of `dtype`; sums are float32 and always in the same order.

    Args:
      x: float [tokens, in]; the time grows with the tokens.
      words: uint32 [4 * sets, out, 4], see `layout.banked_words`.
      codebooks: float [M, K * d], M of 1, 2, 4 or 8.
      scale: float [out or 1, 1] or [1, in / d], or None.
      dimension: d, 4 or a multiple of 8.
      dtype: of the result.
      config: division of the work; by default that of `block_config`.
    """
    tokens, columns = x.shape
    out, total_sets, count = words.shape[1], len(words) // 4, len(codebooks)
    chunk = math.ceil(tokens / math.ceil(tokens / TABLES))
    config = config or block_config(total_sets, out, chunk)
    kind = None if scale is None else "columns" if scale.shape[1] > 1 else "rows"
    if kind == "rows" and len(scale) == 1 and out > 1:
        scale = jnp.broadcast_to(scale, (out, 1))
    dtypes = {"x": x.dtype, "books": codebooks.dtype, "y": jnp.dtype(dtype)}
    dtypes["scale"] = None if scale is None else scale.dtype
    entries = codebooks.shape[1] // dimension
    plan = Plan(config, tokens, chunk, columns, out, dimension, count, entries, total_sets, kind, dtypes)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((tokens, out), dtype),
        grid=(-(-out // config.width), -(-tokens // chunk)),
        grid_names=("cluster", "chunk"),
        cluster=(config.cluster,),
        cluster_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((config.sets * chunk * TABLE_BYTES // 4,), jnp.float32),
            plgpu.SMEM((chunk * config.teams * config.width,), jnp.float32),
        ],
        kernel_name="lookup_matmul",
    )
    return kernel(x, words, codebooks, *(() if scale is None else (scale.reshape(-1),)))

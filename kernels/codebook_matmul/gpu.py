"""Additive codes on a GPU for few tokens, by Pallas Mosaic GPU: lookups of partial products in shared memory.

A product is a sum of partial products T[slot, code] (see `layout`); 132 multiprocessors of a Hopper GPU look up 32 each
per clock, if those 32 lie in different banks of shared memory. They always do: the entry of slot s lies in bank s % 32,
and the 32 threads of a warp, each with an output of its own, take the slots in 32 different orders, which is how the
codes are stored (`layout.banked_words`). A lookup is then three instructions: a permutation of bytes that puts a code
over the slot's place in the table's row, the load, and an addition.

A cluster of blocks has the same outputs and divides the inputs. Each block builds the tables of its slots on the matrix
unit, a pass of a few sets at a time, and streams the codes through registers. Sums over the passes are held in shared
memory; those over the cluster are added up in a fixed order, each block's share of the outputs.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul.gpu_exchange import Exchange
from jaxquant.kernels.codebook_matmul.gpu_plan import TABLE_BYTES, WARP, BlockConfig, Plan, make_plan
from jaxquant.kernels.codebook_matmul.gpu_tables import TableBuilder
from jaxquant.kernels.codebook_matmul.layout import LANES


class ThreadProgram:
    """The program of one thread.

    Args:
      plan: sizes.
      place: index of the block in its cluster, of the cluster along the outputs, and of the chunk of tokens.
      refs: x [tokens, in], words [4 * sets, out, 4], codebooks [M, K * d], y [tokens, out], the tables, sums, inbox and
        barrier of the block, and the scale.
    """

    def __init__(self, plan: Plan, place: tuple[t.Value, ...], refs: tuple[t.Value, ...]):
        self.plan = plan
        self.block, cluster, self.chunk = place
        x, self.words, books, self.y, self.tables, self.sums, inbox, barrier, *scale = map(t.pointer, refs)
        self.scale = scale[0] if scale else None
        self.thread = self.member = t.thread_index()
        self.team: t.Int = 0
        if plan.config.teams > 1:
            # The same for all of a warp and known to be: addresses of tables then need no instruction of their own.
            self.team = t.div(t.warp_index(), plan.members // WARP)
            self.member = t.sub(self.thread, t.mul(self.team, plan.members))
        self.first_output = t.mul(cluster, plan.config.width)
        column_scale = self.scale if plan.scale == "columns" else None
        self.builder = TableBuilder(plan, self.first_set, self.chunk, x, books, column_scale)
        self.exchange = Exchange(plan, self.block, inbox, barrier)
        # Places in a row of a table, four steps in a word.
        lane = t.rem(self.thread, WARP)
        steps = [t.mul(t.xor(lane, i), 4) for i in range(LANES)]
        self.places = [t.add(*(t.mul(steps[i + j], 1 << 8 * j) for j in range(4))) for i in range(0, LANES, 4)]

    def first_set(self, index: t.Value) -> t.Value:
        """First set of this block in a pass."""
        return t.mul(t.add(t.mul(self.block, self.plan.passes), index), self.plan.config.sets)

    def run(self) -> None:
        """Everything."""
        plan = self.plan
        steps, ahead, unit = plan.passes * plan.tiles, plan.config.ahead, 16 * plan.own_sets
        words = [word for i in range(ahead) for word in self.load_words(t.add(min(i, steps - 1)))]
        self.exchange.open()

        def one_pass(index, words):
            inputs = self.builder.load_inputs(index)
            t.block_barrier()  # all lookups of the pass before are done
            self.builder.build(inputs, self.tables)
            t.block_barrier()

            def tile(i, words):
                step = t.add(t.mul(index, plan.tiles), i)
                new = self.load_words(t.least(t.add(step, ahead), steps - 1))
                self.accumulate(index, i, self.look_up(words[:unit]))
                return words[unit:] + new

            return t.loop(plan.tiles, tile, words)

        t.loop(plan.passes, one_pass, words)
        self.exchange.receive()
        self.finish()

    def load_words(self, step: t.Value) -> list[t.Value]:
        """Words of this thread's output and its team's sets, for step = pass * tiles + tile."""
        plan = self.plan
        index, tile = t.div(step, plan.tiles), t.rem(step, plan.tiles)
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

    def look_up(self, words: list[t.Value]) -> list[t.Value]:
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
                    sums[token][j] = found if old is None else t.fadd(old, found)
        return [t.fadd(t.fadd(a, b), t.fadd(c, d)) for a, b, c, d in sums]

    def accumulate(self, index: t.Value, tile: t.Value, found: list[t.Value]) -> None:
        """Adds to this block's sums, float32 [token, team, output]; in the last pass, sends them."""
        plan = self.plan
        width, teams = plan.config.width, plan.config.teams
        output = t.add(t.mul(tile, plan.members), self.member)
        address = t.at(self.sums, t.mul(t.add(output, t.mul(self.team, width)), 4))
        with t.when(t.less(output, width)):
            for token, value in enumerate(found):
                if plan.passes > 1:
                    place = t.at(address, 4 * width * teams * token)
                    (old,) = t.load(place, jnp.float32)
                    value = t.fadd(value, t.select(t.less(index, 1), t.number(0.0), old))
                    t.store(value, place)
                with t.when(t.less(plan.passes - 2, index)) if plan.passes > 1 else contextlib.nullcontext():
                    self.exchange.send(output, self.team, token, value)

    def finish(self) -> None:
        """Adds up, scales and writes this block's share of the outputs."""
        plan = self.plan
        for start in range(0, plan.share, plan.threads):
            local = t.add(self.thread, start)
            output = t.add(self.first_output, t.mul(self.block, plan.share), local)
            with t.when(t.both(t.less(local, plan.share), t.less(output, plan.out))):
                for token in range(plan.chunk):
                    value = self.exchange.total(local, token)
                    if plan.scale == "rows":
                        kind = plan.dtypes["scale"]
                        (factor,) = t.load(t.at(self.scale, t.mul(output, jnp.dtype(kind).itemsize)), kind)
                        value = t.fmul(value, factor)
                    self.write(value, output, token)

    def write(self, value: t.Value, output: t.Value, token: int) -> None:
        """Writes an element of y."""
        plan, kind = self.plan, self.plan.dtypes["y"]
        size = jnp.dtype(kind).itemsize
        line = t.add(t.mul(self.chunk, plan.chunk), token)
        with t.when(t.less(line, plan.tokens)) if plan.tokens % plan.chunk else contextlib.nullcontext():
            t.store(value, t.at(self.y, t.mul(line, plan.out * size), t.mul(output, size)), kind)


def _kernel(*refs, plan: Plan):
    place = [lax.axis_index(name) for name in ("block", "cluster", "chunk")]
    if plan.config.overlap:
        plgpu.griddepcontrol_launch_dependents()
        plgpu.griddepcontrol_wait()
    x, words, books, *rest = refs
    scale, (y, *scratch) = rest[:-5], rest[-5:]
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,) * 3 + (plgpu.RefType(),) * len(refs))
    def thread(_, block, cluster, chunk, *refs):
        ThreadProgram(plan, tuple(i.registers.item() for i in (block, cluster, chunk)), refs).run()

    thread(*place, x, words, books, y, *scratch, *scale)


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
      dimension: d, 4, 8 or 16.
      dtype: of the result.
      config: division of the work; by default that of `block_config`.

    Raises:
      ValueError: a cluster of one block, whose messages to itself GPUs refuse.
    """
    if config is not None and config.cluster < 2:
        raise ValueError(f"cluster: expected 2 to 8 blocks, got {config.cluster}; a block alone is no cluster")
    if scale is not None and scale.size == 1:
        scale = jnp.broadcast_to(scale, (words.shape[1], 1))
    plan = make_plan(x, words, codebooks, scale, dimension=dimension, dtype=dtype, config=config)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.out), dtype),
        grid=plan.grid,
        grid_names=("cluster", "chunk"),
        cluster=(plan.config.cluster,),
        cluster_names=("block",),
        num_threads=plan.config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((plan.config.sets * plan.chunk * TABLE_BYTES // 4,), jnp.float32),
            plgpu.SMEM((plan.sums,), jnp.float32),
            plgpu.SMEM((plan.sums,), jnp.float32),
            plgpu.SMEM((2,), jnp.int32),
        ],
        kernel_name="lookup_matmul",
    )
    return kernel(x, words, codebooks, *(() if scale is None else (scale.reshape(-1),)))

"""Additive codes on a GPU for few tokens, by Pallas Mosaic GPU: lookups of partial products in shared memory.

A product is a sum of partial products T[slot, code] (see `layout`); 132 multiprocessors of a Hopper GPU look up 32 each
per clock, if those 32 lie in different banks of shared memory. They always do: the entry of slot s lies in bank s % 32,
and the 32 threads of a warp, each with an output of its own, take the slots in 32 different orders, which is how the
codes are stored (`layout.banked_words`). A lookup is then three instructions: a permutation of bytes that puts a code
over the slot's place in the table's row, the load, and an addition.

A cluster of blocks has the same outputs and divides the inputs. Each block builds the tables of its slots on the matrix
unit, a pass of a few sets at a time, and streams the codes through registers. Sums over the passes are held in shared
memory; those over the cluster are added up in a fixed order, each block's share of the outputs.

Products of one input with several weights are one launch: a cluster has outputs of one of them, and more outputs than it
would have of that one alone, for which it builds the same tables. What the result is multiplied by and added to is asked
for in the beginning; for norms and gates see `gpu_fused`.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul import gpu_fused
from jaxquant.kernels.codebook_matmul.gpu_exchange import Exchange
from jaxquant.kernels.codebook_matmul.gpu_plan import TABLE_BYTES, WARP, BlockConfig, Plan, make_plan
from jaxquant.kernels.codebook_matmul.gpu_tables import TableBuilder
from jaxquant.kernels.codebook_matmul.layout import LANES, Weight
from jaxquant.prologue import Prologue


class ThreadProgram:
    """The program of one thread.

    Args:
      plan: sizes.
      place: index of the block in its cluster, of the cluster among those of the weight, and of the chunk of tokens.
      out: outputs of the weight.
      addresses: of x [tokens, in], words [4 * sets, out, 4], codebooks [M, K * d], y [tokens, out], and of the tables,
        sums, inbox and barrier of the block, and its sums of squares if there is a norm.
      given: addresses of "scale", "prologue" (norm's weight [in] or gate [tokens, in]) and "residual" [tokens, out], if
        there are such.
    """

    def __init__(
        self,
        plan: Plan,
        place: tuple[t.Value, ...],
        out: t.Int,
        addresses: Sequence[t.Value],
        given: Mapping[str, t.Value],
    ):
        self.plan, self.out, self.given = plan, out, given
        self.block, cluster, self.chunk = place
        self.x, self.words, books, self.y, self.tables, self.sums, inbox, barrier, *self.squares = addresses
        self.thread = self.member = t.thread_index()
        self.team: t.Int = 0
        if plan.config.teams > 1:
            # The same for all of a warp and known to be: addresses of tables then need no instruction of their own.
            self.team = t.div(t.warp_index(), plan.members // WARP)
            self.member = t.sub(self.thread, t.mul(self.team, plan.members))
        self.first_output = t.mul(cluster, plan.config.width)
        self.builder = TableBuilder(plan, self.first_set, self.chunk, self.x, books, given)
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
        epilogue = [self.load_epilogue(start) for start in range(0, plan.share, plan.threads)]
        self.add_squares()
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
        self.finish(epilogue)

    def add_squares(self) -> None:
        """Writes each warp's sums of squares of all inputs, float32 [token, warp], if there is a norm."""
        plan = self.plan
        for token in range(plan.chunk if plan.norm is not None else 0):
            line, total = t.at(self.x, t.mul(self.row(token), plan.columns * plan.size("x"))), t.number(0.0)
            for first in range(0, plan.columns // 4, plan.threads):
                piece = t.add(self.thread, first)
                place = t.mul(t.least(piece, plan.columns // 4 - 1), 4 * plan.size("x"))
                values = t.load(t.at(line, place), plan.dtypes["x"], 4)
                more = gpu_fused.sum_squares(values, total)
                total = t.select(t.less(piece, plan.columns // 4), more, total)
            sums = t.at(self.squares[0], 4 * plan.warps * token)
            gpu_fused.store_of_warp(total, t.div(self.thread, WARP), sums)

    def load_words(self, step: t.Value) -> list[t.Value]:
        """Words of this thread's output and its team's sets, for step = pass * tiles + tile."""
        plan = self.plan
        index, tile = t.div(step, plan.tiles), t.rem(step, plan.tiles)
        output = t.add(self.first_output, t.least(t.add(t.mul(tile, plan.members), self.member), plan.config.width - 1))
        output = t.least(output, t.sub(self.out, 1))
        first = t.add(self.first_set(index), t.mul(self.team, plan.own_sets))
        words = []
        for s in range(plan.own_sets):
            own = t.add(first, s)
            if plan.room != plan.total_sets:
                own = t.least(own, plan.total_sets - 1)
            # A set's four lines are 16 bytes per output each.
            line = t.at(self.words, t.mul(own, t.mul(self.out, 64)), t.mul(output, 16))
            words += [word for q in range(4) for word in t.stream_words(t.at(line, t.mul(self.out, 16 * q)))]
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

    def own_output(self, start: int) -> tuple[t.Value, t.Value]:
        """Of this thread's outputs of the block's share: the index in the share, and in the weight."""
        local = t.add(self.thread, start)
        return local, t.add(self.first_output, t.mul(self.block, self.plan.share), local)

    def load_epilogue(self, start: int) -> list[dict[str, t.Value]]:
        """The "scale" of an output and the "residual" of each token, as far as there are such."""
        plan, output = self.plan, t.least(self.own_output(start)[1], t.sub(self.out, 1))
        rows = {"scale": self.load_one("scale", output)} if plan.scale == "rows" else {}
        epilogue = []
        for token in range(plan.chunk):
            values = dict(rows)
            if "residual" in plan.dtypes:
                values["residual"] = self.load_one("residual", t.add(t.mul(self.row(token), self.out), output))
            epilogue.append(values)
        return epilogue

    def load_one(self, name: str, place: t.Value) -> t.Value:
        """A value of one of the arrays that are given."""
        plan = self.plan
        return t.load(t.at(self.given[name], t.mul(place, plan.size(name))), plan.dtypes[name])[0]

    def row(self, token: int) -> t.Value:
        """Row of x of a token of the chunk; some other one where there is none."""
        return t.least(t.add(t.mul(self.chunk, self.plan.chunk), token), self.plan.tokens - 1)

    def finish(self, epilogue: Sequence[Sequence[Mapping[str, t.Value]]]) -> None:
        """Adds up, scales and writes this block's share of the outputs."""
        plan = self.plan
        for start, values in zip(range(0, plan.share, plan.threads), epilogue, strict=True):
            local, output = self.own_output(start)
            with t.when(t.both(t.less(local, plan.share), t.less(output, self.out))):
                for token, given in enumerate(values):
                    value = self.exchange.total(local, token)
                    value = t.fmul(value, given["scale"]) if "scale" in given else value
                    if plan.norm is not None:
                        squares = t.at(self.squares[0], 4 * plan.warps * token)
                        value = t.fmul(value, gpu_fused.norm_factor(squares, plan.warps, plan.columns, plan.norm[0]))
                    value = t.fadd(value, given["residual"]) if "residual" in given else value
                    self.write(value, output, token)

    def write(self, value: t.Value, output: t.Value, token: int) -> None:
        """Writes an element of y."""
        plan = self.plan
        line = t.add(t.mul(self.chunk, plan.chunk), token)
        with t.when(t.less(line, plan.tokens)) if plan.tokens % plan.chunk else contextlib.nullcontext():
            place = t.add(t.mul(line, self.out), output)
            t.store(value, t.at(self.y, t.mul(place, plan.size("y"))), plan.dtypes["y"])


def _kernel(*refs, plan: Plan, scratch: int):
    place = [lax.axis_index(name) for name in ("block", "cluster", "chunk")]
    if plan.config.overlap:
        plgpu.griddepcontrol_launch_dependents()
        plgpu.griddepcontrol_wait()
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,) * 3 + (plgpu.RefType(),) * len(refs))
    def thread(_, block, cluster, chunk, *refs):
        block, cluster, chunk = (i.registers.item() for i in (block, cluster, chunk))
        addresses = list(map(t.pointer, refs))
        clusters = [plan.clusters(out) for out in plan.outs]
        own, out, arrays, given = gpu_fused.place(cluster, plan.outs, clusters, addresses[:-scratch], plan)
        ThreadProgram(plan, (block, own, chunk), out, (*arrays, *addresses[-scratch:]), given).run()

    thread(*place, *refs)


def lookup_matmul(
    x: jax.Array,
    weights: Sequence[Weight],
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
    *,
    dimension: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> list[jax.Array]:
    """Returns residual + prologue(x) @ W.T for several weights by partial products, each [tokens, out] of `dtype`.

    Sums are float32 and always in the same order.

    Args:
      x: float [tokens, in]; the time grows with the tokens.
      weights: of each, words uint32 [4 * sets, out, 4], see `layout.banked_words`; codebooks float [M, K * d], M of 1, 2, 4
        or 8; scale float [out or 1, 1] or [1, in / d], or None. They differ in their outputs only, see `layout.alike`.
      prologue: with a float array [in] or [tokens, in], or None.
      residual: float [tokens, out] of the only weight, or None.
      dimension: d, 4, 8 or 16.
      dtype: of the results.
      config: division of the work; by default that of `block_config`.

    Raises:
      ValueError: a cluster of one block, whose messages to itself GPUs refuse.
    """
    if config is not None and config.cluster < 2:
        raise ValueError(f"cluster: expected 2 to 8 blocks, got {config.cluster}; a block alone is no cluster")
    plan = make_plan(x, weights, prologue, residual, dimension=dimension, dtype=dtype, config=config)
    shared = [
        plgpu.SMEM((plan.config.sets * plan.chunk * TABLE_BYTES // 4,), jnp.float32),
        plgpu.SMEM((plan.sums,), jnp.float32),
        plgpu.SMEM((plan.sums,), jnp.float32),
        plgpu.SMEM((2,), jnp.int32),
    ]
    if plan.norm is not None:
        shared.append(plgpu.SMEM((plan.chunk * plan.warps,), jnp.float32))
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, scratch=len(shared)),
        out_type=[jax.ShapeDtypeStruct((plan.tokens, out), dtype) for out in plan.outs],
        grid=plan.grid,
        grid_names=("cluster", "chunk"),
        cluster=(plan.config.cluster,),
        cluster_names=("block",),
        num_threads=plan.config.warpgroups,
        thread_name="warpgroup",
        scratch_types=shared,
        kernel_name="lookup_matmul",
    )
    return kernel(*gpu_fused.arrays(x, weights, prologue, residual))

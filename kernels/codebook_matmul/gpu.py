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

import dataclasses
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
from jaxquant.kernels.codebook_matmul.layout import LANES, SET

WARPGROUP, WARP = 128, 32
ROW_BYTES = 4 * SET  # of a table: the partial products of one code with all slots of a set
TABLE_BYTES = 256 * ROW_BYTES
TABLES = 3  # that fit in shared memory
CLUSTERS = 15  # of 8 blocks that run at once on 132 multiprocessors, some of which have no 7 neighbours free


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How the work is divided.

    Attributes:
      warpgroups: of 128 threads in a block.
      cluster: blocks that divide the inputs.
      sets: sets of slots in a pass.
      teams: of warpgroups that divide the sets of a pass; a thread has an output and the sets of its team.
      width: outputs of a cluster, a multiple of 32.
      ahead: loads of a thread that are under way, each of an output's codes of the sets of a team.
      overlap: start while the kernel before is finishing; its results are awaited before anything but codes is touched.
    """

    warpgroups: int
    cluster: int
    sets: int
    teams: int
    width: int
    ahead: int = 1
    overlap: bool = True


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one product; `chunk` tokens share a block."""

    config: BlockConfig
    tokens: int
    chunk: int
    columns: int
    out: int
    dimension: int
    count: int
    entries: int
    total_sets: int
    scale: str | None
    dtypes: dict[str, Any]

    @property
    def threads(self) -> int:
        return WARPGROUP * self.config.warpgroups

    @property
    def warps(self) -> int:
        return self.threads // WARP

    @property
    def groups(self) -> int:
        """Groups of inputs in a set."""
        return SET // self.count

    @property
    def passes(self) -> int:
        return -(-self.total_sets // (self.config.cluster * self.config.sets))

    @property
    def members(self) -> int:
        """Threads of a team."""
        return self.threads // self.config.teams

    @property
    def own_sets(self) -> int:
        """Sets of a team in a pass."""
        return self.config.sets // self.config.teams

    @property
    def tiles(self) -> int:
        return -(-self.config.width // self.members)

    @property
    def share(self) -> int:
        """Outputs that a block sums over its cluster."""
        return -(-self.config.width // self.config.cluster)


class _Thread:
    """The program of one thread.

    Args:
      plan: sizes.
      place: index of the block in its cluster, of the cluster along the outputs, and of the chunk of tokens.
      refs: x [tokens, in], words [4 * sets, out, 4], codebooks [M, K * d], y [tokens, out], tables, sums, and the scale.
    """

    def __init__(self, plan: _Plan, place: tuple[ir.Value, ...], refs: tuple[ir.Value, ...]):
        self.plan = plan
        self.block, self.cluster, self.chunk = place
        self.x, self.words, self.books, self.y, self.tables, self.sums, *scale = map(t.pointer, refs)
        self.scale = scale[0] if scale else None
        self.thread = t.utils.thread_idx()
        self.lane = t.bits_and(self.thread, WARP - 1)
        self.warp = t.utils.warp_idx(sync=True)
        self.team, self.member = t.i32(0), self.thread
        if plan.config.teams > 1:
            self.team = arith.divui(self.warp, t.i32(plan.members // WARP))
            self.member = t.sub(self.thread, t.mul(self.team, plan.members))
        self.row, self.column = t.shift_right(self.lane, 2), t.bits_and(self.lane, 3)  # in fragments of matrices
        self.first_output = t.mul(self.cluster, plan.config.width)
        # Bytes lane ^ i of four steps i in one word, times four: places in a row of a table.
        steps = [t.shift_left(t.xor(self.lane, i), 2) for i in range(LANES)]
        self.places = [
            functools.reduce(arith.ori, (t.shift_left(steps[i + j], 8 * j) for j in range(4)))
            for i in range(0, LANES, 4)
        ]

    def run(self) -> None:
        """Everything."""
        plan = self.plan
        entries = self.load_entries()
        steps, ahead = plan.passes * plan.tiles, plan.config.ahead
        unit = 16 * plan.own_sets
        words = [word for i in range(ahead) for word in self.load_words(t.i32(min(i, steps - 1)))]

        def one_pass(index, words):
            inputs = self.load_inputs(index)
            gpu.barrier()  # all lookups of the pass before are done
            self.build(entries, inputs)
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
        first = t.mul(t.add(t.mul(self.block, plan.passes), index), plan.config.sets)
        first = t.add(first, t.mul(self.team, plan.own_sets))
        words = []
        for s in range(plan.own_sets):
            own = t.add(first, s)
            if self.padded:
                own = t.least(own, plan.total_sets - 1)
            # A set's four lines are 16 bytes per output each.
            line = t.at(self.words, t.mul(own, 64 * plan.out), t.mul(output, 16))
            words += [word for q in range(4) for word in t.stream_words(t.at(line, 16 * plan.out * q))]
        return words

    @property
    def padded(self) -> bool:
        """True where blocks have sets beyond the last one; their inputs count as zero."""
        config = self.plan.config
        return self.plan.total_sets != self.plan.passes * config.sets * config.cluster

    def load_entries(self) -> list[list[list[ir.Value]]]:
        """Codebook entries as operands of the matrix unit, [turn][codebook][2 * (d / 8)]; a turn is 8 entries per warp."""
        plan = self.plan
        size = jnp.dtype(plan.dtypes["books"]).itemsize
        turns = []
        for turn in range(-(-plan.entries // (8 * plan.warps))):
            entry = t.add(t.mul(t.add(self.warp, turn * plan.warps), 8), self.row)
            entry = t.least(entry, plan.entries - 1)
            address = t.at(self.books, t.mul(entry, plan.dimension * size))
            books = []
            for m in range(plan.count):
                book = t.at(address, m * plan.entries * plan.dimension * size)
                books.append(self.load_pairs(book, plan.dtypes["books"]))
            turns.append(books)
        return turns

    def load_pairs(self, address: ir.Value, dtype: Any) -> list[ir.Value]:
        """Of a vector of d, dimensions 8k + 2 * column and the next, for all k; zeros beyond d = 4."""
        d, size = self.plan.dimension, jnp.dtype(dtype).itemsize
        if d >= 8:
            address = t.at(address, t.mul(self.column, 2 * size))
            return [x for k in range(d // 8) for x in t.load(t.at(address, 8 * k * size), dtype, 2)]
        pair = t.load(t.at(address, t.mul(t.bits_and(self.column, 1), 2 * size)), dtype, 2)
        return [t.select(t.less(self.column, 2), x, t.constant(0.0)) for x in pair]

    def load_inputs(self, index: ir.Value) -> list[list[list[ir.Value]]]:
        """Inputs as operands of the matrix unit, [token * sets + set][8 rows][2 * (d / 8)]; scaled if columns are."""
        plan, dtype = self.plan, self.plan.dtypes["x"]
        size, total = jnp.dtype(dtype).itemsize, plan.columns // plan.dimension
        first = t.mul(t.add(t.mul(self.block, plan.passes), index), plan.config.sets)
        tables = []
        for token in range(plan.chunk):
            line = t.least(t.add(t.mul(self.chunk, plan.chunk), token), plan.tokens - 1)
            address = t.at(self.x, t.mul(line, plan.columns * size))
            for s in range(plan.config.sets):
                rows = []
                for r in range(plan.groups // 8):
                    group = t.add(t.mul(t.add(first, s), plan.groups), self.row, 8 * r)
                    inside = None
                    if total != plan.passes * plan.config.sets * plan.config.cluster * plan.groups:
                        inside, group = t.less(group, total), t.least(group, total - 1)
                    values = self.load_pairs(t.at(address, t.mul(group, plan.dimension * size)), dtype)
                    if plan.scale == "columns":
                        kind = plan.dtypes["scale"]
                        (factor,) = t.load(t.at(self.scale, t.mul(group, jnp.dtype(kind).itemsize)), kind)
                        values = [arith.mulf(v, factor) for v in values]
                    if inside is not None:
                        values = [t.select(inside, v, t.constant(0.0)) for v in values]
                    rows.append(values)
                tables.append(rows)
        return tables

    def build(self, entries: list[Any], inputs: list[Any]) -> None:
        """Writes the tables of a pass, [token, set, code, slot].

        Of eight codes and a set's slots each thread has those of two codes, 2 * column and the next, and of 8 slots,
        row + 8q. Threads of the same row write them in different orders of q, so that a warp writes to 32 banks.
        """
        plan = self.plan
        odd, high = (t.less(0, t.bits_and(self.column, b)) for b in (1, 2))
        place = t.mul(t.add(t.mul(self.warp, 8), t.mul(self.column, 2)), ROW_BYTES)
        turns = [t.bits_and(t.add(self.column, k), 3) for k in range(4)]
        places = [t.add(place, t.mul(self.row, 4), t.mul(turn, 32)) for turn in turns]

        for turn, books in enumerate(entries):
            write = functools.partial(self._write, turn, places, odd, high)
            if plan.entries % (8 * plan.warps) and turn == len(entries) - 1:
                with t.utils.when(t.less(t.add(self.warp, turn * plan.warps), -(-plan.entries // 8))):
                    write(books, inputs)
            else:
                write(books, inputs)

    def _write(self, turn: int, places: list[ir.Value], odd: ir.Value, high: ir.Value, books: Any, inputs: Any) -> None:
        for table, rows in enumerate(inputs):
            octets = []  # [q] of two codes
            for book in books:
                for r in range(0, len(rows), 2):
                    product = self.product(rows[r], rows[r + 1] if r + 1 < len(rows) else None, book)
                    octets += [product[:2], product[2:]][: len(rows) - r]
            for half in range(2):
                for code in range(2):
                    values = [octet[code] for octet in octets[4 * half : 4 * half + 4]]
                    # values[(k + column) % 4] for k = 0, 1, 2, 3
                    values = [t.select(odd, values[(k + 1) % 4], values[k]) for k in range(4)]
                    values = [t.select(high, values[(k + 2) % 4], values[k]) for k in range(4)]
                    constant = table * TABLE_BYTES + (8 * self.plan.warps * turn + code) * ROW_BYTES + 128 * half
                    for value, place in zip(values, places, strict=True):
                        t.store(value, t.at(self.tables, place, constant))

    def product(self, low: list[ir.Value], high: list[ir.Value] | None, book: list[ir.Value]) -> list[ir.Value]:
        """Products of 16 (or 8) groups with 8 entries; operands that 10 bits do not hold are split in two."""
        plan = self.plan
        zero = t.constant(0.0)
        high = high or [zero] * len(low)
        exact_x = plan.scale != "columns" and plan.dtypes["x"] != jnp.float32
        exact_book = plan.dtypes["books"] != jnp.float32
        sums = [zero] * 4
        for k in range(0, len(book), 2):
            a = [low[k], high[k], low[k + 1], high[k + 1]]
            b = book[k : k + 2]
            a_parts = [a] if exact_x else self.split(a)
            b_parts = [b] if exact_book else self.split(b)
            for i, j in ((0, 0), (1, 0), (0, 1)):
                if i < len(a_parts) and j < len(b_parts):
                    sums = t.mma_tf32(a_parts[i], b_parts[j], sums)
        return sums

    def split(self, values: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        """Leading 10 bits of mantissas, and the rest."""
        word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
        mask = t.i32(-(1 << 13))
        leading = [arith.bitcast(number, arith.andi(arith.bitcast(word, v), mask)) for v in values]
        return leading, [arith.subf(v, lead) for v, lead in zip(values, leading, strict=True)]

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


def _kernel(*refs, plan: _Plan):
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


def block_config(total_sets: int, out: int, chunk: int) -> BlockConfig:
    """The division of work that was fastest on an H200."""
    cluster = 8
    sets = max(1, min(TABLES // chunk, 2, -(-total_sets // cluster)))
    width = _up(-(-out // CLUSTERS), LANES)
    return BlockConfig(4, cluster, sets, 1, min(width, 4096))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
    plan = _Plan(config, tokens, chunk, columns, out, dimension, count, entries, total_sets, kind, dtypes)
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

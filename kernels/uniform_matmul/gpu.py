"""Scalar codes on a GPU for few tokens, by Pallas Mosaic GPU: codes go from global memory to the matrix unit in registers.

The codes lie as the matrix unit's operands do (see `tiles`), so a thread loads 16 bytes and makes them pairs of float16
weights, two at a time; the matrix unit multiplies 16 outputs of weights with up to 8 rows of inputs, whatever the number
of tokens. One block of threads runs on a multiprocessor, has all inputs in shared memory, and goes through tiles of 16
outputs; its warps divide the columns, each with the codes of its next tile already on the way. The warps' sums are added
up in a fixed order.

A code on a uniform grid becomes a weight by a mask, an "or" and an addition: 1024 + code is the float16 number 0x6400 |
code, and higher up in the mantissa a code counts 4, 8 or 16 times as much. Codes of a table of levels are looked up two
at a time, in a table of all pairs of levels that every lane of a warp has of its own, in a bank of shared memory of its
own. Inputs become float16 numbers times a power of two, one per token, that brings the largest to 2**14; the rest of
what is not float16 makes a second row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu

from jaxquant.kernels import gpu_halves as h
from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.uniform_matmul import tiles

MULTIPROCESSORS = 132  # of an H200
MOST_ROWS = 8  # of inputs, of the matrix unit
SHARED_BYTES = 227 * 1024
_LINE = 128  # bytes of a cache line
_ENTRY = 256  # bytes of a pair of levels: for 32 lanes and both rows of a lane
_TOP = 14  # exponent of the largest input


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How the work is divided.

    Attributes:
      warpgroups: of 128 threads in a block; they divide the columns.
      ahead: most loads of a thread under way.
    """

    warpgroups: int = 4
    ahead: int = 8


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one product.

    Attributes:
      config: division of the work.
      bits: of a code.
      tokens: at most MOST_ROWS / parts.
      parts: rows of inputs per token.
      columns: of x, a multiple of 8.
      out: outputs.
      blocks: of the words, along the columns.
      groups: of columns that share a scale; one for whole rows.
      table: codes name levels of rows.
      zero: there are zero points.
      dtype: of the result.
    """

    config: BlockConfig
    bits: int
    tokens: int
    parts: int
    columns: int
    out: int
    blocks: int
    groups: int
    table: bool
    zero: bool
    dtype: Any

    @property
    def warps(self) -> int:
        return tiles.WARPS * self.config.warpgroups

    @property
    def tiles(self) -> int:
        return -(-self.out // tiles.ROWS)

    @property
    def grid(self) -> int:
        return min(self.tiles, MULTIPROCESSORS)

    @property
    def own(self) -> int:
        """Blocks of a warpgroup, at most; blocks beyond the last one meet inputs of zero."""
        return -(-self.blocks // self.config.warpgroups)

    @property
    def turns(self) -> int:
        """Parts of a tile's columns: a thread holds the codes of one and waits for those of the next."""
        return -(-self.own // self.config.ahead)

    @property
    def steps(self) -> int:
        """Blocks of a warpgroup in a turn."""
        return -(-self.own // self.turns)

    @property
    def padded(self) -> int:
        """Columns with those of no weight."""
        return self.turns * self.steps * self.config.warpgroups * tiles.block_columns(self.bits)

    @property
    def segment(self) -> int:
        """Columns of a chunk whose sums share a scale."""
        width = tiles.chunk_columns(self.bits)
        return width if self.groups == 1 else min(width, self.columns // self.groups)

    @property
    def stride(self) -> int:
        """Inputs from one row to the next; 64 bytes more than whole lines, so that no two rows meet in a bank."""
        return self.padded + 32

    @property
    def rows(self) -> int:
        return self.tokens * self.parts

    def scratch(self) -> dict[str, Any]:
        """Shared memory: inputs, their scales and largest bits, the warps' sums (twice), tables (twice)."""
        memory = {
            "inputs": plgpu.SMEM((self.rows * self.stride,), jnp.float16),
            "factors": plgpu.SMEM((MOST_ROWS,), jnp.float32),
            "largest": plgpu.SMEM((self.tokens * self.warps,), jnp.uint32),
            "sums": plgpu.SMEM((2 * self.warps * 128,), jnp.float32),
        }
        if self.table:
            memory["tables"] = plgpu.SMEM((2 * 4**self.bits * _ENTRY // 4,), jnp.uint32)
        return memory


class _Thread:
    """The program of one thread.

    Args:
      plan: sizes.
      block: index of the block of threads.
      refs: the arrays of `_call` and the shared memory, by name.
    """

    def __init__(self, plan: _Plan, block: ir.Value, refs: dict[str, ir.Value]):
        self.plan = plan
        self.block = block
        self.refs = {name: t.pointer(ref) for name, ref in refs.items()}
        self.kinds = {name: ir.MemRefType(ref.type).element_type for name, ref in refs.items()}
        self.units = 2 * ir.MemRefType(refs["zero"].type).shape[1] if plan.zero else 0
        self.thread = t.utils.thread_idx()
        self.lane = t.bits_and(self.thread, 31)
        self.warp = t.utils.warp_idx(sync=True)
        self.warpgroup = t.utils.warpgroup_idx(sync=True)
        self.row, self.column = t.shift_right(self.lane, 2), t.bits_and(self.lane, 3)  # g and t of `tiles`

    def run(self) -> None:
        """Everything."""
        plan = self.plan
        loaded = self.load_rows(t.i32(0)), [self.load(t.i32(0), step) for step in range(plan.steps)]
        self.prepare_inputs()
        if plan.table:
            self.build(self.load_levels(t.i32(0)), t.i32(0))
        gpu.barrier()
        zeros = [t.constant(0.0)] * 4

        def one_turn(index, carry):
            (rows, blocks), sums = carry
            following = t.add(index, 1)
            levels = self.load_levels(following) if plan.table else None
            offsets = self.offsets(rows)
            new = self.load_rows(following), []
            for step, block in enumerate(blocks):
                sums = self.product(block, offsets, index, step, sums)
                new[1].append(self.load(following, step))
            if plan.table:
                self.build(levels, following)
            if plan.turns == 1:
                self.finish(index, sums)
                return new, zeros
            last = t.less(plan.turns - 2, self.place(index)[1])
            with t.utils.when(last):
                self.finish(index, sums)
            return new, [t.select(last, zero, total) for zero, total in zip(zeros, sums, strict=True)]

        own_tiles = arith.divui(t.sub(plan.tiles + plan.grid - 1, self.block), t.i32(plan.grid))
        _loop(t.mul(own_tiles, plan.turns), one_turn, (loaded, zeros))

    def place(self, index: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Tile and turn of a step of the loop; what follows the last tile is the last tile."""
        turns = t.i32(self.plan.turns)
        tile = t.add(self.block, t.mul(arith.divui(index, turns), self.plan.grid))
        return t.least(tile, self.plan.tiles - 1), arith.remui(index, turns)

    def own_block(self, turn: ir.Value, step: int) -> ir.Value:
        """The block of columns of this warpgroup."""
        groups = self.plan.config.warpgroups
        return t.add(t.mul(turn, self.plan.steps * groups), self.warpgroup, step * groups)

    def load(self, index: ir.Value, step: int) -> dict[str, Any]:
        """Words of a block; where columns have groups, also what `load_rows` loads for every segment."""
        plan = self.plan
        tile, turn = self.place(index)
        block = self.own_block(turn, step)
        if plan.padded != plan.blocks * tiles.block_columns(plan.bits):
            block = t.least(block, plan.blocks - 1)
        side = tiles.load_words(plan.bits)
        loads = tiles.thread_words(plan.bits) // side
        size = 4 * side * tiles.WARPS * 32
        address = t.at(self.refs["words"], t.mul(t.add(t.mul(tile, plan.blocks), block), loads * size))
        address = t.at(address, t.mul(t.bits_and(self.thread, 127), 4 * side))
        words = [word for i in range(loads) for word in h.stream(t.at(address, i * size), side)]
        segments = []
        if plan.groups > 1:
            width = tiles.chunk_columns(plan.bits)
            chunk = t.add(t.mul(block, tiles.WARPS), t.bits_and(self.warp, tiles.WARPS - 1))
            for start in range(0, width, plan.segment):
                group = arith.divui(t.add(t.mul(chunk, width), start), t.i32(plan.columns // plan.groups))
                segments.append(self.load_segment(tile, t.least(group, plan.groups - 1)))
        return {"words": words, "segments": segments}

    def load_rows(self, index: ir.Value) -> list[Any]:
        """For whole rows, what `load_segment` loads."""
        return [] if self.plan.groups > 1 else self.load_segment(self.place(index)[0], 0)

    def load_segment(self, tile: ir.Value, group: t.Int) -> list[dict[str, Any]]:
        """For both rows of this thread, units of 16 bits with the zero point, and the scale if groups have scales."""
        plan = self.plan
        rows = []
        for half in range(2):
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half), plan.out - 1)
            values: dict[str, Any] = {}
            if plan.zero:
                unit = t.shift_right(t.mul(row, plan.bits), 4)
                units = [unit, t.least(t.add(unit, 1), self.units - 1)][: 2 if plan.bits == 3 else 1]
                line = t.at(self.refs["zero"], t.mul(group, 2 * self.units))
                short = ir.IntegerType.get_signless(16)
                values["zero"] = [arith.extui(h.word(), h.load(t.at(line, t.mul(u, 2)), short)) for u in units]
            if plan.groups > 1:
                size = self.kinds["scale"].width // 8
                place = t.mul(t.add(t.mul(group, plan.out), row), size)
                values["scale"] = h.load(t.at(self.refs["scale"], place), self.kinds["scale"])
            rows.append(values)
        return rows

    def offsets(self, rows: list[dict[str, Any]]) -> list[dict[int, t.Int]]:
        """For both rows, what makes a number with a code at a place of its mantissa the code minus the zero point."""
        bits = self.plan.bits
        if self.plan.table or not rows:
            return []
        places = {_place(bits, bit)[1] for bit in range(0, 16 // bits * bits, bits)}
        offsets: list[dict[int, t.Int]] = []
        for half, values in enumerate(rows):
            if "zero" not in values:
                offsets.append({p: h.pair(-(h.THOUSAND / 2**p) - 2 ** (bits - 1)) for p in places})
                continue
            number = values["zero"][0]
            if len(values["zero"]) == 2:
                number = arith.ori(number, t.shift_left(values["zero"][1], 16))
            shift = t.bits_and(t.mul(t.add(self.row, 8 * half), bits), 15)
            number = t.bits_and(t.shift_right(number, shift), 2**bits - 1)
            negative = h.cut(t.mul(number, 0x10001), 0xFFFFFFFF, h.pair(-h.THOUSAND))
            negative = h.add_pairs(negative, h.pair(h.THOUSAND))
            offsets.append({p: h.add_pairs(negative, h.pair(-(h.THOUSAND / 2**p))) for p in places})
        return offsets

    def product(self, block: dict[str, Any], offsets: Any, index: ir.Value, step: int, sums: list[Any]) -> list[Any]:
        """Adds the product of a warp's chunk and its inputs to the sums of 16 outputs and 8 rows."""
        plan = self.plan
        width = tiles.chunk_columns(plan.bits)
        tile, turn = self.place(index)
        column = t.mul(t.add(t.mul(self.own_block(turn, step), tiles.WARPS), t.bits_and(self.warp, 3)), width)
        column = t.add(column, t.mul(self.column, 8), t.mul(t.least(self.row, plan.rows - 1), plan.stride))
        inputs = t.at(self.refs["inputs"], t.mul(column, 2))
        words = block["words"]
        halves = words[: len(words) // 2], words[len(words) // 2 :]
        per_segment = plan.segment // 32
        for start in range(0, width // 32, per_segment):
            part = sums
            if plan.groups > 1:
                rows = block["segments"][start // per_segment]
                offsets, part = self.offsets(rows), [t.constant(0.0)] * 4
            for i in range(start, start + per_segment):
                x = self.load_inputs(t.at(inputs, 64 * i))
                for k in range(2):
                    pairs = [[self.weights(words, half, offsets, 4 * i + 2 * k + j, index) for half, words in enumerate(halves)] for j in range(2)]
                    part = h.mma([*pairs[0], *pairs[1]], x[2 * k : 2 * k + 2], part)
            if plan.groups == 1:
                sums = part
            else:
                scales = [h.float32(row["scale"]) for row in rows]
                sums = [arith.addf(total, arith.mulf(p, scales[i // 2])) for i, (total, p) in enumerate(zip(sums, part, strict=True))]
        return sums

    def load_inputs(self, address: ir.Value) -> list[ir.Value]:
        """Eight inputs of a row; lanes without a row have zeros, and cost no time."""
        if self.plan.rows == MOST_ROWS:
            return h.words_of(h.load(address, ir.F16Type.get(), 8))
        return h.load_words_if(t.less(self.row, self.plan.rows), address)

    def weights(self, words: list[ir.Value], half: int, offsets: Any, number: int, index: ir.Value) -> ir.Value:
        """A pair of weights of one of the thread's rows."""
        bits = self.plan.bits
        if self.plan.table:
            return self.look_up(words, half, number, index)
        count = 16 // bits
        if bits == 3 and number == 15:
            value = h.pair(h.THOUSAND)
            for i, word in enumerate(words):
                value = h.cut(t.shift_right(word, 15 - i), 0x00010001 << i, value)
            return h.add_pairs(value, offsets[half][0])
        shift, place = _place(bits, number % count * bits)
        word = words[number // count]
        word = t.shift_right(word, shift) if shift else word
        value = h.cut(word, (2**bits - 1 << place) * 0x00010001, h.pair(h.THOUSAND))
        return h.scale_pairs(value, 2.0**-place, offsets[half][place])

    def look_up(self, words: list[ir.Value], half: int, number: int, index: ir.Value) -> ir.Value:
        """A pair of levels. Its address is a number: the pair's, then 8 bits for the lane and its row."""
        bits = self.plan.bits
        count = 16 // bits
        lane = t.add(t.mul(self.lane, 4), 128 * half, t.mul(self.parity(index), 4**bits * _ENTRY))
        if bits == 3 and number == 15:
            place = lane
            for i, word in enumerate(words):
                place = h.cut(t.shift_right(word, 22 - 2 * i), 0x300 << 2 * i, place)
        elif bits == 4:
            place = t.permute(words[number // count], lane, 0x7604 | number % count << 4)
        else:
            word, bit = words[number // count], number % count * 2 * bits
            word = t.shift_right(word, bit - 8) if bit >= 8 else t.shift_left(word, 8 - bit)
            place = h.cut(word, 4**bits - 1 << 8, lane)
        return h.load(t.at(self.refs["tables"], place), h.word())

    def parity(self, index: ir.Value) -> ir.Value:
        """Which of two places in shared memory a tile uses: those of the tile before are still being read."""
        return t.bits_and(arith.divui(index, t.i32(self.plan.turns)), 1)

    def load_levels(self, index: ir.Value) -> list[Any]:
        """For both rows, all levels, and those that the warp makes the second ones of pairs."""
        plan = self.plan
        count = 2**plan.bits
        tile, _ = self.place(index)
        short = ir.IntegerType.get_signless(16)
        rows = []
        for half in range(2):
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half), plan.out - 1)
            address = t.at(self.refs["levels"], t.mul(row, 2 * count))
            size = min(8, count)
            loads = [h.load(t.at(address, 16 * i), ir.F16Type.get(), size) for i in range(count // size)]
            first = [word for values in loads for word in h.words_of(values)]
            second = []
            for code in self.second_codes():
                second.append(arith.extui(h.word(), h.load(t.at(address, t.mul(code, 2)), short)))
            rows.append((first, second))
        return rows

    def second_codes(self) -> list[ir.Value]:
        """The codes for whose pairs this warp writes the table; of few codes several warps write the same."""
        count, warps = 2**self.plan.bits, self.plan.warps
        return [t.bits_and(t.add(self.warp, i), count - 1) for i in range(0, count, warps)]

    def build(self, levels: list[Any], index: ir.Value) -> None:
        """Writes the table of pairs of a tile, [second code][first code][row of a lane][lane]."""
        count = 2**self.plan.bits
        start = t.mul(self.parity(index), count * count * _ENTRY)
        address = t.at(self.refs["tables"], t.add(start, t.mul(self.lane, 4)))
        for half, (first, second) in enumerate(levels):
            for code, high in zip(self.second_codes(), second, strict=True):
                line = t.at(address, t.mul(code, count * _ENTRY))
                for i in range(count):
                    both = t.permute(first[i // 2], high, 0x5432 if i % 2 else 0x5410)
                    h.store(both, t.at(line, i * _ENTRY + 128 * half))

    def prepare_inputs(self) -> None:
        """Writes inputs as float16 to shared memory, with zeros behind them, and what they were divided by."""
        plan = self.plan
        kind, warps = self.kinds["x"], plan.warps
        size = 128 // kind.width  # of a load
        starts = [
            t.add(t.mul(self.thread, size), start) for start in range(0, plan.padded, plan.config.warpgroups * 128 * size)
        ]

        def inputs(token: int, start: ir.Value) -> list[ir.Value]:
            place = t.add(t.least(start, plan.columns - size), token * plan.columns)
            values = h.elements(h.load(t.at(self.refs["x"], t.mul(place, kind.width // 8)), kind, size))
            inside = t.less(start, plan.columns)
            return [t.select(inside, h.float32(v), t.constant(0.0)) for v in values]

        for token in range(plan.tokens):
            largest = t.i32(0)
            for start in starts:
                for value in inputs(token, start):
                    magnitude = t.bits_and(arith.bitcast(h.word(), value), 0x7FFFFFFF)
                    largest = arith.maxui(largest, magnitude)
            h.store(h.largest_of_warp(largest), t.at(self.refs["largest"], t.mul(t.add(self.warp, token * warps), 4)))
        gpu.barrier()
        for token in range(plan.tokens):
            largest = t.i32(0)
            for warp in range(warps):
                address = t.at(self.refs["largest"], 4 * (token * warps + warp))
                largest = arith.maxui(largest, h.load(address, h.word()))
            # The exponent of the largest, biased by 127; so small that its power of two would overflow it is taken as 32.
            exponent = arith.maxui(t.shift_right(largest, 23), t.i32(32))
            float32 = ir.F32Type.get()
            inverse = arith.bitcast(float32, t.shift_left(t.sub(2 * 127 + _TOP, exponent), 23))
            factor = arith.bitcast(float32, t.shift_left(t.sub(exponent, _TOP), 23))
            h.store(factor, t.at(self.refs["factors"], 4 * token))
            for start in starts:
                values = [arith.mulf(value, inverse) for value in inputs(token, start)]
                for part in range(plan.parts):
                    halves = [arith.truncf(ir.F16Type.get(), v) for v in values]
                    values = [arith.subf(v, arith.extf(float32, half)) for v, half in zip(values, halves, strict=True)]
                    row = (token * plan.parts + part) * plan.stride
                    address = t.at(self.refs["inputs"], t.mul(start, 2), 2 * row)
                    with t.utils.when(t.less(start, plan.padded)):
                        h.store(h.vector(halves), address, 2 * size)

    def finish(self, index: ir.Value, sums: list[ir.Value]) -> None:
        """Adds up the sums of all warps; one warpgroup, another one for each tile, scales and writes the outputs."""
        plan = self.plan
        tile, _ = self.place(index)
        address = t.at(self.refs["sums"], t.mul(self.parity(index), 512 * plan.warps))
        own = t.at(address, t.mul(self.thread, 16))
        h.store(h.vector(sums), own, 16)
        gpu.barrier()
        ordinal = arith.divui(index, t.i32(plan.turns))
        turn = arith.remui(ordinal, t.i32(plan.config.warpgroups))
        with t.utils.when(arith.cmpi(arith.CmpIPredicate.eq, turn, self.warpgroup)):
            thread = t.bits_and(self.thread, 127)
            address = t.at(address, t.mul(thread, 4))
            parts = [h.load(t.at(address, 512 * warp), ir.F32Type.get()) for warp in range(plan.warps)]
            value = functools.reduce(arith.addf, parts)
            lane, register = t.shift_right(thread, 2), t.bits_and(thread, 3)
            row = t.add(t.shift_right(lane, 2), t.mul(t.shift_right(register, 1), 8), t.mul(tile, tiles.ROWS))
            line = t.add(t.mul(t.bits_and(lane, 3), 2), t.bits_and(register, 1))
            mine = t.less(row, plan.out)
            if plan.parts == 2:  # the other part of the token's inputs is the next thread's
                value = arith.addf(value, t.utils.shfl_bfly(value, 1))
                mine = arith.andi(mine, t.less(t.bits_and(line, 1), 1))
                line = t.shift_right(line, 1)
            with t.utils.when(arith.andi(mine, t.less(line, plan.tokens))):
                self.write(value, line, row)

    def write(self, value: ir.Value, token: ir.Value, row: ir.Value) -> None:
        """Scales and writes one output."""
        plan = self.plan
        value = arith.mulf(value, h.load(t.at(self.refs["factors"], t.mul(token, 4)), ir.F32Type.get()))
        if plan.groups == 1 and "scale" in self.refs:
            scale = h.load(t.at(self.refs["scale"], t.mul(row, self.kinds["scale"].width // 8)), self.kinds["scale"])
            value = arith.mulf(value, h.float32(scale))
        place = t.add(t.mul(token, plan.out), row)
        kind = plan.dtype
        t.store(value, t.at(self.refs["y"], t.mul(place, jnp.dtype(kind).itemsize)), kind)


def _place(bits: int, bit: int) -> tuple[int, int]:
    """How far a code at a bit of a half word is shifted right, and where it then is in the mantissa, of 10 bits."""
    shift = 0 if bit + bits <= 10 else 10 // bits * bits
    return shift, bit - shift


def _loop(count: ir.Value, body: Any, carry: Any) -> None:
    """`t.loop` for a tree of values."""
    leaves, structure = jax.tree.flatten(carry)
    t.loop(count, lambda i, leaves: jax.tree.leaves(body(i, jax.tree.unflatten(structure, leaves))), leaves)


def _kernel(*refs, plan: _Plan, names: tuple[str, ...]):
    block = lax.axis_index("block")
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,) + (plgpu.RefType(),) * len(refs))
    def thread(_, block, *refs):
        _Thread(plan, block.registers.item(), dict(zip(names, refs, strict=True))).run()

    plgpu.griddepcontrol_launch_dependents()
    plgpu.griddepcontrol_wait()
    thread(block, *refs)


def _call(plan: _Plan, **arrays: jax.Array | None) -> jax.Array:
    """Runs the kernel: float [tokens, out].

    Args:
      plan: sizes.
      arrays: x [tokens, in], words, perhaps scale [groups, out], zero uint32 [groups, words] and levels float16
        [out, 2**bits].
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    scratch = plan.scratch()
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, names=(*given, "y", *scratch)),
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.out), plan.dtype),
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=plan.config.warpgroups,
        thread_name="warpgroup",
        scratch_types=list(scratch.values()),
        kernel_name="scalar_code_matmul",
    )
    return kernel(*given.values())


def _product(x: jax.Array, words: jax.Array, arrays: dict[str, Any], config: BlockConfig | None, **sizes) -> jax.Array:
    """Returns x @ W.T by as many calls as the tokens need."""
    parts = 2 if x.dtype == jnp.float32 else 1
    # More columns than there are, up to a load of 16 bytes, meet codes of zero and inputs of zero.
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    sizes |= {"config": config or BlockConfig(), "parts": parts, "columns": x.shape[1], "blocks": words.shape[1]}
    most = next(n for n in range(MOST_ROWS // parts, 0, -1) if n == 1 or _bytes(_Plan(tokens=n, **sizes)) <= SHARED_BYTES)
    calls = -(-len(x) // most)
    chunk = -(-len(x) // calls)
    plans = [(x[i : i + chunk], _Plan(tokens=len(x[i : i + chunk]), **sizes)) for i in range(0, len(x), chunk)]
    results = [_call(plan, x=part, words=words, **arrays) for part, plan in plans]
    return results[0] if calls == 1 else jnp.concatenate(results)


def _bytes(plan: _Plan) -> int:
    """Shared memory, with room for alignment."""
    return 2048 + sum(ref.shape[0] * jnp.dtype(ref.dtype).itemsize for ref in plan.scratch().values())


def shared_bytes(*, bits: int, columns: int, table: bool) -> int:
    """What one token of float32 needs, for `api.supports`."""
    blocks = -(-columns // tiles.block_columns(bits))
    return _bytes(_Plan(BlockConfig(), bits, 1, 2, columns, 1, blocks, 1, table, False, jnp.float32))


def uniform_matmul(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for uniform grids, [tokens, out] of `dtype`; sums are float32 and always in the same order.

    Args:
      x: float [tokens, in].
      words: see `tiles.to_tiles`, without tables.
      scale: float [groups, out]; groups are a multiple of 32 columns.
      zero: uint32 [groups, out * bits / 32, rounded up], codes packed along out; or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
      dtype: of the result.
      config: division of the work.
    """
    arrays = {"scale": scale, "zero": zero}
    sizes = {"bits": bits, "out": scale.shape[1], "groups": len(scale), "table": False, "zero": zero is not None}
    return _product(x, words, arrays, config, dtype=dtype, **sizes)


def level_matmul(
    x: jax.Array,
    words: jax.Array,
    levels: jax.Array,
    scale: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for a table of levels per row, [tokens, out] of `dtype`, as `uniform_matmul`.

    Args:
      x: float [tokens, in].
      words: see `tiles.to_tiles`, with tables.
      levels: float [out, 2**bits]; what is not float16 is rounded to 11 bits.
      scale: float [out or 1, 1] or [1, in], or None.
      bits: 2, 3 or 4.
      dtype: of the result.
      config: division of the work.
    """
    if scale is not None and scale.shape[1] > 1:
        x, scale = x.astype(jnp.float32) * scale.astype(jnp.float32), None
    if scale is not None:
        scale = jnp.broadcast_to(scale, (len(levels), 1)).reshape(1, -1)
    if levels.dtype != jnp.float16:
        # A power of two per row keeps the levels of any row in the range of float16.
        largest = jnp.abs(levels.astype(jnp.float32)).max(1, keepdims=True)
        factor = jnp.exp2(jnp.floor(jnp.log2(jnp.maximum(largest, 1e-30))))
        levels = (levels.astype(jnp.float32) / factor).astype(jnp.float16)
        scale = factor.reshape(1, -1) if scale is None else factor.reshape(1, -1) * scale.astype(jnp.float32)
    arrays = {"scale": scale, "levels": levels}
    sizes = {"bits": bits, "out": len(levels), "groups": 1, "table": True, "zero": False}
    return _product(x, words, arrays, config, dtype=dtype, **sizes)

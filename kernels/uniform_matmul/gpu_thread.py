"""The program of one thread of the GPU kernel for scalar codes; see `gpu`."""

import functools
from typing import Any

import jax.numpy as jnp

from jaxquant.kernels import gpu_halves as h
from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import WARPGROUP, Plan
from jaxquant.kernels.uniform_matmul.gpu_weights import Grid, Table

_TOP = 14  # exponent of a token's largest input


class Thread:
    """What one thread does.

    Args:
      plan: sizes.
      block: index of the block of threads.
      refs: addresses of x, words, y, perhaps scale, zero and levels, and of the shared memory, by name.
    """

    def __init__(self, plan: Plan, block: Any, refs: dict[str, Any]):
        self.plan, self.block, self.refs = plan, block, refs
        self.thread, self.warp = t.thread_index(), t.warp_index()
        self.warpgroup = h.shift_right(self.warp, 2)
        lane = t.bits_and(self.thread, 31)
        self.row, self.column = h.shift_right(lane, 2), t.bits_and(lane, 3)  # g and t of `tiles`
        self.table = Table(plan, refs, self.row, self.warp, lane) if plan.table else None
        self.grid = None if plan.table else Grid(plan, refs, self.row)

    def run(self) -> None:
        """Everything."""
        plan, first = self.plan, h.i32(0)
        loaded = self.load_rows(first), [self.load(first, step) for step in range(plan.steps)]
        self.prepare_inputs()
        if self.table:
            self.table.write(self.table.load(self.place(first)[0]), self.parity(first))
        t.block_barrier()
        zeros = [t.number(0.0)] * 4

        def one_turn(index, carry):
            (rows, blocks), sums = carry
            following = t.add(index, 1)
            levels = self.table.load(self.place(following)[0]) if self.table else None
            offsets = self.parity(index) if self.table else self.grid.offsets(rows) if plan.groups == 1 else None
            new: tuple[Any, list[Any]] = self.load_rows(following), []
            for step, block in enumerate(blocks):
                sums = self.product(block, offsets, index, step, sums)
                new[1].append(self.load(following, step))
            if self.table:
                self.table.write(levels, self.parity(following))
            if plan.turns == 1:
                self.finish(index, sums)
                return new, zeros
            last = h.equal(self.place(index)[1], plan.turns - 1)
            with t.when(last):
                self.finish(index, sums)
            return new, [t.select(last, zero, total) for zero, total in zip(zeros, sums, strict=True)]

        own_tiles = t.div(t.sub(plan.tiles + plan.grid - 1, self.block), plan.grid)
        h.loop(t.mul(own_tiles, plan.turns), one_turn, (loaded, zeros))

    def place(self, index: Any) -> tuple[Any, Any]:
        """Tile and turn of a step of the loop; what follows the last tile is the last tile."""
        tile = t.add(self.block, t.mul(self.ordinal(index), self.plan.grid))
        turn = h.i32(0) if self.plan.turns == 1 else t.rem(index, self.plan.turns)
        return t.least(tile, self.plan.tiles - 1), turn

    def ordinal(self, index: Any) -> Any:
        """Which of this block's tiles it is."""
        return t.div(index, self.plan.turns)

    def parity(self, index: Any) -> Any:
        """Which of two places in shared memory a tile uses: in the other one the tile before is still being read."""
        return t.bits_and(self.ordinal(index), 1)

    def chunk(self, turn: Any, step: int) -> tuple[Any, Any]:
        """The block of columns of this warpgroup, and the chunk of this warp."""
        groups = self.plan.config.warpgroups
        block = t.add(t.mul(turn, self.plan.steps * groups), self.warpgroup, step * groups)
        return block, t.add(t.mul(block, tiles.WARPS), t.bits_and(self.warp, tiles.WARPS - 1))

    def load_rows(self, index: Any) -> list[Any]:
        """Zero points of whole rows."""
        return self.grid.load(self.place(index)[0], 0) if self.grid and self.plan.groups == 1 else []

    def load(self, index: Any, step: int) -> dict[str, Any]:
        """Words of a block; if groups of columns have scales and zero points, also those of every segment."""
        plan = self.plan
        tile, turn = self.place(index)
        block, chunk = self.chunk(turn, step)
        if plan.repeats:
            block = t.least(block, plan.blocks - 1)
        side = tiles.load_words(plan.bits)
        count, size = tiles.thread_words(plan.bits) // side, 4 * side * WARPGROUP
        address = t.at(self.refs["words"], t.mul(t.add(t.mul(tile, plan.blocks), block), count * size))
        address = t.at(address, t.mul(t.bits_and(self.thread, WARPGROUP - 1), 4 * side))
        words = [word for i in range(count) for word in h.stream(t.at(address, i * size), side)]
        segments = []
        if plan.groups > 1:
            for start in range(0, plan.width, plan.segment):
                group = t.div(t.add(t.mul(chunk, plan.width), start), plan.columns // plan.groups)
                segments.append(self.grid.load(tile, t.least(group, plan.groups - 1)))
        return {"words": words, "segments": segments}

    def product(self, block: dict[str, Any], offsets: Any, index: Any, step: int, sums: list[Any]) -> list[Any]:
        """Adds the product of a warp's chunk and its inputs to the sums of 16 outputs and 8 rows."""
        plan = self.plan
        column = t.mul(self.chunk(self.place(index)[1], step)[1], plan.width)
        row = t.mul(t.least(self.row, plan.rows - 1), plan.stride)
        inputs = t.at(self.refs["inputs"], t.mul(t.add(column, t.mul(self.column, 8), row), 2))
        half = len(block["words"]) // 2
        words = block["words"][:half], block["words"][half:]
        pair = (self.table or self.grid).pair
        for start in range(0, plan.width, plan.segment):
            part = sums
            if plan.groups > 1:
                rows = block["segments"][start // plan.segment]
                offsets, part = self.grid.offsets(rows), [t.number(0.0)] * 4
            for place in range(start, start + plan.segment, 32):
                x = self.load_inputs(t.at(inputs, 2 * place))
                for k in range(2):
                    first = place // 8 + 2 * k
                    a = [pair(words[half], half, number, offsets) for number in (first, first + 1) for half in range(2)]
                    part = h.mma(a, x[2 * k : 2 * k + 2], part)
            if plan.groups > 1:
                scales = [h.float32(row["scale"]) for row in rows]
                part = [
                    t.fadd(total, t.fmul(p, scales[i // 2]))
                    for i, (total, p) in enumerate(zip(sums, part, strict=True))
                ]
            sums = part
        return sums

    def load_inputs(self, address: Any) -> list[Any]:
        """Eight inputs of a row; lanes without a row have zeros, and cost no time."""
        if self.plan.rows == 8:
            return h.load_words(address, 4)
        return h.load_words_if(t.less(self.row, self.plan.rows), address)

    def prepare_inputs(self) -> None:
        """Writes inputs as float16 to shared memory, with zeros behind them, and what they were divided by."""
        plan = self.plan
        size = 16 // plan.size("x")  # of a load
        stretch = plan.config.warpgroups * WARPGROUP * size
        starts = [t.add(t.mul(self.thread, size), start) for start in range(0, plan.padded, stretch)]

        def inputs(token: int, start: Any) -> list[Any]:
            place = t.add(t.least(start, plan.columns - size), token * plan.columns)
            values = t.load(t.at(self.refs["x"], t.mul(place, plan.size("x"))), plan.dtypes["x"], size)
            return [t.select(t.less(start, plan.columns), value, t.number(0.0)) for value in values]

        for token in range(plan.tokens):
            largest = h.i32(0)
            for start in starts:
                for value in inputs(token, start):
                    largest = h.most(largest, t.bits_and(h.bits_of(value), 0x7FFFFFFF))
            place = t.mul(t.add(self.warp, token * plan.warps), 4)
            h.store_together([h.most_of_warp(largest)], t.at(self.refs["largest"], place))
        t.block_barrier()
        for token in range(plan.tokens):
            largest = h.i32(0)
            for warp in range(plan.warps):
                (other,) = h.load_words(t.at(self.refs["largest"], 4 * (token * plan.warps + warp)))
                largest = h.most(largest, other)
            # The largest's exponent, biased by 127; no power of two below overflows.
            exponent = h.most(h.shift_right(largest, 23), 32)
            inverse = h.float_of(h.shift_left(t.sub(2 * 127 + _TOP, exponent), 23))
            t.store(h.float_of(h.shift_left(t.sub(exponent, _TOP), 23)), t.at(self.refs["factors"], 4 * token))
            for start in starts:
                values = [t.fmul(value, inverse) for value in inputs(token, start)]
                for part in range(plan.parts):
                    halves = [h.float16(value) for value in values]
                    values = [h.minus(value, h.float32(half)) for value, half in zip(values, halves, strict=True)]
                    row = (token * plan.parts + part) * plan.stride
                    with t.when(t.less(start, plan.padded)):
                        h.store_together(halves, t.at(self.refs["inputs"], t.mul(start, 2), 2 * row))

    def finish(self, index: Any, sums: list[Any]) -> None:
        """Adds up the sums of all warps, scales and writes the outputs: one warpgroup does, another one for each tile."""
        plan = self.plan
        all_sums = t.at(self.refs["sums"], t.mul(self.parity(index), 4 * WARPGROUP * plan.warps))
        h.store_together(sums, t.at(all_sums, t.mul(self.thread, 16)))
        t.block_barrier()
        with t.when(h.equal(t.rem(self.ordinal(index), plan.config.warpgroups), self.warpgroup)):
            thread = t.bits_and(self.thread, WARPGROUP - 1)
            address = t.at(all_sums, t.mul(thread, 4))
            parts = [t.load(t.at(address, 4 * WARPGROUP * warp), jnp.float32)[0] for warp in range(plan.warps)]
            value = functools.reduce(t.fadd, parts)
            lane, register = h.shift_right(thread, 2), t.bits_and(thread, 3)
            tile, _ = self.place(index)
            row = t.add(t.mul(tile, tiles.ROWS), h.shift_right(lane, 2), t.mul(h.shift_right(register, 1), 8))
            token = t.add(t.mul(t.bits_and(lane, 3), 2), t.bits_and(register, 1))
            mine = t.less(row, plan.out)
            if plan.parts == 2:
                value = t.fadd(value, h.of_neighbour(value))
                mine = t.both(mine, h.equal(t.bits_and(token, 1), 0))
                token = h.shift_right(token, 1)
            with t.when(t.both(mine, t.less(token, plan.tokens))):
                self.write(value, token, row)

    def write(self, value: Any, token: Any, row: Any) -> None:
        """Scales and writes one output."""
        plan = self.plan
        value = t.fmul(value, t.load(t.at(self.refs["factors"], t.mul(token, 4)), jnp.float32)[0])
        if plan.groups == 1 and "scale" in self.refs:
            address = t.at(self.refs["scale"], t.mul(row, plan.size("scale")))
            value = t.fmul(value, t.load(address, plan.dtypes["scale"])[0])
        place = t.mul(t.add(t.mul(token, plan.out), row), plan.size("y"))
        t.store(value, t.at(self.refs["y"], place), plan.dtypes["y"])

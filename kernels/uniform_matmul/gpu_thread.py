"""The program of one thread of the GPU kernel for scalar codes; see `gpu`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels import gpu_words as w
from jaxquant.kernels.uniform_matmul import gpu_entries, gpu_grid, gpu_table, tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import WARPGROUP, Plan


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
        self.warpgroup = w.shift_right(self.warp, 2)
        lane = t.bits_and(self.thread, 31)
        kind = gpu_table.Table if plan.book is None else gpu_entries.Entries
        self.table: Any = kind(plan, refs, lane, self.warp) if plan.table else None
        self.grid: Any = None if plan.table else gpu_grid.Grid(plan, refs, lane)
        self.weights = self.table or self.grid

    def run(self) -> None:
        """Everything."""
        plan, first = self.plan, w.i32(0)
        codes = self.load_rows(first), [self.load(first, step) for step in range(plan.steps)]
        self.prepare_inputs()
        if self.table:
            self.table.write(self.table.load(self.place(first)[0]), self.parity(first))
        t.block_barrier()
        if self.grid:
            self.grid.add_inputs(lambda turn, step: self.chunk(turn, step)[1])

        def one_turn(index, carry):
            (rows, blocks), sums = carry
            following = t.add(index, 1)
            loaded = self.table.load(self.place(following)[0]) if self.table else None
            new: tuple[Any, list[Any]] = self.load_rows(following), []
            for step, block in enumerate(blocks):
                sums = self.product(block, index, step, sums)
                new[1].append(self.load(following, step))
            if self.table:
                self.table.write(loaded, self.parity(following))
            zeros = self.weights.zeros()
            if plan.turns == 1:
                self.finish(index, rows, sums)
                return new, zeros
            last = w.equal(self.place(index)[1], plan.turns - 1)
            with t.when(last):
                self.finish(index, rows, sums)
            return new, jax.tree.map(lambda zero, total: t.select(last, zero, total), zeros, sums)

        own_tiles = t.div(t.sub(plan.tiles + plan.grid - 1, self.block), plan.grid)
        w.loop(t.mul(own_tiles, plan.turns), one_turn, (codes, self.weights.zeros()))

    def product(self, block: dict[str, Any], index: Any, step: int, sums: Any) -> Any:
        """Adds the product of this warp's chunk of a block and its inputs."""
        tile, turn = self.place(index)
        _, chunk = self.chunk(turn, step)
        if self.table:
            return self.table.product(block, chunk, tile, self.parity(index), sums)
        return self.grid.product(block, chunk, sums)

    def place(self, index: Any) -> tuple[Any, Any]:
        """Tile and turn of a step of the loop; what follows the last tile is the last tile."""
        tile = t.add(self.block, t.mul(self.ordinal(index), self.plan.grid))
        turn = w.i32(0) if self.plan.turns == 1 else t.rem(index, self.plan.turns)
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

    def words(self, tile: Any, block: Any) -> list[Any]:
        """Addresses of this thread's loads of a block."""
        side = tiles.load_words(self.plan.bits)
        count, size = tiles.thread_words(self.plan.bits) // side, 4 * side * WARPGROUP
        address = t.at(self.refs["words"], t.mul(t.add(t.mul(tile, self.plan.blocks), block), count * size))
        address = t.at(address, t.mul(t.bits_and(self.thread, WARPGROUP - 1), 4 * side))
        return [t.at(address, i * size) for i in range(count)]

    def prefetch(self) -> None:
        """Fetches the first codes into the second cache."""
        tile, turn = self.place(w.i32(0))
        with t.when(w.equal(t.bits_and(self.thread, 7), 0)):  # a line is 128 bytes, or 64 of codes of 3 bits
            for step in range(self.plan.steps):
                block, _ = self.chunk(turn, step)
                for address in self.words(tile, t.least(block, self.plan.blocks - 1)):
                    w.prefetch(address)

    def load_rows(self, index: Any) -> list[Any]:
        """Zero points of whole rows."""
        return self.grid.load_rows(self.place(index)[0]) if self.grid and self.plan.groups == 1 else []

    def load(self, index: Any, step: int) -> dict[str, Any]:
        """Words of a block; if groups of columns have scales and zero points, also those of every segment."""
        plan = self.plan
        tile, turn = self.place(index)
        block, chunk = self.chunk(turn, step)
        if plan.repeats:
            block = t.least(block, plan.blocks - 1)
        side = tiles.load_words(plan.bits)
        words = [word for address in self.words(tile, block) for word in w.stream(address, side)]
        segments = []
        if plan.groups > 1:
            for start in range(0, plan.width, plan.segment):
                group = t.div(t.add(t.mul(chunk, plan.width), start), plan.columns // plan.groups)
                segments.append(self.grid.load_rows(tile, t.least(group, plan.groups - 1)))
        return {"words": words, "segments": segments}

    def prepare_inputs(self) -> None:
        """Writes inputs to shared memory, with zeros behind them, and what they were divided by."""
        plan = self.plan
        size = 16 // plan.size("x")  # of a load
        stretch = plan.config.warpgroups * WARPGROUP * size
        starts = [t.add(t.mul(self.thread, size), start) for start in range(0, plan.padded, stretch)]

        def inputs(token: int, start: Any) -> list[Any]:
            place = t.add(t.least(start, plan.columns - size), token * plan.columns)
            values = t.load(t.at(self.refs["x"], t.mul(place, plan.size("x"))), plan.dtypes["x"], size)
            return [t.select(t.less(start, plan.columns), value, t.number(0.0)) for value in values]

        for token in range(plan.tokens):
            largest = w.i32(0)
            for start in starts:
                for value in inputs(token, start):
                    largest = w.most(largest, t.bits_and(w.bits_of(value), 0x7FFFFFFF))
            place = t.mul(t.add(self.warp, token * plan.warps), 4)
            w.store_together([w.most_of_warp(largest)], t.at(self.refs["largest"], place))
        t.block_barrier()
        top = gpu_table.TOP if plan.table else gpu_grid.TOP
        for token in range(plan.tokens):
            largest = w.i32(0)
            for warp in range(plan.warps):
                (other,) = w.load_words(t.at(self.refs["largest"], 4 * (token * plan.warps + warp)))
                largest = w.most(largest, other)
            # The largest's exponent, biased by 127; no power of two below overflows. Infinite ones make the product NaN.
            exponent = w.most(w.shift_right(largest, 23), 32)
            inverse = w.float_of(w.shift_left(t.sub(2 * 127 + top, exponent), 23))
            factor = w.float_of(w.shift_left(t.sub(exponent, top), 23))
            factor = t.select(t.less(exponent, 255), factor, t.number(math.nan))
            t.store(factor, t.at(self.refs["factors"], 4 * token))
            for start in starts:
                values = [t.fmul(value, inverse) for value in inputs(token, start)]
                with t.when(t.less(start, plan.padded)):
                    self.weights.write_inputs(token, start, values)

    def finish(self, index: Any, rows: list[Any], sums: Any) -> None:
        """Adds up the sums of all warps, scales and writes the outputs: one warpgroup does, another one for each tile."""
        plan = self.plan
        values = self.grid.collect(sums, rows) if self.grid else self.table.collect(sums)
        size = 32 * plan.values
        all_sums = t.at(self.refs["sums"], t.mul(self.parity(index), 4 * size * plan.warps))
        w.store_together(values, t.at(all_sums, t.mul(self.thread, 4 * plan.values)))
        t.block_barrier()
        with t.when(w.equal(t.rem(self.ordinal(index), plan.config.warpgroups), self.warpgroup)):
            thread = t.bits_and(self.thread, WARPGROUP - 1)
            for first in range(0, size, WARPGROUP):
                self.add_up(index, t.add(thread, first), all_sums, size)

    def add_up(self, index: Any, place: Any, all_sums: Any, size: int) -> None:
        """Adds up one of the values of all warps."""
        plan = self.plan
        address = t.at(all_sums, t.mul(t.least(place, size - 1), 4))
        parts = [t.load(t.at(address, 4 * size * warp), jnp.float32)[0] for warp in range(plan.warps)]
        value = functools.reduce(t.fadd, parts)
        row, token = self.weights.owner(t.div(place, plan.values), t.rem(place, plan.values))
        row = t.add(t.mul(self.place(index)[0], tiles.ROWS), row)
        with t.when(t.both(t.less(place, size), t.both(t.less(row, plan.out), t.less(token, plan.tokens)))):
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

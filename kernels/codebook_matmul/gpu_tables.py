"""Tables of partial products in shared memory, built by a block of threads on the matrix unit.

A product of 16 groups of inputs with 8 entries of a codebook is one instruction of a warp (see `gpu_threads.mma_tf32`):
the groups are its rows, the entries its columns, and the order of a group's d inputs, which both share, is free.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul import gpu_fused
from jaxquant.kernels.codebook_matmul.gpu_plan import ROW_BYTES, TABLE_BYTES, WARP, Plan

Operands = list[t.Value]  # of one row or column: 2 * (d / 8) values, or 2 for d = 4


class TableBuilder:
    """One thread's part in building tables.

    Args:
      plan: sizes.
      first_set: function from a pass to the first set of the block in it.
      chunk: index of the chunk of tokens.
      x: address of x [tokens, in].
      books: address of the codebooks [M, K * d].
      given: addresses of "scale" and "prologue", if there are such.
    """

    def __init__(
        self, plan: Plan, first_set: Any, chunk: t.Value, x: t.Value, books: t.Value, given: Mapping[str, t.Value]
    ):
        self.plan, self.first_set, self.chunk = plan, first_set, chunk
        self.x, self.given = x, given
        self.warp, lane = t.warp_index(), t.rem(t.thread_index(), WARP)
        self.row, self.column = t.div(lane, 4), t.rem(lane, 4)
        self.entries = self._load_entries(books)  # the same in all passes

    def _load_entries(self, books: t.Value) -> list[list[Operands]]:
        """Entry 8 * (warp + turn * warps) + row of all codebooks, [turn][codebook]."""
        plan, dtype = self.plan, self.plan.dtypes["books"]
        size = plan.dimension * jnp.dtype(dtype).itemsize
        turns = []
        for turn in range(-(-plan.entries // (8 * plan.warps))):
            entry = t.add(t.mul(t.add(self.warp, turn * plan.warps), 8), self.row)
            address = t.at(books, t.mul(t.least(entry, plan.entries - 1), size))
            turns.append([self._load(t.at(address, m * plan.entries * size), dtype) for m in range(plan.count)])
        return turns

    def _load(self, vector: t.Value, dtype: Any) -> Operands:
        """Elements 8k + 2 * column and the next of a vector of d, for all k; zeros beyond d = 4."""
        d, size = self.plan.dimension, jnp.dtype(dtype).itemsize
        if d >= 8:
            pair = t.at(vector, t.mul(self.column, 2 * size))
            return [x for k in range(d // 8) for x in t.load(t.at(pair, 8 * k * size), dtype, 2)]
        pair = t.load(t.at(vector, t.mul(t.bits_and(self.column, 1), 2 * size)), dtype, 2)
        return [t.select(t.less(self.column, 2), x, t.number(0.0)) for x in pair]

    def load_inputs(self, index: t.Value) -> list[list[Operands]]:
        """Inputs of a pass, scaled if columns are, [token * sets + set][groups of a set / 8]: group 8i + row."""
        plan = self.plan
        tables = []
        for token in range(plan.chunk):
            row = t.least(t.add(t.mul(self.chunk, plan.chunk), token), plan.tokens - 1)
            for s in range(plan.config.sets):
                group = t.add(t.mul(t.add(self.first_set(index), s), plan.groups), self.row)
                tables.append([self._load_group(row, t.add(group, i)) for i in range(0, plan.groups, 8)])
        return tables

    def _load_group(self, row: t.Value, group: t.Value) -> Operands:
        """A group of one token's inputs; zeros beyond the last one."""
        plan = self.plan
        inside = None
        if plan.total_groups != plan.room * plan.groups:
            inside, group = t.less(group, plan.total_groups), t.least(group, plan.total_groups - 1)
        values = self._load_row("x", self.x, row, group)
        if plan.activation is not None:
            gates = self._load_row("prologue", self.given["prologue"], row, group)
            values = [
                t.fmul(v, gpu_fused.activated(plan.activation, gate)) for v, gate in zip(values, gates, strict=True)
            ]
        if plan.norm is not None:
            weight = self._load_row("prologue", self.given["prologue"], 0, group)
            weight = [t.fadd(w, t.number(plan.norm[1])) for w in weight] if plan.norm[1] else weight
            values = [t.fmul(v, w) for v, w in zip(values, weight, strict=True)]
        if plan.scale == "columns":
            (factor,) = t.load(t.at(self.given["scale"], t.mul(group, plan.size("scale"))), plan.dtypes["scale"])
            values = [t.fmul(v, factor) for v in values]
        return values if inside is None else [t.select(inside, v, t.number(0.0)) for v in values]

    def _load_row(self, name: str, array: t.Value, row: t.Int, group: t.Value) -> Operands:
        """A group of a row of [rows, in]."""
        plan, size = self.plan, self.plan.size(name)
        line = t.at(array, t.mul(row, plan.columns * size))
        return self._load(t.at(line, t.mul(group, plan.dimension * size)), plan.dtypes[name])

    def build(self, inputs: list[list[Operands]], tables: t.Value) -> None:
        """Writes the tables of a pass, float32 [token, set, code, slot]."""
        plan = self.plan
        for turn, books in enumerate(self.entries):
            if plan.entries % (8 * plan.warps) and turn == len(self.entries) - 1:
                with t.when(t.less(t.add(self.warp, turn * plan.warps), -(-plan.entries // 8))):
                    self._write(turn, books, inputs, tables)
            else:
                self._write(turn, books, inputs, tables)

    def _write(self, turn: int, books: list[Operands], inputs: list[list[Operands]], tables: t.Value) -> None:
        """Writes the rows of 8 codes.

        A thread has those of two codes, 2 * column and the next, and of slots 8q + row. Lest all columns write to the same
        8 banks, those of different columns take different q at a time: (k + column) % 4 for k = 0, 1, 2, 3.
        """
        odd, high = (t.less(0, t.bits_and(self.column, bit)) for bit in (1, 2))
        code = t.add(t.mul(self.warp, 8), t.mul(self.column, 2))
        row = t.at(tables, t.add(t.mul(code, ROW_BYTES), t.mul(self.row, 4)))
        places = [t.at(row, t.mul(t.bits_and(t.add(self.column, k), 3), 32)) for k in range(4)]
        for table, groups in enumerate(inputs):
            octets = self._products(books, groups)
            for half in range(2):
                for code in range(2):
                    values = [octet[code] for octet in octets[4 * half : 4 * half + 4]]
                    values = [t.select(odd, values[(k + 1) % 4], values[k]) for k in range(4)]
                    values = [t.select(high, values[(k + 2) % 4], values[k]) for k in range(4)]
                    offset = table * TABLE_BYTES + (8 * self.plan.warps * turn + code) * ROW_BYTES + 128 * half
                    for value, place in zip(values, places, strict=True):
                        t.store(value, t.at(place, offset))

    def _products(self, books: list[Operands], groups: list[Operands]) -> list[list[t.Value]]:
        """Partial products of slots 8q + row with the thread's two codes, [q][code]; slots are codebook before group."""
        octets = []
        for book in books:
            for i in range(0, len(groups), 2):
                pair = groups[i : i + 2]
                low, high = pair if len(pair) == 2 else (pair[0], [t.number(0.0)] * len(book))
                c = self._product(low, high, book)
                octets += [c[:2], c[2:]][: len(pair)]
        return octets

    def _product(self, low: Operands, high: Operands, book: Operands) -> list[t.Value]:
        """Products of 16 groups with 8 entries; operands that 10 bits of mantissa do not hold are split in two."""
        plan = self.plan
        exact_x = plan.scale != "columns" and "prologue" not in plan.dtypes and plan.dtypes["x"] != jnp.float32
        exact_books = plan.dtypes["books"] != jnp.float32
        sums = [t.number(0.0)] * 4
        for k in range(0, len(book), 2):
            a, b = [low[k], high[k], low[k + 1], high[k + 1]], book[k : k + 2]
            a_parts = [a] if exact_x else _split(a)
            b_parts = [b] if exact_books else _split(b)
            for i, j in ((0, 0), (1, 0), (0, 1)):
                if i < len(a_parts) and j < len(b_parts):
                    sums = t.mma(a_parts[i], b_parts[j], sums)
        return sums


def _split(values: Operands) -> tuple[Operands, Operands]:
    leading, rest = zip(*map(t.split, values), strict=True)
    return list(leading), list(rest)

"""Products with tables in a thread of the GPU kernel: pairs of float16 numbers, looked up in shared memory.

With levels per row, a tile has a table of all pairs of levels of its rows. An entry has a number for each lane and each of
its rows, so no two lanes of a warp read the same bank. Its address is the pair of codes, a byte or less, then 8 bits for
row and lane. Inputs are float16 numbers times a power of two per token; what that leaves of float32 makes a second row.
"""

from typing import Any

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels import gpu_words as w
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import PAIR_BYTES, Plan

TOP = 14  # exponent of a token's largest input


class Lookup:
    """What tables of any kind have in common.

    Args:
      plan: sizes.
      refs: addresses by name.
      lane: index of the thread in its warp.
      warp: index of the warp.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], lane: Any, warp: Any):
        self.plan, self.refs, self.lane = plan, refs, lane
        self.row, self.column = w.shift_right(lane, 2), t.bits_and(lane, 3)  # g and t of `tiles`

    def load(self, tile: Any) -> list[Any]:
        """What a thread makes its part of a tile's tables from."""
        raise NotImplementedError

    def write(self, loaded: list[Any], parity: Any) -> None:
        """Writes its part, to the place of a parity."""
        raise NotImplementedError

    def pairs(self, words: tuple[list[Any], list[Any]], first: int, chunk: Any, tile: Any, parity: Any) -> list[Any]:
        """Pairs number first and first + 1 of both rows' words, rows of one number side by side."""
        raise NotImplementedError

    def start(self, parity: Any) -> Any:
        """Bytes from the start of all tables to those of a parity."""
        return t.mul(parity, self.plan.table_bytes)

    def place(self, words: list[Any], number: int, width: int, at: int, over: Any) -> Any:
        """`width` bits of a row's words, from pair `number` on, shifted to bit `at`, over a number that has zeros there."""
        bits = self.plan.bits
        count = 16 // bits
        if number == count * len(words):  # the sixteenth of 3 bits
            for i, word in enumerate(words):
                over = cut(word, 30, 2, at + 2 * i, over)
            return over
        return cut(words[number // count], number % count * 2 * bits, width, at, over)

    def zeros(self) -> list[Any]:
        """Sums of nothing: two of each, lest every product waits for the one before."""
        return [t.number(0.0)] * 8

    def product(self, block: dict[str, Any], chunk: Any, tile: Any, parity: Any, sums: list[Any]) -> list[Any]:
        """Adds the product of a warp's chunk and its inputs to the sums of 16 outputs and 8 rows of inputs."""
        plan = self.plan
        row = t.mul(t.least(self.row, plan.rows - 1), plan.stride)
        inputs = t.at(self.refs["inputs"], t.add(t.mul(chunk, 2 * plan.width), t.mul(self.column, 16), row))
        half = len(block["words"]) // 2
        words = block["words"][:half], block["words"][half:]
        for i in range(plan.width // 32):
            x = self.load_inputs(t.at(inputs, 64 * i))
            for first in (4 * i, 4 * i + 2):
                a = self.pairs(words, first, chunk, tile, parity)
                sums = sums[4:] + w.mma(a, x[first % 4 : first % 4 + 2], sums[:4])
        return sums

    def load_inputs(self, address: Any) -> list[Any]:
        """Eight inputs of a row; lanes without a row have zeros, and cost no time."""
        if self.plan.rows == 8:
            return w.load_words(address, 4)
        return w.load_words_if(t.less(self.row, self.plan.rows), address)

    def collect(self, sums: list[Any]) -> list[Any]:
        """The values of this thread that are added up over all warps."""
        sums = [t.fadd(*pair) for pair in zip(sums[:4], sums[4:], strict=True)]
        return sums if self.plan.parts == 1 else [t.fadd(sums[0], sums[1]), t.fadd(sums[2], sums[3])]

    def owner(self, lane: Any, number: Any) -> tuple[Any, Any]:
        """Row in the tile and token of a value by its lane and number."""
        tokens = 2 // self.plan.parts
        row = t.add(w.shift_right(lane, 2), t.mul(t.div(number, tokens), 8))
        return row, t.add(t.mul(t.bits_and(lane, 3), tokens), t.rem(number, tokens))

    def write_inputs(self, token: int, start: Any, values: list[Any]) -> None:
        """Writes consecutive inputs, multiplied by the power of two, as float16."""
        plan = self.plan
        for part in range(plan.parts):
            halves = [w.float16(value) for value in values]
            values = [w.minus(value, w.float32(half)) for value, half in zip(values, halves, strict=True)]
            row = (token * plan.parts + part) * plan.stride
            w.store_together(halves, t.at(self.refs["inputs"], t.mul(start, 2), row))


def cut(word: Any, bit: int, width: int, at: int, over: Any) -> Any:
    """Bits of a word from `bit` on, shifted to `at`, over a number that has zeros there."""
    shift = bit - at
    word = w.shift_right(word, shift) if shift >= 0 else w.shift_left(word, -shift)
    return w.cut(word, (2**width - 1) << at, over)


class Table(Lookup):
    """A table of levels per row."""

    def __init__(self, plan: Plan, refs: dict[str, Any], lane: Any, warp: Any):
        super().__init__(plan, refs, lane, warp)
        self.count = 2**plan.bits
        # Of which rows, and the codes for whose pairs, a warp writes the table; of few codes several warps write the same.
        self.halves: list[Any] = [0, 1]
        if plan.warps >= 2 * self.count:
            self.halves = [t.bits_and(w.shift_right(warp, plan.bits), 1)]
        self.second_codes = [t.bits_and(t.add(warp, i), self.count - 1) for i in range(0, self.count, plan.warps)]

    def load(self, tile: Any) -> list[Any]:
        """For the warp's rows, all levels, two in a word, and those that this warp makes the second ones of pairs."""
        rows = []
        for half in self.halves:
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, t.mul(half, 8)), self.plan.out - 1)
            address = t.at(self.refs["levels"], t.mul(row, 2 * self.count))
            size = min(4, self.count // 2)
            first = [word for i in range(0, self.count // 2, size) for word in w.load_words(t.at(address, 4 * i), size)]
            second = [w.load_short(t.at(address, t.mul(code, 2))) for code in self.second_codes]
            rows.append((first, second))
        return rows

    def write(self, loaded: list[Any], parity: Any) -> None:
        """Writes a table, [second code][first code][row of a lane][lane]."""
        address = t.at(self.refs["tables"], t.add(self.start(parity), t.mul(self.lane, 4)))
        for half, (first, second) in zip(self.halves, loaded, strict=True):
            for code, high in zip(self.second_codes, second, strict=True):
                line = t.at(address, t.mul(code, self.count * PAIR_BYTES), t.mul(half, PAIR_BYTES // 2))
                for i in range(self.count):
                    both = t.permute(first[i // 2], high, 0x5432 if i % 2 else 0x5410)
                    w.store_together([both], t.at(line, i * PAIR_BYTES))

    def pairs(self, words: tuple[list[Any], list[Any]], first: int, chunk: Any, tile: Any, parity: Any) -> list[Any]:
        """Pairs of levels."""
        del chunk, tile
        return [self.pair(words[half], half, number, parity) for number in (first, first + 1) for half in range(2)]

    def pair(self, words: list[Any], half: int, number: int, parity: Any) -> Any:
        """A pair of levels of one of the rows, from the row's words."""
        bits = self.plan.bits
        place = t.add(self.start(parity), t.mul(self.lane, 4), PAIR_BYTES // 2 * half)
        if bits == 4:
            # Byte 0 of the place, a byte of codes, bytes 2 and 3 of the place.
            place = t.permute(words[number // 4], place, 0x7604 | number % 4 << 4)
        else:
            place = self.place(words, number, 2 * bits, 8, place)
        return w.load_words(t.at(self.refs["tables"], place))[0]

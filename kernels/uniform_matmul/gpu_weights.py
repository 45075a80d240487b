"""How words of codes become pairs of float16 weights in a thread of the GPU kernel."""

from typing import Any

from jaxquant.kernels import gpu_halves as h
from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import PAIR_BYTES, Plan

_MANTISSA = 10  # bits of float16
_BOTH = 0x00010001  # a bit in both halves


class Grid:
    """Uniform grids: 1024 + code * 2**place is a float16 number; times 2**-place, less the rest, it is code - zero.

    Args:
      plan: sizes.
      refs: addresses by name.
      row: first of the thread's two rows, 0 to 7, of a tile.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], row: Any):
        self.plan, self.refs, self.row = plan, refs, row
        self.units = 2 * -(-plan.out * plan.bits // 32)  # 16 bits of zero points of a group

    def load(self, tile: Any, group: h.Int) -> list[dict[str, Any]]:
        """For both rows, the units with the zero point, and the scale if groups have scales."""
        plan = self.plan
        rows = []
        for half in range(2):
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half), plan.out - 1)
            values: dict[str, Any] = {}
            if "zero" in self.refs:
                unit = h.shift_right(t.mul(row, plan.bits), 4)
                units = [unit, t.least(t.add(unit, 1), self.units - 1)][: 2 if plan.bits == 3 else 1]
                line = t.at(self.refs["zero"], t.mul(group, 2 * self.units))
                values["zero"] = [h.load_short(t.at(line, t.mul(unit, 2))) for unit in units]
            if plan.groups > 1:
                place = t.mul(t.add(t.mul(group, plan.out), row), plan.size("scale"))
                values["scale"] = h.load_raw(t.at(self.refs["scale"], place), plan.dtypes["scale"])
            rows.append(values)
        return rows

    def offsets(self, rows: list[dict[str, Any]]) -> list[dict[int, h.Int]]:
        """For both rows, by place, what is added to the scaled number."""
        bits = self.plan.bits
        rests = {p: -h.THOUSAND / 2**p for p in {_place(bits, bit)[1] for bit in range(0, 16 // bits * bits, bits)}}
        offsets: list[dict[int, h.Int]] = []
        for half, values in enumerate(rows):
            if "zero" not in values:
                offsets.append({p: h.pair(rest - 2 ** (bits - 1)) for p, rest in rests.items()})
                continue
            zero, *more = values["zero"]
            if more:
                zero = t.add(zero, h.shift_left(more[0], 16))
            # A tile's 16 zero points begin a unit.
            zero = h.shift_right(zero, t.bits_and(t.mul(t.add(self.row, 8 * half), bits), 15))
            zero = t.mul(t.bits_and(zero, 2**bits - 1), _BOTH)
            negative = h.add_pairs(h.cut(zero, 0xFFFFFFFF, h.pair(-h.THOUSAND)), h.pair(h.THOUSAND))
            offsets.append({p: h.add_pairs(negative, h.pair(rest)) for p, rest in rests.items()})
        return offsets

    def pair(self, words: list[Any], half: int, number: int, offsets: list[dict[int, h.Int]]) -> Any:
        """A pair of weights of one of the rows, from the row's words."""
        bits = self.plan.bits
        count = 16 // bits
        if number == count * len(words):  # the sixteenth of 3 bits
            value = h.pair(h.THOUSAND)
            for i, word in enumerate(words):
                value = h.cut(h.shift_right(word, 15 - i), _BOTH << i, value)
            return h.add_pairs(value, offsets[half][0])
        shift, place = _place(bits, number % count * bits)
        word = words[number // count]
        value = h.cut(h.shift_right(word, shift) if shift else word, (2**bits - 1 << place) * _BOTH, h.pair(h.THOUSAND))
        return h.scale_pairs(value, 2.0**-place, offsets[half][place])


def _place(bits: int, bit: int) -> tuple[int, int]:
    """How far a code at a bit of a half word is shifted right, and where in the mantissa it then is."""
    shift = 0 if bit + bits <= _MANTISSA else _MANTISSA // bits * bits
    return shift, bit - shift


class Table:
    """Levels of rows, looked up in shared memory: a table of all pairs of levels, of each tile.

    An entry has a number for each lane and each of its rows, so no two lanes of a warp read the same bank. Its address
    is the pair of codes, a byte or less, then 8 bits for row and lane.

    Args:
      plan: sizes.
      refs: addresses by name.
      row: first of the thread's two rows, 0 to 7, of a tile.
      warp: index of the warp.
      lane: index of the thread in it.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], row: Any, warp: Any, lane: Any):
        self.plan, self.refs, self.row, self.lane = plan, refs, row, lane
        self.count = 2**plan.bits
        # The codes for whose pairs a warp writes the table; of few codes several warps write the same.
        self.second_codes = [t.bits_and(t.add(warp, i), self.count - 1) for i in range(0, self.count, plan.warps)]

    def load(self, tile: Any) -> list[Any]:
        """For both rows, all levels, two in a word, and those that this warp makes the second ones of pairs."""
        rows = []
        for half in range(2):
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half), self.plan.out - 1)
            address = t.at(self.refs["levels"], t.mul(row, 2 * self.count))
            size = min(4, self.count // 2)
            first = [word for i in range(0, self.count // 2, size) for word in h.load_words(t.at(address, 4 * i), size)]
            second = [h.load_short(t.at(address, t.mul(code, 2))) for code in self.second_codes]
            rows.append((first, second))
        return rows

    def write(self, levels: list[Any], parity: Any) -> None:
        """Writes a table, [second code][first code][row of a lane][lane]."""
        address = t.at(self.refs["tables"], t.add(self._start(parity), t.mul(self.lane, 4)))
        for half, (first, second) in enumerate(levels):
            for code, high in zip(self.second_codes, second, strict=True):
                line = t.at(address, t.mul(code, self.count * PAIR_BYTES))
                for i in range(self.count):
                    both = t.permute(first[i // 2], high, 0x5432 if i % 2 else 0x5410)
                    h.store_together([both], t.at(line, i * PAIR_BYTES + PAIR_BYTES // 2 * half))

    def _start(self, parity: Any) -> Any:
        return t.mul(parity, self.count**2 * PAIR_BYTES)

    def pair(self, words: list[Any], half: int, number: int, parity: Any) -> Any:
        """A pair of levels of one of the rows, from the row's words."""
        bits = self.plan.bits
        count = 16 // bits
        place = t.add(self._start(parity), t.mul(self.lane, 4), PAIR_BYTES // 2 * half)
        if number == count * len(words):  # the sixteenth of 3 bits
            for i, word in enumerate(words):
                place = h.cut(h.shift_right(word, 22 - 2 * i), 0x300 << 2 * i, place)
        elif bits == 4:
            # Byte 0 of the place, a byte of codes, bytes 2 and 3 of the place.
            place = t.permute(words[number // count], place, 0x7604 | number % count << 4)
        else:
            word, bit = words[number // count], number % count * 2 * bits
            word = h.shift_right(word, bit - 8) if bit >= 8 else h.shift_left(word, 8 - bit)
            place = h.cut(word, 4**bits - 1 << 8, place)
        return h.load_words(t.at(self.refs["tables"], place))[0]

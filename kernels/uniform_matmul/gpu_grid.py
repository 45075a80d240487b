"""Products with codes on uniform grids in a thread of the GPU kernel: integers, which the matrix unit adds up exactly.

A mask makes a word of codes four bytes for the matrix unit, each of them code * 2**place for one place; what differs in
place has sums of its own. Inputs are integers of 22 bits and a sign times a power of two per token, as three digits of 8
bits: three of the eight columns that the matrix unit multiplies at once (a fourth one is not used). Zero points meet the
sums of the inputs.
"""

import functools
from typing import Any

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels import gpu_words as w
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import Plan

DIGITS = 3
SLOTS = 2  # tokens of a product of the matrix unit
TOP = 21  # exponent of a token's largest input
_MIDDLES = 0x00808080  # 128 in the bytes of all digits
_ONES = 0x01010101


def registers(bits: int) -> list[tuple[int, tuple[int, ...]]]:
    """What the registers hold that `Grid.bytes` makes of a row's words: the place, and four columns of the lane's."""

    def columns(*pairs: int) -> tuple[int, ...]:
        return tuple(2 * pair + odd for odd in range(2) for pair in pairs)

    if bits == 3:
        low = [(0, columns(5 * word, 5 * word + 3)) for word in range(3)] + [(0, columns(2, 7))]
        return low + [(3, columns(5 * word + 1, 5 * word + 4)) for word in range(3)] + [(3, columns(12, 15))]
    count, places = 16 // bits, 8 // bits
    return [
        (bits * place, columns(count * word + place, count * word + place + places))
        for place in range(places)
        for word in range(2)
    ]


@functools.cache
def offsets(bits: int) -> list[int]:
    """Where in shared memory a lane's columns lie: as registers ask for them, 16 bytes of each of four lanes in turn."""
    order = [column for _, four in registers(bits) for column in four]
    return [order.index(column) // 16 * 64 + order.index(column) % 16 for column in range(len(order))]


class Grid:
    """Uniform grids.

    Args:
      plan: sizes.
      refs: addresses by name.
      lane: index of the thread in its warp.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], lane: Any):
        self.plan, self.refs = plan, refs
        self.row, self.column = w.shift_right(lane, 2), t.bits_and(lane, 3)  # g and t of `tiles`
        self.units = 2 * -(-plan.out * plan.bits // 32)  # 16 bits of zero points of a group
        self.registers = registers(plan.bits)
        self.places = sorted({place for place, _ in self.registers})
        # Of this thread's columns 2 * column and the next, the first two or the last of the digits.
        last = w.equal(t.bits_and(self.column, 1), 1)
        self.worth = t.select(last, t.number(1.0), t.number(2.0**16)), t.select(last, t.number(0.0), t.number(2.0**8))
        self.input_sums: list[list[Any]] = []

    def zeros(self) -> Any:
        """Sums of nothing: for whole rows integers, by place and slots; for groups numbers, of both rows."""
        if self.plan.groups > 1:
            return [t.number(0.0)] * (2 * self.plan.slots)
        return self.integers()

    def integers(self) -> list[list[list[Any]]]:
        """Integer sums of nothing, by place and slot."""
        return [[[w.i32(0)] * 4 for _ in range(self.plan.slots)] for _ in self.places]

    def load_rows(self, tile: Any, group: w.Int = 0) -> list[dict[str, Any]]:
        """For both rows, the units with the zero point, and the scale if groups have scales."""
        plan = self.plan
        rows = []
        for half in range(2):
            row = t.least(t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half), plan.out - 1)
            values: dict[str, Any] = {}
            if "zero" in self.refs:
                unit = w.shift_right(t.mul(row, plan.bits), 4)
                units = [unit, t.least(t.add(unit, 1), self.units - 1)][: 2 if plan.bits == 3 else 1]
                line = t.at(self.refs["zero"], t.mul(group, 2 * self.units))
                values["zero"] = [w.load_short(t.at(line, t.mul(unit, 2))) for unit in units]
            if plan.groups > 1:
                place = t.mul(t.add(t.mul(group, plan.out), row), plan.size("scale"))
                values["scale"] = w.load_raw(t.at(self.refs["scale"], place), plan.dtypes["scale"])
            rows.append(values)
        return rows

    def zero_points(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Of both rows, integers."""
        bits = self.plan.bits
        points = []
        for half, values in enumerate(rows):
            if "zero" not in values:
                points.append(w.i32(2 ** (bits - 1)))
                continue
            zero, *more = values["zero"]
            if more:
                zero = t.add(zero, w.shift_left(more[0], 16))
            # A tile's 16 zero points begin a unit.
            zero = w.shift_right(zero, t.bits_and(t.mul(t.add(self.row, 8 * half), bits), 15))
            points.append(t.bits_and(zero, 2**bits - 1))
        return points

    def bytes(self, words: list[Any]) -> list[Any]:
        """A row's codes, as `registers` says."""
        bits = self.plan.bits
        if bits == 8:
            return words
        if bits != 3:
            mask = (2**bits - 1) * _ONES
            return [t.bits_and(word, w.signed(mask << place)) for place in self.places for word in words]
        a, b, c = words
        shifted = [w.shift_right(word, 1) for word in words]

        def both(first: Any, second: Any, place: int) -> Any:
            return w.cut(first, 0x00070007 << place, t.bits_and(second, 0x07000700 << place))

        last = t.bits_and(w.shift_right(a, 4), 0x08000800)
        last = w.cut(w.shift_right(c, 2), 0x20002000, w.cut(w.shift_right(b, 3), 0x10001000, last))
        low = [both(word, other, 0) for word, other in zip(words, shifted, strict=True)]
        high = [both(word, other, 3) for word, other in zip(words, shifted, strict=True)]
        low.append(both(w.shift_right(a, 6), w.shift_left(b, 2), 0))
        high.append(w.cut(w.shift_right(c, 3), 0x00380038, last))
        return low + high

    def product(self, block: dict[str, Any], chunk: Any, sums: Any) -> Any:
        """Adds the product of a warp's chunk and its inputs."""
        plan = self.plan
        half = len(block["words"]) // 2
        rows = self.bytes(block["words"][:half]), self.bytes(block["words"][half:])
        if plan.groups == 1:
            return self.add_integers(rows, chunk, sums)
        for start, segment in zip(range(0, plan.width, plan.segment), block["segments"], strict=True):
            ones = [[w.i32(_ONES)] * len(self.registers)] * 2
            inputs = self.add_integers(ones, chunk, self.integers(), start)
            found = self.add_integers(rows, chunk, self.integers(), start)
            values = self.numbers(found, _over_places(inputs), self.zero_points(segment))
            scales = [w.float32(row["scale"]) for row in segment]
            sums = [
                t.fadd(old, t.fmul(new, scales[i % 2])) for i, (old, new) in enumerate(zip(sums, values, strict=True))
            ]
        return sums

    def add_integers(self, rows: Any, chunk: Any, sums: Any, start: int = 0) -> Any:
        """Adds products with the inputs of a segment."""
        plan = self.plan
        sums = [list(slots) for slots in sums]
        for slot in range(plan.slots):
            inputs = self.load_inputs(chunk, slot)
            for i in range(0, len(self.registers), 2):
                place = self.places.index(self.registers[i][0])
                masks = [self.mask(columns, start) for _, columns in self.registers[i : i + 2]]
                if any(masks):
                    b = [
                        x if mask == -1 else t.bits_and(x, mask)
                        for x, mask in zip(inputs[i : i + 2], masks, strict=True)
                    ]
                    a = [row[j] for j in (i, i + 1) for row in rows]
                    sums[place][slot] = w.mma_bytes(a, b, sums[place][slot])
        return sums

    def mask(self, columns: tuple[int, ...], start: int) -> int:
        """Bytes of columns in a segment."""
        inside = [start <= column // 8 * 32 < start + self.plan.segment for column in columns]
        return w.signed(sum(0xFF << 8 * i for i in range(4) if inside[i]))

    def load_inputs(self, chunk: Any, slot: int) -> list[Any]:
        """The lane's columns of a digit of a token."""
        plan = self.plan
        token = t.least(t.add(w.shift_right(self.row, 2), SLOTS * slot), plan.tokens - 1)
        row = t.add(t.mul(token, DIGITS), t.least(t.bits_and(self.row, 3), DIGITS - 1))
        count = len(self.registers)
        size = 4 * min(4, count)
        offset = t.add(t.mul(row, plan.stride), t.mul(chunk, plan.width), t.mul(self.column, size))
        address = t.at(self.refs["inputs"], offset)
        return [word for i in range(0, count, 4) for word in w.load_words(t.at(address, 16 * i), min(4, count))]

    def numbers(self, sums: Any, input_sums: list[list[Any]], zeros: list[Any]) -> list[Any]:
        """What the digits of this thread are worth together: for each of the slots, of both rows."""
        values = []
        for slot, inputs in enumerate(input_sums):
            total = []
            for i in range(4):
                parts = [
                    w.shift_right_signed(by_place[slot][i], place)
                    for place, by_place in zip(self.places, sums, strict=True)
                ]
                total.append(w.float_from(t.sub(functools.reduce(t.add, parts), t.mul(zeros[i // 2], inputs[i]))))
            for half in range(0, 4, 2):
                values.append(t.fadd(t.fmul(total[half], self.worth[0]), t.fmul(total[half + 1], self.worth[1])))
        return values

    def collect(self, sums: Any, rows: list[dict[str, Any]]) -> list[Any]:
        """The values of this thread that are added up over all warps, one per slot.

        Two lanes have the digits of both rows; the second lane goes on with the second row.
        """
        if self.plan.groups == 1:
            sums = self.numbers(sums, self.input_sums, self.zero_points(rows))
        second = w.equal(t.bits_and(self.column, 1), 1)
        values = []
        for first_row, second_row in zip(sums[::2], sums[1::2], strict=True):
            given = w.of_neighbour(t.select(second, first_row, second_row))
            values.append(t.fadd(t.select(second, second_row, first_row), given))
        return values

    def owner(self, lane: Any, number: Any) -> tuple[Any, Any]:
        """Row in the tile and token of a value by its lane and number."""
        row = t.add(w.shift_right(lane, 2), t.mul(t.bits_and(lane, 1), 8))
        return row, t.add(t.mul(number, SLOTS), t.bits_and(w.shift_right(lane, 1), 1))

    def write_inputs(self, token: int, start: Any, values: list[Any]) -> None:
        """Writes consecutive inputs, multiplied by the power of two, as digits."""
        plan = self.plan
        width, found = plan.width, offsets(plan.bits)
        size = 4 * min(4, len(self.registers))
        first = t.rem(start, width)
        lane = t.mul(t.bits_and(w.shift_right(start, 3), 3), size)
        address = t.at(self.refs["inputs"], t.add(t.sub(start, first), lane))
        piece = t.mul(w.shift_right(first, 5), 8)
        later = t.bits_and(start, 4)  # in a row of eight
        for i, value in enumerate(values):
            # Digits with a sign: 128 more, they are the bytes of the integer with 128 in each byte added. (Not by adding a
            # large float32 whose low bits are then the integer: ptxas 13.0 makes its lowest byte a saturating conversion.)
            digits = t.xor(t.add(w.nearest(value), _MIDDLES), _MIDDLES)
            # The offsets of the column in up to four pieces, a byte each.
            packed = [
                w.signed(sum(found[8 * p + i + more] << 8 * p for p in range(len(found) // 8)))
                for more in (0, 8 - len(values))
            ]
            packed = t.select(w.equal(later, 0), w.i32(packed[0]), w.i32(packed[1]))
            place = t.at(address, t.bits_and(w.shift_right(packed, piece), 255))
            for digit in range(DIGITS):
                byte = w.shift_right(digits, 8 * (DIGITS - 1 - digit))
                w.store_byte(byte, t.at(place, (token * DIGITS + digit) * plan.stride))

    def add_inputs(self, chunks: Any) -> None:
        """Adds up the inputs of all of a warp's chunks: called with a function of turn and step."""
        plan = self.plan
        if plan.groups > 1:
            return

        def one_turn(turn, sums):
            ones = [[w.i32(_ONES)] * len(self.registers)] * 2
            for step in range(plan.steps):
                sums = self.add_integers(ones, chunks(turn, step), sums)
            return sums

        sums = w.loop(w.i32(plan.turns), one_turn, self.integers())
        self.input_sums = _over_places(sums)


def _over_places(sums: list[list[list[Any]]]) -> list[list[Any]]:
    """Adds up what places have, by slot."""
    return [[functools.reduce(t.add, same) for same in zip(*slots, strict=True)] for slots in zip(*sums, strict=True)]

"""Products with tables of entries per block of the weight in a thread of the GPU kernel for few tokens.

A tile's tables are copied to shared memory as they are, those of a block of columns after those of the one before. Rows of
a tile mostly share them, so that lanes that read the same bank mostly read the same word.
"""

from typing import Any

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels import gpu_words as w
from jaxquant.kernels.uniform_matmul import tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import Book, Plan
from jaxquant.kernels.uniform_matmul.gpu_table import Lookup, cut

_OCTET = 8  # consecutive columns of a lane, of every 32
_ALIGNED = 1024  # bytes, of which arrays in shared memory begin at multiples


class Entries(Lookup):
    """Tables of entries per block."""

    def __init__(self, plan: Plan, refs: dict[str, Any], lane: Any, warp: Any):
        super().__init__(plan, refs, lane, warp)
        assert plan.book is not None
        self.book: Book = plan.book
        self.piece = min(16, 2 * self.book.values)  # bytes that a thread copies at once
        self.pieces = plan.table_bytes // self.piece
        # Where tables begin at multiples of their size, a code lies over the table's address, which saves an addition.
        self.numbered = _ALIGNED % (2 * self.book.values) == 0
        self.base = w.shared_number(refs["tables"]) if self.numbered else 0
        thread = t.add(t.mul(warp, 32), lane)
        self.own = [t.add(thread, start) for start in range(0, self.pieces, 32 * plan.warps)]

    def load(self, tile: Any) -> list[Any]:
        """The thread's pieces of the tables; some other ones where there are none."""
        book, loaded = self.book, []
        first = t.mul(self._first_book(tile), 2 * book.values)
        for piece in self.own:
            place = t.mul(t.least(piece, self.pieces - 1), self.piece)
            line, offset = t.div(place, book.line_bytes), t.rem(place, book.line_bytes)
            offset = t.least(t.add(first, offset), 2 * book.line - self.piece)
            address = t.at(self.refs["levels"], t.add(t.mul(line, 2 * book.line), offset))
            loaded.append(w.load_words(address, self.piece // 4))
        return loaded

    def write(self, loaded: list[Any], parity: Any) -> None:
        """Writes the pieces."""
        for piece, words in zip(self.own, loaded, strict=True):
            place = t.add(self.start(parity), t.mul(piece, self.piece))
            with t.when(t.less(piece, self.pieces)):
                w.store_together(words, t.at(self.refs["tables"], place))

    def _first_book(self, tile: Any) -> Any:
        """Of a line, the table of a tile's first row."""
        return t.div(t.mul(tile, tiles.ROWS), self.book.block[0])

    def pairs(self, words: tuple[list[Any], list[Any]], first: int, chunk: Any, tile: Any, parity: Any) -> list[Any]:
        """Pairs of values of entries."""
        rows = []
        for half in range(2):
            table = self._table(half, first // 4, chunk, tile, parity)
            if self.book.dimension == 4:  # both pairs are an entry
                rows.append(self._load(self.place(words[half], first, 8, 3, table), 2))
            elif self.book.dimension == 2:
                places = [self.place(words[half], n, 2 * self.plan.bits, 2, table) for n in (first, first + 1)]
                rows.append([self._load(place, 1)[0] for place in places])
            else:
                rows.append([self._levels(words[half], n, table) for n in (first, first + 1)])
        return [row[number] for number in range(2) for row in rows]

    def _table(self, half: int, group: int, chunk: Any, tile: Any, parity: Any) -> Any:
        """Place of the table of a row and of the lane's columns in a group of 32, see `_load`."""
        (rows, columns), width = self.book.block, self.plan.width
        table = t.add(self.start(parity), self.base)
        if rows % tiles.ROWS:
            row = t.add(t.mul(tile, tiles.ROWS), self.row, 8 * half)
            book = t.sub(t.div(row, rows), self._first_book(tile))
            table = t.add(table, t.mul(book, 2 * self.book.values))
        first = t.mul(chunk, width)
        if columns % width:
            first = t.add(first, 32 * group)
        if columns % 32:
            first = t.add(first, t.mul(self.column, _OCTET))
        # Beyond the last column inputs are zero.
        line = t.least(t.div(first, columns), self.book.lines - 1)
        return t.add(table, t.mul(line, self.book.line_bytes))

    def _load(self, place: Any, count: int) -> list[Any]:
        return w.load_words(self._address(place), count)

    def _address(self, place: Any) -> Any:
        """Of a number of an address, or of bytes from the start of all tables."""
        return w.shared_address(place) if self.numbered else t.at(self.refs["tables"], place)

    def _levels(self, words: list[Any], number: int, table: Any) -> Any:
        """A pair of single values, of tables with d = 1."""
        bits = self.plan.bits
        if bits == 3 and number == 15:  # two bits of which are in each word's last bits
            low = cut(words[1], 30, 1, 3, cut(words[0], 30, 2, 1, table))
            high = cut(words[2], 30, 2, 2, cut(words[1], 31, 1, 1, table))
        else:
            word, bit = words[number // (16 // bits)], number % (16 // bits) * 2 * bits
            low, high = (cut(word, bit + i * bits, bits, 1, table) for i in range(2))
        low, high = (w.load_short(self._address(place)) for place in (low, high))
        return t.permute(low, high, 0x5410)

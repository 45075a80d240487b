"""Runs the thread programs of GPU kernels in numpy: all threads of a cluster in step, one array element each.

`patch` puts this vocabulary in the place of `jaxquant.kernels.gpu_threads`, and of what `gpu_words` has beside it. It
checks on the way that no thread reads or writes outside of the arrays, that no two write to one place, that warps are whole
where their threads wait for each other, and counts how often shared memory is accessed by a warp and how many accesses of
one bank that takes at most.
"""

import contextlib
import dataclasses

import numpy as np

from jaxquant.kernels import gpu_threads, gpu_words

WORD = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Places in memory [blocks, bytes], or [1, bytes] if it is global."""

    memory: np.ndarray
    block: np.ndarray
    shared: bool
    offset: np.ndarray | int = 0


class Model:
    """Threads of `cluster` blocks with `threads` each."""

    def __init__(self, cluster: int, threads: int):
        self.count = cluster * threads
        self.thread = np.tile(np.arange(threads), cluster)
        self.block = np.repeat(np.arange(cluster), threads)
        self.active = np.ones(self.count, bool)
        self.expected = np.zeros(cluster, int)
        self.arrived = np.zeros(cluster, int)
        self.most_in_a_bank = 0

    def patch(self, monkeypatch):
        for name in dir(self):
            module = gpu_threads if name in vars(gpu_threads) else gpu_words
            if name in vars(module) and not name.startswith("_"):
                monkeypatch.setattr(module, name, getattr(self, name))

    def shared(self, size):
        return Pointer(np.zeros((self.block.max() + 1, size), np.uint8), self.block, True)

    def global_(self, array):
        return Pointer(array.view(np.uint8).reshape(1, -1), np.zeros_like(self.block), False)

    # Integers
    add = staticmethod(lambda *terms: sum(terms) & WORD)
    sub = staticmethod(lambda a, b: (a - b) & WORD)
    mul = staticmethod(lambda a, b: (a * b) & WORD)
    div = staticmethod(lambda a, b: a // b)
    rem = staticmethod(lambda a, b: a % b)
    least = staticmethod(np.minimum)
    most = staticmethod(np.maximum)
    xor = staticmethod(lambda a, b: a ^ b)
    bits_and = staticmethod(lambda a, b: a & b)
    less = staticmethod(lambda a, b: a < b)
    both = staticmethod(lambda a, b: a & b)

    def permute(self, low, high, selector):
        source = [(word >> 8 * i) & 255 for word in (low, high) for i in range(4)]
        result = 0
        for k in range(4):
            byte = source[selector >> 4 * k & 7]
            result = result | (np.where(byte & 128, 255, 0) if selector >> 4 * k & 8 else byte) << 8 * k
        return result

    # Numbers
    number = staticmethod(np.float32)
    fadd = staticmethod(lambda a, b: a + b)
    fmul = staticmethod(lambda a, b: a * b)
    fma = staticmethod(lambda a, b, c: a * b + c)
    rsqrt = staticmethod(lambda x: 1 / np.sqrt(x))
    bits_of = staticmethod(lambda x: np.asarray(x, np.float32).view(np.uint32).astype(np.int64))
    float_of = staticmethod(lambda x: np.asarray(x).astype(np.uint32).view(np.float32))
    exp2 = staticmethod(np.exp2)
    reciprocal = staticmethod(lambda x: 1 / x)
    select = staticmethod(np.where)

    def split(self, x):
        leading = (np.asarray(x, np.float32).view(np.uint32) & np.uint32(WORD - 0x1FFF)).view(np.float32)
        return leading, x - leading

    def mma(self, a, b, c):
        self.whole_warps()

        def lanes(x):
            return np.broadcast_to(np.asarray(x, np.float32), self.count).reshape(-1, 32)

        g, t = np.arange(32) // 4, np.arange(32) % 4
        left, right, sums = (np.zeros((self.count // 32, *shape)) for shape in ((16, 8), (8, 8), (16, 8)))
        for x, row, column in zip(a, (g, g + 8, g, g + 8), (t, t, t + 4, t + 4), strict=True):
            left[:, row, column] = self.split(lanes(x))[0]
        for x, row in zip(b, (t, t + 4), strict=True):
            right[:, row, g] = self.split(lanes(x))[0]
        places = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
        for x, (row, column) in zip(c, places, strict=True):
            sums[:, row, column] = lanes(x)
        sums += left @ right
        return [sums[:, row, column].reshape(-1).astype(np.float32) for row, column in places]

    # Threads
    def thread_index(self):
        return self.thread

    def warp_index(self):
        self.whole_warps()
        return self.thread // 32

    def whole_warps(self):
        """Threads of a warp exchange values: those that do not come are waited for forever."""
        active = self.active.reshape(-1, 32)
        assert np.all(active.all(1) | ~active.any(1))

    @contextlib.contextmanager
    def when(self, condition):
        before = self.active
        self.active = before & condition
        yield
        self.active = before

    def loop(self, count, body, carry):
        for i in range(count):
            carry = list(body(np.full(self.count, i), carry))
        return carry

    # Memory
    @staticmethod
    def pointer(ref):
        return ref

    @staticmethod
    def at(address, *offsets):
        return dataclasses.replace(address, offset=address.offset + sum(offsets))

    @staticmethod
    def line(address, number, size):
        return dataclasses.replace(address, offset=address.offset + number * size)

    @staticmethod
    def of_block(address, rank):
        return dataclasses.replace(address, block=rank)

    def places(self, address, size):
        offset = np.broadcast_to(address.offset, self.count)
        block = np.broadcast_to(address.block, self.count)
        inside = (offset >= 0) & (offset + size <= address.memory.shape[1]) & (offset % size == 0)
        assert np.all(inside | ~self.active)
        if address.shared and size == 4:
            for warp in range(0, self.count, 32):
                words = np.unique((offset // 4)[warp : warp + 32][self.active[warp : warp + 32]])
                if len(words):
                    self.most_in_a_bank = max(self.most_in_a_bank, np.bincount(words % 32).max())
        return block[:, None], np.where(inside, offset, 0)[:, None] + np.arange(size)

    def load(self, address, dtype, count=1):
        dtype = np.dtype(dtype)
        values = address.memory[self.places(address, count * dtype.itemsize)].view(dtype).astype(np.float32)
        return list(values.T)

    def stream_words(self, address):
        return list(address.memory[self.places(address, 16)].view(np.uint32).astype(np.int64).T)

    def load_word(self, address):
        return address.memory[self.places(address, 4)].view(np.uint32).astype(np.int64)[:, 0]

    def shuffle(self, x, distance):
        self.whole_warps()
        return np.broadcast_to(x, self.count)[np.arange(self.count) ^ distance]

    def store_four(self, values, address):
        values = [np.broadcast_to(x, self.count) for x in values]
        for i, x in enumerate(values):
            kind = np.float32 if x.dtype.kind == "f" else np.uint32
            self.store(x.astype(kind).view(np.float32), self.at(address, 4 * i))

    def store_vector(self, values, address, dtype):
        size = np.dtype(dtype).itemsize
        self.places(address, len(values) * size)
        for i, x in enumerate(values):
            self.store(x, self.at(address, i * size), dtype)

    def store(self, x, address, dtype=np.float32):
        dtype = np.dtype(dtype)
        block, offset = self.places(address, dtype.itemsize)
        places = (block * address.memory.shape[1] + offset[:, :1])[self.active, 0]
        assert len(np.unique(places)) == len(places)
        values = np.broadcast_to(np.asarray(x, np.float32), self.count).astype(dtype)
        data = values.view(np.uint8).reshape(self.count, -1)
        address.memory[block[self.active], offset[self.active]] = data[self.active]

    # Barriers: all threads are in step.
    def block_barrier(self):
        assert self.active.all()

    cluster_barrier = block_barrier

    def expect_bytes(self, barrier, count):
        self.expected[self.block[self.active]] += count

    def send(self, x, address, barrier):
        np.add.at(self.arrived, np.broadcast_to(barrier.block, self.count)[self.active], 4)
        before, self.most_in_a_bank = self.most_in_a_bank, 0
        self.store(x, address)
        self.most_in_a_bank = before

    def wait_bytes(self, barrier):
        np.testing.assert_array_equal(self.arrived, self.expected)

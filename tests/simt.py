"""A GPU's block of threads in numpy: what `gpu_threads` and `gpu_words` emit as code, done at once for all threads.

A value is an array with an element per thread, an address a buffer and a byte offset per thread. Threads go together, so
there are no races; a thread that reads or writes beyond a buffer is an error.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np


class Threads:
    """Stands for both modules.

    Args:
      count: threads of a block.
    """

    def __init__(self, count):
        self.count = count
        self.numbered = []  # buffers whose addresses have numbers
        self.active = np.ones(count, bool)

    def i32(self, x):
        return np.full(self.count, x & 0xFFFFFFFF, np.uint32) if isinstance(x, int) else x

    def number(self, x):
        return np.full(self.count, x, np.float32)

    def add(self, *terms):
        return sum((self.i32(x) for x in terms[1:]), self.i32(terms[0]))

    def sub(self, a, b):
        return self.i32(a) - self.i32(b)

    def mul(self, a, b):
        return self.i32(a) * self.i32(b)

    def bits_and(self, a, b):
        return self.i32(a) & self.i32(b)

    def xor(self, a, b):
        return self.i32(a) ^ self.i32(b)

    def shift_left(self, a, b):
        return self.i32(a) << self.i32(b)

    def shift_right(self, a, b):
        return self.i32(a) >> self.i32(b)

    def least(self, a, b):
        return np.minimum(self.i32(a), self.i32(b))

    def most(self, a, b):
        return np.maximum(self.i32(a), self.i32(b))

    def less(self, a, b):
        return self.i32(a) < self.i32(b)

    def equal(self, a, b):
        return self.i32(a) == self.i32(b)

    def div(self, a, b):
        return self.i32(a) // self.i32(b)

    def rem(self, a, b):
        return self.i32(a) % self.i32(b)

    def both(self, a, b):
        return a & b

    def select(self, condition, a, b):
        return np.where(condition, a, b)

    def fadd(self, a, b):
        return a + b

    def minus(self, a, b):
        return a - b

    def fmul(self, a, b):
        return a * b

    def float32(self, x):
        return x.astype(np.float32)

    def float16(self, x):
        return x.astype(np.float16)

    def bits_of(self, x):
        return x.view(np.uint32)

    def float_of(self, x):
        return x.view(np.float32)

    def cut(self, x, mask, over):
        return (x & np.uint32(mask)) | self.i32(over)

    def halves(self, x):
        """float16 [threads, 2] of words."""
        return np.ascontiguousarray(self.i32(x)).view(np.float16).reshape(self.count, 2)

    def permute(self, low, high, selector):
        data = np.stack([self.i32(low), self.i32(high)], axis=1).view(np.uint8).reshape(self.count, 8)
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        assert max(chosen) < 8
        return np.ascontiguousarray(data[:, chosen]).view(np.uint32)[:, 0]

    def mma(self, a, b, c):
        warps = self.count // 32
        lanes = [self.halves(x).reshape(warps, 8, 4, 2).astype(np.float64) for x in (*a, *b)]  # warp, g, t, 2
        flat = [x.reshape(warps, 8, 8) for x in lanes]
        left = np.concatenate([np.concatenate(flat[i : i + 3 : 2], axis=2) for i in range(2)], axis=1)
        right = np.concatenate(flat[4:], axis=2)  # warp, column, k
        product = (left @ right.transpose(0, 2, 1)).reshape(warps, 2, 8, 4, 2)
        parts = [product[:, i // 2, :, :, i % 2].reshape(-1).astype(np.float32) for i in range(4)]
        return [old + new for old, new in zip(c, parts, strict=True)]

    def mma_bytes(self, a, b, c):
        warps = self.count // 32

        def fours(x, kind):
            return np.ascontiguousarray(self.i32(x)).view(kind).reshape(warps, 8, 16).astype(np.int64)

        flat = [fours(x, np.uint8) for x in a]
        left = np.concatenate([np.concatenate(flat[i::2], axis=2) for i in range(2)], axis=1)
        right = np.concatenate([fours(x, np.int8) for x in b], axis=2)
        product = (left @ right.transpose(0, 2, 1)).reshape(warps, 2, 8, 4, 2)
        parts = [product[:, i // 2, :, :, i % 2].reshape(-1).astype(np.int32).view(np.uint32) for i in range(4)]
        return [old + new for old, new in zip(c, parts, strict=True)]

    def shift_right_signed(self, a, b):
        return (self.i32(a).view(np.int32) >> np.int32(b)).view(np.uint32)

    @staticmethod
    def signed(bits):
        return bits - (bits >> 31 << 32)

    def nearest(self, x):
        return np.rint(np.nan_to_num(x, posinf=0, neginf=0)).astype(np.int32).view(np.uint32)

    def float_from(self, x):
        return x.view(np.int32).astype(np.float32)

    def store_byte(self, x, address):
        self.store_together([x.astype(np.uint8)], address)

    def most_of_warp(self, x):
        return np.repeat(x.reshape(-1, 32).max(1), 32)

    def shared_number(self, address):
        self.numbered.append(address[0])
        return self.i32(address[1]) + self.i32(len(self.numbered) << 20)

    def shared_address(self, number):
        (buffer,) = set((number >> np.uint32(20)).tolist())
        return self.numbered[buffer - 1], number & np.uint32(2**20 - 1)

    def of_neighbour(self, x):
        return x.reshape(-1, 2)[:, ::-1].reshape(-1)

    def thread_index(self):
        return np.arange(self.count, dtype=np.uint32)

    def warp_index(self):
        return self.thread_index() // np.uint32(32)

    def block_barrier(self):
        assert self.active.all() or not self.active.any()

    @contextlib.contextmanager
    def when(self, condition):
        before = self.active
        self.active = before & condition
        yield
        self.active = before

    def loop(self, count, body, carry):
        count = np.unique(self.i32(count))
        assert len(count) == 1
        structure = jax.tree.structure(carry)
        for i in range(count[0]):
            carry = body(self.i32(i), carry)
            assert jax.tree.structure(carry) == structure
        return carry

    def at(self, address, *offsets):
        buffer, offset = address
        return buffer, offset + sum(self.i32(x).astype(np.int64) for x in offsets)

    def fetch(self, address, dtype, count):
        """[threads, count], aligned to all of it."""
        buffer, offset = address
        size = np.dtype(dtype).itemsize * count
        offset = offset if np.ndim(offset) else np.full(self.count, offset)
        inside = (offset >= 0) & (offset + size <= len(buffer)) & (offset % size == 0)
        assert inside[self.active].all(), "a thread reads beyond its buffer"
        place = np.where(inside, offset, 0)[:, None] + np.arange(size)
        return buffer[place].view(dtype).reshape(self.count, count)

    def load(self, address, dtype, count=1):
        return list(self.fetch(address, jnp.dtype(dtype), count).astype(np.float32).T)

    def load_raw(self, address, dtype):
        return self.fetch(address, jnp.dtype(dtype), 1)[:, 0]

    def load_words(self, address, count=1):
        return list(self.fetch(address, np.uint32, count).T)

    def stream(self, address, count):
        return self.load_words(address, count)

    def load_words_if(self, condition, address):
        with self.when(condition):
            return [np.where(condition, x, np.uint32(0)) for x in self.load_words(address, 4)]

    def load_short(self, address):
        return self.fetch(address, np.uint16, 1)[:, 0].astype(np.uint32)

    def store_together(self, values, address):
        buffer, offset = address
        offset = offset if np.ndim(offset) else np.full(self.count, offset)
        data = np.stack(values, axis=1).view(np.uint8).reshape(self.count, -1)
        place = offset[:, None] + np.arange(data.shape[1])
        assert (offset % data.shape[1] == 0)[self.active].all()
        assert (place >= 0)[self.active].all()
        assert (place < len(buffer))[self.active].all(), "a thread writes beyond its buffer"
        buffer[place[self.active]] = data[self.active]

    def store(self, x, address, dtype=np.float32):
        self.store_together([x.astype(jnp.dtype(dtype))], address)

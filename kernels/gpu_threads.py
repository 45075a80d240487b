"""What a single thread does inside a Mosaic GPU kernel: 32-bit integers, pointers, and single instructions.

Arrays of Pallas belong to a warpgroup and have a layout. Reading a table at an address that each thread has of its own
has no place there, so the bodies of such kernels are written for one thread, with `plgpu.inline_mgpu`, in these terms.
Every function emits code at the current insertion point. A Python integer where a value is expected is a constant.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Int = Any  # an int or an i32 value

_DYNAMIC = -(2**31)  # marks an index of a getelementptr that is a value
_SHARED_CLUSTER = 7  # address space of shared memory of all blocks in a cluster


def i32(x: Int) -> ir.Value:
    """A 32-bit integer."""
    return utils.c(x, ir.IntegerType.get_signless(32)) if isinstance(x, int) else x


def add(*terms: Int) -> ir.Value:
    """Sum of integers."""
    return functools.reduce(arith.addi, map(i32, terms))


def sub(a: Int, b: Int) -> ir.Value:
    """Difference of integers."""
    return arith.subi(i32(a), i32(b))


def mul(a: Int, b: Int) -> ir.Value:
    """Product of integers."""
    return arith.muli(i32(a), i32(b))


def xor(a: Int, b: Int) -> ir.Value:
    """Bitwise exclusive or."""
    return arith.xori(i32(a), i32(b))


def bits_and(a: Int, b: Int) -> ir.Value:
    """Bitwise and."""
    return arith.andi(i32(a), i32(b))


def shift_left(a: Int, b: Int) -> ir.Value:
    """Left shift."""
    return arith.shli(i32(a), i32(b))


def shift_right(a: Int, b: Int) -> ir.Value:
    """Right shift with zeros."""
    return arith.shrui(i32(a), i32(b))


def least(a: Int, b: Int) -> ir.Value:
    """Minimum of unsigned integers."""
    return arith.minui(i32(a), i32(b))


def less(a: Int, b: Int) -> ir.Value:
    """Comparison of unsigned integers: a bit."""
    return arith.cmpi(arith.CmpIPredicate.ult, i32(a), i32(b))


def loop(count: Int, body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]], carry: Sequence[ir.Value] = ()):
    """Values after `carry = body(i, carry)` for i in range(count)."""
    op = scf.ForOp(i32(0), i32(count), i32(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(op.induction_variable, list(op.inner_iter_args))))
    return list(op.results)


def lane() -> ir.Value:
    """Index of the thread in its warp."""
    return bits_and(utils.thread_idx(), 31)


def pointer(ref: ir.Value) -> ir.Value:
    """Address of the first element of a ref."""
    return utils.memref_ptr(ref)


def at(address: ir.Value, *offsets: Int) -> ir.Value:
    """An address some bytes further; constants come last, because instructions hold one for free."""
    byte = ir.IntegerType.get_signless(8)
    for offset in offsets:
        dynamic, constant = ([], [offset]) if isinstance(offset, int) else ([offset], [_DYNAMIC])
        if dynamic and llvm.PointerType(address.type).address_space != _shared():
            dynamic = [arith.extui(ir.IntegerType.get_signless(64), offset)]
        address = llvm.getelementptr(address.type, address, dynamic, constant, byte, llvm.GEPNoWrapFlags.none)
    return address


def _shared() -> int:
    return 3


def load(address: ir.Value, dtype: Any, count: int = 1) -> list[ir.Value]:
    """Consecutive elements, aligned to all of them together: float32 values of floats."""
    element = utils.dtype_to_ir_type(dtype)
    size = count * jnp.dtype(dtype).itemsize
    if count == 1:
        return [_float32(llvm.load(element, address))]
    vector = _float32(llvm.load(ir.VectorType.get((count,), element), address, alignment=size))
    return [utils.vector.extract(vector, dynamic_position=[], static_position=[i]) for i in range(count)]


def _float32(x: ir.Value) -> ir.Value:
    kind = ir.F32Type.get()
    if isinstance(x.type, ir.VectorType):
        kind = ir.VectorType.get(ir.VectorType(x.type).shape, kind)
    return x if x.type == kind else arith.extf(kind, x)


def store(x: ir.Value, address: ir.Value, dtype: Any = jnp.float32) -> None:
    """Writes a float32 value as `dtype`."""
    kind = utils.dtype_to_ir_type(dtype)
    llvm.store(x if x.type == kind else arith.truncf(kind, x), address)


def stream_words(address: ir.Value) -> list[ir.Value]:
    """Four words of global memory that are read once: not kept in the first cache."""
    ptx = "ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];"
    word = ir.IntegerType.get_signless(32)
    return list(utils.inline_ptx(ptx, address, result_types=[word] * 4, has_side_effects=True))


def permute(low: ir.Value, high: ir.Value, selector: int) -> ir.Value:
    """Four bytes of the eight of two words; see `prmt` in the PTX manual."""
    word = ir.IntegerType.get_signless(32)
    return utils.inline_ptx(f"prmt.b32 $0, $1, $2, {selector:#x};", low, high, result_types=word)


def select(condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """`a` where the bit is set, else `b`."""
    return arith.select(condition, a, b)


def mma_tf32(a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]) -> list[ir.Value]:
    """A warp's product [16, 8] @ [8, 8] + [16, 8] on the matrix unit; operands keep 10 bits of their mantissas.

    With g, t = lane // 4, lane % 4, a thread holds a = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4],
    b = B[t, g], B[t + 4, g] and c = C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1].
    """
    number = ir.F32Type.get()
    # Registers of this instruction are words.
    word = ir.IntegerType.get_signless(32)
    operands = [arith.bitcast(word, x) for x in (*a, *b)]
    ptx = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return list(utils.inline_ptx(ptx, *operands, *c, result_types=[number] * 4))


def constant(x: float) -> ir.Value:
    """A float32 number."""
    return utils.c(x, ir.F32Type.get())


def of_block(address: ir.Value, rank: int) -> ir.Value:
    """The same place in the shared memory of another block of the cluster."""
    return utils.get_cluster_ptr(address, i32(rank), generic=False)

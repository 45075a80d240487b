"""What a single thread does inside a Mosaic GPU kernel: integers, numbers, pointers, and single instructions.

Arrays of Pallas belong to a warpgroup and have a layout. Reading a table at an address that each thread has of its own
has no place there, so the bodies of such kernels are written for one thread, with `plgpu.inline_mgpu`, in these terms
and no others: a test can put numpy arrays of all threads in their place. Every function emits code at the current
insertion point. A Python integer where an integer is expected is a constant.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf, vector

Value = Any  # of a thread
Int = Any  # a Value of 32 bits, or an int

_DYNAMIC = -(2**31)  # marks an index of a getelementptr that is a value
_GLOBAL, _SHARED = 1, 3  # address spaces


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _ptx(
    code: str, arguments: Sequence[Value] = (), results: Sequence[ir.Type] = (), *, pure: bool = False
) -> list[Value]:
    """Emits an instruction; $0, $1, ... are its results and then its arguments, of 32 bits or global addresses."""
    letters = [_letter(kind) for kind in results], [_letter(x.type) for x in arguments]
    constraints = ",".join([*(f"={x}" for x in letters[0]), *letters[1]])
    kind = ir.Type.parse("!llvm.void")
    if results:
        kind = results[0] if len(results) == 1 else llvm.StructType.get_literal(list(results))
    out: Any = llvm.inline_asm(kind, list(arguments), code, constraints, has_side_effects=not pure)
    return [out] if len(results) == 1 else [llvm.extractvalue(x, out, [i]) for i, x in enumerate(results)]


def _letter(kind: ir.Type) -> str:
    """Kind of register: addresses of shared memory have 32 bits."""
    if isinstance(kind, ir.F32Type):
        return "f"
    wide = isinstance(kind, llvm.PointerType) and kind.address_space in (0, _GLOBAL)
    return "l" if wide else "r"


def _i32(x: Int) -> Value:
    return utils.c(x, _word()) if isinstance(x, int) else x


def add(*terms: Int) -> Value:
    """Sum of integers."""
    return functools.reduce(arith.addi, map(_i32, terms))


def sub(a: Int, b: Int) -> Value:
    """Difference of integers."""
    return arith.subi(_i32(a), _i32(b))


def mul(a: Int, b: Int) -> Value:
    """Product of integers."""
    return arith.muli(_i32(a), _i32(b))


def div(a: Int, b: Int) -> Value:
    """Quotient of unsigned integers."""
    return arith.divui(_i32(a), _i32(b))


def rem(a: Int, b: Int) -> Value:
    """Remainder of unsigned integers."""
    return arith.remui(_i32(a), _i32(b))


def least(a: Int, b: Int) -> Value:
    """Minimum of unsigned integers."""
    return arith.minui(_i32(a), _i32(b))


def xor(a: Int, b: Int) -> Value:
    """Bitwise exclusive or."""
    return arith.xori(_i32(a), _i32(b))


def bits_and(a: Int, b: Int) -> Value:
    """Bitwise and."""
    return arith.andi(_i32(a), _i32(b))


def less(a: Int, b: Int) -> Value:
    """Comparison of unsigned integers: a condition."""
    return arith.cmpi(arith.CmpIPredicate.ult, _i32(a), _i32(b))


def both(a: Value, b: Value) -> Value:
    """Conjunction of conditions."""
    return arith.andi(a, b)


def permute(low: Int, high: Int, selector: int) -> Value:
    """Four of the eight bytes of two words, one per half byte of `selector`; 8 more stand for the byte's sign instead."""
    ptx = f"prmt.b32 $0, $1, $2, {selector:#x};"
    return _ptx(ptx, (_i32(low), _i32(high)), [_word()], pure=True)[0]


def number(x: float) -> Value:
    """A float32."""
    return utils.c(x, ir.F32Type.get())


def fadd(a: Value, b: Value) -> Value:
    """Sum of float32."""
    return arith.addf(a, b)


def fmul(a: Value, b: Value) -> Value:
    """Product of float32."""
    return arith.mulf(a, b)


def fma(a: Value, b: Value, c: Value) -> Value:
    """Product a * b plus c of float32, rounded once."""
    return _ptx("fma.rn.f32 $0, $1, $2, $3;", (a, b, c), [ir.F32Type.get()], pure=True)[0]


def rsqrt(x: Value) -> Value:
    """One over the square root of a float32, to 2 units in the last place."""
    return _ptx("rsqrt.approx.f32 $0, $1;", (x,), [ir.F32Type.get()], pure=True)[0]


def exp2(x: Value) -> Value:
    """2^x of a float32, to 2 units in the last place."""
    return _ptx("ex2.approx.f32 $0, $1;", (x,), [ir.F32Type.get()], pure=True)[0]


def reciprocal(x: Value) -> Value:
    """One over a float32, to a unit in the last place."""
    return _ptx("rcp.approx.f32 $0, $1;", (x,), [ir.F32Type.get()], pure=True)[0]


def select(condition: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    return arith.select(condition, a, b)


def split(x: Value) -> tuple[Value, Value]:
    """A float32 as one whose mantissa has 10 bits and the rest."""
    bits = arith.andi(arith.bitcast(_word(), x), _i32(-(1 << 13)))
    leading = arith.bitcast(ir.F32Type.get(), bits)
    return leading, arith.subf(x, leading)


def mma(a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
    """A warp's product [16, 8] @ [8, 8] + [16, 8] on the matrix unit; of `a` and `b` it sees 10 bits of mantissa.

    With g, t = lane // 4, lane % 4, a thread holds a = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4],
    b = B[t, g], B[t + 4, g] and c = C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1].
    """
    words = [arith.bitcast(_word(), x) for x in (*a, *b)]  # what registers of this instruction hold
    ptx = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return _ptx(ptx, (*words, *c), [ir.F32Type.get()] * 4, pure=True)


def thread_index() -> Value:
    """Index of the thread in its block."""
    return utils.thread_idx()


def warp_index() -> Value:
    """Index of the warp in its block, known to the compiler to be the same for all of the warp; all threads of the warp."""
    return utils.warp_idx(sync=True)


def when(condition: Value) -> AbstractContextManager[None]:
    """Code under a condition."""
    return utils.when(condition)


def loop(count: int, body: Callable[[Value, list[Value]], Sequence[Value]], carry: Sequence[Value]) -> list[Value]:
    """Values after `carry = body(i, carry)` for i in range(count)."""
    op = scf.ForOp(_i32(0), _i32(count), _i32(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(op.induction_variable, list(op.inner_iter_args))))
    return list(op.results)


def pointer(ref: ir.Value) -> Value:
    """Address of the first element of a ref."""
    return utils.memref_ptr(ref)


def at(address: Value, *offsets: Int) -> Value:
    """An address some bytes further. Constants are best last: instructions hold one for free."""
    byte = ir.IntegerType.get_signless(8)
    for offset in offsets:
        dynamic, constant = [], offset
        if not isinstance(offset, int):
            wide = llvm.PointerType(address.type).address_space != _SHARED
            dynamic = [arith.extui(ir.IntegerType.get_signless(64), offset) if wide else offset]
            constant = _DYNAMIC
        address = llvm.getelementptr(address.type, address, dynamic, [constant], byte, llvm.GEPNoWrapFlags.none)
    return address


def line(address: Value, number: Value, size: int) -> Value:
    """The address of a line of `size` bytes in global memory, which may be more than 2**32 bytes further."""
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extui(i64, number), utils.c(size, i64))
    byte = ir.IntegerType.get_signless(8)
    return llvm.getelementptr(address.type, address, [offset], [_DYNAMIC], byte, llvm.GEPNoWrapFlags.none)


def load(address: Value, dtype: Any, count: int = 1) -> list[Value]:
    """Consecutive floats, aligned to all of them together, as float32."""
    element = utils.dtype_to_ir_type(dtype)
    if count == 1:
        return [_float32(llvm.load(element, address))]
    kind = ir.VectorType.get((count,), element)
    values = _float32(llvm.load(kind, address, alignment=count * jnp.dtype(dtype).itemsize))
    return [vector.extract(values, dynamic_position=[], static_position=[i]) for i in range(count)]


def _float32(x: ir.Value) -> ir.Value:
    kind = ir.F32Type.get()
    if isinstance(x.type, ir.VectorType):
        kind = ir.VectorType.get(ir.VectorType(x.type).shape, kind)
    return x if x.type == kind else arith.extf(kind, x)


def store(x: Value, address: Value, dtype: Any = jnp.float32) -> None:
    """Writes a float32 as `dtype`."""
    kind = utils.dtype_to_ir_type(dtype)
    llvm.store(x if x.type == kind else arith.truncf(kind, x), address)


def store_vector(values: Sequence[Value], address: Value, dtype: Any) -> None:
    """Writes consecutive float32 as `dtype` to an address that is a multiple of all of them together."""
    kind, size = utils.dtype_to_ir_type(dtype), len(values) * jnp.dtype(dtype).itemsize
    x = vector.from_elements(ir.VectorType.get((len(values),), ir.F32Type.get()), list(values))
    x = x if kind == ir.F32Type.get() else arith.truncf(ir.VectorType.get((len(values),), kind), x)
    llvm.store(x, address, alignment=size)


def stream_words(address: Value) -> list[Value]:
    """Four words of global memory that are read once: not kept in the first cache."""
    ptx = "ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];"
    return _ptx(ptx, [address], [_word()] * 4)


def load_word(address: Value) -> Value:
    """A word of global memory that the kernel does not write."""
    return _ptx("ld.global.nc.u32 $0, [$1];", [address], [_word()])[0]


def store_four(values: Sequence[Value], address: Value) -> None:
    """Writes four words or float32 to an address that is a multiple of 16 bytes."""
    kind = ir.VectorType.get((4,), values[0].type)
    llvm.store(vector.from_elements(kind, list(values)), address, alignment=16)


def shuffle(x: Value, distance: int) -> Value:
    """The float32 of the thread of the warp whose index differs in the bits of `distance`; all threads of the warp."""
    return utils.shfl_bfly(x, distance)


def block_barrier() -> None:
    """Waits for all threads of the block."""
    gpu.barrier()


def cluster_barrier() -> None:
    """Waits for all threads of the cluster; orders what they did with barriers, but not other memory accesses."""
    _ptx("fence.mbarrier_init.release.cluster;")
    _ptx("barrier.cluster.arrive.relaxed.aligned;")
    _ptx("barrier.cluster.wait.acquire.aligned;")


def of_block(address: Value, rank: Int) -> Value:
    """The same place in the shared memory of another block of the cluster."""
    return utils.get_cluster_ptr(address, _i32(rank), generic=False)


def expect_bytes(barrier: Value, count: int) -> None:
    """Makes 8 bytes of shared memory a barrier that waits for as many bytes; one thread."""
    nvvm.mbarrier_init(barrier, _i32(1))
    nvvm.mbarrier_arrive_expect_tx(barrier, _i32(count))


def send(x: Value, address: Value, barrier: Value) -> None:
    """Writes a float32 to shared memory of a block of the cluster, which counts as 4 bytes on its barrier."""
    ptx = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [$0], $1, [$2];"
    _ptx(ptx, (address, arith.bitcast(_word(), x), barrier))


def wait_bytes(barrier: Value) -> None:
    """Waits until a barrier of this block has its bytes."""
    first, nanoseconds = 0, 10_000_000  # the phase, and how long to sleep before looking again
    nvvm.mbarrier_try_wait_parity(barrier, _i32(first), _i32(nanoseconds))

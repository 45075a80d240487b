"""What a thread of a GPU does with words of bytes and of pairs of float16 numbers, in addition to `gpu_threads`.

As there, every function emits code at the current insertion point, and a Python integer is a constant.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxquant.kernels import gpu_threads as t

Int = Any  # a value of 32 bits, or an int

_inline_ptx: Any = getattr(utils, "inline_ptx", None)  # JAX 0.11 and newer, as the kernels that use it


def word() -> ir.Type:
    """Type of a register."""
    return ir.IntegerType.get_signless(32)


def i32(x: Int) -> ir.Value:
    """A 32-bit integer."""
    return utils.c(x, word()) if isinstance(x, int) else x


def shift_left(a: Int, b: Int) -> ir.Value:
    """Left shift."""
    return arith.shli(i32(a), i32(b))


def shift_right(a: Int, b: Int) -> ir.Value:
    """Right shift with zeros."""
    return arith.shrui(i32(a), i32(b))


def shift_right_signed(a: Int, b: int) -> ir.Value:
    """Right shift of an integer with a sign."""
    return arith.shrsi(i32(a), i32(b)) if b else i32(a)


def signed(bits: int) -> int:
    """The constant with these 32 bits."""
    return bits - (bits >> 31 << 32)


def cut(x: ir.Value, mask: int, over: Int) -> ir.Value:
    """`(x & mask) | over` in one instruction."""
    return _inline_ptx(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", x, i32(over), result_types=word())


def mma(a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]) -> list[ir.Value]:
    """A warp's product [16, 16] @ [16, 8] + [16, 8] on the matrix unit: float16 in, float32 out.

    With g, t = lane // 4, lane % 4, a thread holds the pairs a = A[g, 2t:], A[g + 8, 2t:], A[g, 2t + 8:],
    A[g + 8, 2t + 8:], b = B[2t:, g], B[2t + 8:, g] and c = C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1].
    """
    ptx = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return list(_inline_ptx(ptx, *a, *b, *c, result_types=[ir.F32Type.get()] * 4))


def mma_bytes(a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]) -> list[ir.Value]:
    """A warp's product [16, 32] @ [32, 8] + [16, 8] on the matrix unit: bytes, without sign and with, and integers.

    With g, t = lane // 4, lane % 4, a thread holds fours of bytes a = A[g, 4t:], A[g + 8, 4t:], A[g, 4t + 16:],
    A[g + 8, 4t + 16:], b = B[4t:, g], B[4t + 16:, g] and c as in `mma`.
    """
    ptx = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return list(_inline_ptx(ptx, *a, *b, *c, result_types=[word()] * 4))


def stream(address: ir.Value, count: int) -> list[ir.Value]:
    """Two or four words of global memory that are read once: not kept in the first cache."""
    results = ",".join(f"${i}" for i in range(count))
    ptx = f"ld.global.nc.L1::no_allocate.v{count}.b32 {{{results}}}, [${count}];"
    return list(_inline_ptx(ptx, address, result_types=[word()] * count, has_side_effects=True))


def prefetch(address: ir.Value) -> None:
    """Fetches a line of global memory into the second cache."""
    _inline_ptx("prefetch.global.L2 [$0];", address, has_side_effects=True)


def shared_number(address: ir.Value) -> ir.Value:
    """The number of an address in shared memory, whose arrays begin at multiples of 1024."""
    return llvm.ptrtoint(word(), address)


def shared_address(number: ir.Value) -> ir.Value:
    """The address in shared memory with a number."""
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), number)


def load_raw(address: ir.Value, dtype: Any) -> ir.Value:
    """An element as it is."""
    return llvm.load(utils.dtype_to_ir_type(dtype), address)


def load_words(address: ir.Value, count: int = 1) -> list[ir.Value]:
    """Words aligned to all of them together."""
    if count == 1:
        return [llvm.load(word(), address)]
    return _elements(llvm.load(ir.VectorType.get((count,), word()), address, alignment=4 * count))


def load_words_if(condition: ir.Value, address: ir.Value) -> list[ir.Value]:
    """Four words of shared memory, or zeros."""
    number = arith.extui(word(), condition)
    place = arith.trunci(word(), llvm.ptrtoint(ir.IntegerType.get_signless(64), address))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    ptx = f"{{.reg .pred p; setp.ne.u32 p, $5, 0; {zeros} @p ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4];}}"
    return list(_inline_ptx(ptx, place, number, result_types=[word()] * 4, has_side_effects=True))


def load_short(address: ir.Value) -> ir.Value:
    """A word from 16 bits, with zeros above them."""
    return arith.extui(word(), llvm.load(ir.IntegerType.get_signless(16), address))


def store_together(values: Sequence[ir.Value], address: ir.Value) -> None:
    """Writes words or numbers side by side, aligned to all of them together."""
    kind = values[0].type
    together = vector.from_elements(ir.VectorType.get((len(values),), kind), list(values))
    llvm.store(together, address, alignment=len(values) * kind.width // 8)


def _elements(values: ir.Value) -> list[ir.Value]:
    count = ir.VectorType(values.type).shape[0]
    return [vector.extract(values, dynamic_position=[], static_position=[i]) for i in range(count)]


def store_byte(x: ir.Value, address: ir.Value) -> None:
    """Writes the lowest byte of a word."""
    llvm.store(arith.trunci(ir.IntegerType.get_signless(8), x), address)


def nearest(x: ir.Value) -> ir.Value:
    """The nearest integer with a sign to a float32 number."""
    return _inline_ptx("cvt.rni.s32.f32 $0, $1;", x, result_types=word())


def float_from(x: ir.Value) -> ir.Value:
    """The nearest float32 number to an integer with a sign."""
    return arith.sitofp(ir.F32Type.get(), x)


def float32(x: ir.Value) -> ir.Value:
    """A number as float32."""
    return x if x.type == ir.F32Type.get() else arith.extf(ir.F32Type.get(), x)


def float16(x: ir.Value) -> ir.Value:
    """A float32 number, rounded to float16."""
    return arith.truncf(ir.F16Type.get(), x)


def bits_of(x: ir.Value) -> ir.Value:
    """The bits of a float32 number."""
    return arith.bitcast(word(), x)


def float_of(x: ir.Value) -> ir.Value:
    """The float32 number with these bits."""
    return arith.bitcast(ir.F32Type.get(), x)


def minus(a: ir.Value, b: ir.Value) -> ir.Value:
    """Difference of float32 numbers."""
    return arith.subf(a, b)


def most(a: Int, b: Int) -> ir.Value:
    """Maximum of unsigned integers."""
    return arith.maxui(i32(a), i32(b))


def equal(a: Int, b: Int) -> ir.Value:
    """Comparison of integers: a bit."""
    return arith.cmpi(arith.CmpIPredicate.eq, i32(a), i32(b))


def most_of_warp(x: ir.Value) -> ir.Value:
    """The largest unsigned integer of the 32 threads of a warp."""
    ptx = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return _inline_ptx(ptx, x, result_types=word(), has_side_effects=True, convergent=True)


def of_neighbour(x: ir.Value) -> ir.Value:
    """The number of the thread whose index differs in the last bit."""
    return utils.shfl_bfly(x, 1)


def loop(count: Int, body: Any, carry: Any) -> Any:
    """`gpu_threads.loop` for a tree of values."""
    leaves, structure = jax.tree.flatten(carry)
    leaves = t.loop(count, lambda i, leaves: jax.tree.leaves(body(i, jax.tree.unflatten(structure, leaves))), leaves)
    return jax.tree.unflatten(structure, leaves)

"""Pairs of float16 numbers in the 32-bit registers of a GPU's thread, and the matrix unit's product of them.

As in `gpu_threads`, every function emits code at the current insertion point.
"""

from collections.abc import Sequence

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxquant.kernels import gpu_threads as t

THOUSAND = 1024.0  # the float16 number whose last 10 bits are an integer to be added


def word() -> ir.Type:
    """Type of a register."""
    return ir.IntegerType.get_signless(32)


def pair(value: float) -> int:
    """Bits of two equal numbers; the number must be a float16."""
    half = np.float16(value)
    if half != value:
        raise ValueError(f"expected a number of float16, got {value}")
    return int(np.int32(np.uint32(half.view(np.uint16)) * np.uint32(0x10001)))


def cut(x: ir.Value, mask: int, over: t.Int) -> ir.Value:
    """`(x & mask) | over` in one instruction."""
    return utils.inline_ptx(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", x, t.i32(over), result_types=word())


def add_pairs(a: ir.Value, b: t.Int) -> ir.Value:
    """Sums."""
    return utils.inline_ptx("add.rn.f16x2 $0, $1, $2;", a, t.i32(b), result_types=word())


def scale_pairs(a: ir.Value, factor: float, b: t.Int) -> ir.Value:
    """`a * factor + b`, rounded once."""
    if factor == 1:
        return add_pairs(a, b)
    return utils.inline_ptx("fma.rn.f16x2 $0, $1, $2, $3;", a, t.i32(pair(factor)), t.i32(b), result_types=word())


def mma(a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]) -> list[ir.Value]:
    """A warp's product [16, 16] @ [16, 8] + [16, 8] on the matrix unit: float16 in, float32 out.

    With g, t = lane // 4, lane % 4, a thread holds the pairs a = A[g, 2t:], A[g + 8, 2t:], A[g, 2t + 8:],
    A[g + 8, 2t + 8:], b = B[2t:, g], B[2t + 8:, g] and c = C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1].
    """
    ptx = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return list(utils.inline_ptx(ptx, *a, *b, *c, result_types=[ir.F32Type.get()] * 4))


def stream(address: ir.Value, count: int) -> list[ir.Value]:
    """Two or four words of global memory that are read once: not kept in the first cache."""
    results = ",".join(f"${i}" for i in range(count))
    ptx = f"ld.global.nc.L1::no_allocate.v{count}.b32 {{{results}}}, [${count}];"
    return list(utils.inline_ptx(ptx, address, result_types=[word()] * count, has_side_effects=True))


def load(address: ir.Value, kind: ir.Type, count: int = 1) -> ir.Value:
    """An element, or a vector aligned to all of itself, of any type."""
    if count == 1:
        return llvm.load(kind, address)
    bits = kind.width * count
    return llvm.load(ir.VectorType.get((count,), kind), address, alignment=bits // 8)


def load_words_if(condition: ir.Value, address: ir.Value) -> list[ir.Value]:
    """Four words of shared memory, or zeros."""
    number = arith.extui(word(), condition)
    place = arith.trunci(word(), llvm.ptrtoint(ir.IntegerType.get_signless(64), address))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    ptx = f"{{.reg .pred p; setp.ne.u32 p, $5, 0; {zeros} @p ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4];}}"
    return list(utils.inline_ptx(ptx, place, number, result_types=[word()] * 4, has_side_effects=True))


def elements(vector: ir.Value) -> list[ir.Value]:
    """What a vector holds."""
    count = ir.VectorType(vector.type).shape[0]
    return [utils.vector.extract(vector, dynamic_position=[], static_position=[i]) for i in range(count)]


def vector(values: Sequence[ir.Value]) -> ir.Value:
    """A vector of values."""
    return utils.vector.from_elements(ir.VectorType.get((len(values),), values[0].type), list(values))


def words_of(values: ir.Value) -> list[ir.Value]:
    """The registers that hold a vector."""
    kind = ir.VectorType(values.type)
    count = kind.shape[0] * kind.element_type.width // 32
    return elements(utils.vector.bitcast(ir.VectorType.get((count,), word()), values))


def largest_of_warp(x: ir.Value) -> ir.Value:
    """The largest unsigned integer of the 32 threads of a warp."""
    ptx = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return utils.inline_ptx(ptx, x, result_types=word(), has_side_effects=True, convergent=True)


def prefetch(address: ir.Value) -> None:
    """Fetches a line of global memory into the second cache."""
    utils.inline_ptx("prefetch.global.L2 [$0];", address, has_side_effects=True)


def store(x: ir.Value, address: ir.Value, alignment: int = 4) -> None:
    """Writes a value of any type."""
    llvm.store(x, address, alignment=alignment)


def float32(x: ir.Value) -> ir.Value:
    """A number as float32."""
    return x if x.type == ir.F32Type.get() else arith.extf(ir.F32Type.get(), x)

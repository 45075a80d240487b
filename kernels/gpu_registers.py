"""A small language for decoders on GPUs: 32-bit registers of a warpgroup's 128 threads, and fragments of the tensor cores.

Pallas has no gathers from shared memory by arbitrary threads, no packed 16-bit arithmetic and no byte permutation, so
decoders are written in these few operations and placed into a kernel with `inline_mgpu`. Being a language, it can be
evaluated by other means too: the tests run the decoders with numpy.

A fragment is what `wgmma` takes as its left operand from registers: 64 rows of a warpgroup's weights by some columns of
16 bits. Thread (warp w, r = lane // 4, c = lane % 4) has pairs of values in registers [block][k][h]: rows 16 w + r + 8 h
of a block of 64, columns 8 k + 2 c and 8 k + 2 c + 1. Which columns of the weight these stand for is free, as long as
the inputs follow: see `gpu_inputs`.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPGROUP = 128
FRAGMENT_ROWS = 64
# Type of a scalar argument of `inline_mgpu`.
SCALAR = plgpu.Layout.WG_SPLAT(())

Register = Any
# Registers [block][column // 8][h] of fragments.
Pairs = list[list[list[Register]]]
# The decorator changes the arguments of a function, which type checkers do not follow.
inline: Any = plgpu.inline_mgpu


def ptx(
    code: str, *arguments: Any, result_types: Any = (), predicate: Any = None, has_side_effects: bool = False
) -> Any:
    """Emits instructions; $0, $1, ... are their results and then their arguments.

    Args:
      code: in the assembly language PTX.
      arguments: values of 16 to 64 bits.
      result_types: a type, or a sequence of them.
      predicate: where it is not true, the only instruction does nothing; it then has no results.
      has_side_effects: keeps its place among others of the kind; where there is no result, it always does.

    Returns:
      The result, or a list of them.
    """
    single = isinstance(result_types, ir.Type)
    types = [result_types] if single else list(result_types)
    if predicate is not None:
        code, arguments = f"@${len(arguments)} {code}", (*arguments, predicate)
    letters = [f"={_letter(kind)}" for kind in types] + [_letter(x.type) for x in arguments]
    kind = ir.Type.parse("!llvm.void")
    if types:
        kind = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    effects = has_side_effects or not types
    out: Any = llvm.inline_asm(kind, list(arguments), code, ",".join(letters), has_side_effects=effects)
    if single:
        return out
    return [out] if len(types) == 1 else [llvm.extractvalue(kind, out, [i]) for i, kind in enumerate(types)]


def _letter(kind: Any) -> str:
    """Kind of register."""
    if isinstance(kind, ir.F32Type):
        return "f"
    width = ir.IntegerType(kind).width
    return {1: "b", 16: "h", 32: "r", 64: "l"}[width]


class Registers:
    """Operations on one 32-bit register per thread, as MLIR."""

    def constant(self, value: int) -> Register:
        """The same bits in all threads."""
        i32 = ir.IntegerType.get_signless(32)
        return arith.constant(i32, ir.IntegerAttr.get(i32, value - 2**32 if value >= 2**31 else value))

    def thread(self) -> Register:
        """Index within the warpgroup."""
        return self.mask(utils.thread_idx(), WARPGROUP - 1)

    def row(self, block: int, h: int) -> Register:
        """Row of the registers [block][.][h]."""
        warp, lane = self.shift(self.thread(), 5), self.mask(self.thread(), 31)
        return self.add(self.add(self.times(warp, 16), self.shift(lane, 2)), self.constant(64 * block + 8 * h))

    def add(self, a: Register, b: Register) -> Register:
        """A + b, modulo 2**32."""
        return arith.addi(a, b)

    def subtract(self, a: Register, b: Register) -> Register:
        """A - b, modulo 2**32."""
        return arith.subi(a, b)

    def times(self, a: Register, factor: int) -> Register:
        """A * factor, modulo 2**32."""
        return arith.muli(a, self.constant(factor))

    def divide(self, a: Register, divisor: int) -> Register:
        """The quotient of unsigned numbers, rounded down."""
        return arith.divui(a, self.constant(divisor))

    def shift(self, a: Register, right: int) -> Register:
        """A shifted to the right by so many bits, to the left if negative."""
        if right < 0:
            return arith.shli(a, self.constant(-right))
        return arith.shrui(a, self.constant(right)) if right else a

    def mask(self, a: Register, mask: int) -> Register:
        """A & mask."""
        return arith.andi(a, self.constant(mask))

    def either(self, a: Register, b: Register) -> Register:
        """A | b."""
        return arith.ori(a, b)

    def differ(self, a: Register, b: Register) -> Register:
        """A ^ b."""
        return arith.xori(a, b)

    def least(self, a: Register, most: int) -> Register:
        """The smaller of a and most, unsigned."""
        return arith.minui(a, self.constant(most))

    def packed(self, operation: str, a: Register, b: Register) -> Register:
        """Arithmetic on two values of 16 bits: the name is that of PTX."""
        return ptx(f"{operation} $0, $1, $2;", a, b, result_types=a.type)

    def permute(self, a: Register, b: Register, selector: Register) -> Register:
        """Bytes of a (0 to 3) and b (4 to 7) that the four lowest nibbles of the selector name; their top bits are 0."""
        return ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, result_types=a.type)

    def load(self, address: Register, words: int, offset: int, *, constant: bool = False) -> list[Register]:
        """Words of shared memory at address + offset bytes; half a word for words = 0.

        `constant` memory does not change while the kernel computes, so such loads may be moved.
        """
        i32 = ir.IntegerType.get_signless(32)
        options = {"result_types": (i32,) * max(1, words), "has_side_effects": not constant}
        if not words:
            half = f"{{.reg .u16 t; ld.shared.u16 t, [$1+{offset}]; cvt.u32.u16 $0, t;}}"
            return list(ptx(half, address, **options))
        names = ",".join(f"${i}" for i in range(words))
        names, width = (f"{{{names}}}", f".v{words}") if words > 1 else (names, "")
        return list(ptx(f"ld.shared{width}.b32 {names}, [${words}+{offset}];", address, **options))

    def load_byte(self, address: Register) -> Register:
        """A byte of shared memory."""
        code = "{.reg .u8 t; ld.shared.u8 t, [$1]; cvt.u32.u8 $0, t;}"
        return ptx(code, address, result_types=address.type, has_side_effects=True)

    def store(self, address: Register, values: list[Register]) -> None:
        """Stores four words to shared memory."""
        ptx("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", address, *values)

    def load_global(self, ref: Any, offset: Register, words: int) -> list[Register]:
        """Words of an array in device memory that the kernel does not write, at an offset in bytes."""
        i32 = ir.IntegerType.get_signless(32)
        names = ",".join(f"${i}" for i in range(words))
        names, width = (f"{{{names}}}", f".v{words}") if words > 1 else (names, "")
        where = pointer(ref, offset)
        return list(ptx(f"ld.global.nc{width}.b32 {names}, [${words}];", where, result_types=(i32,) * words))


def address(ref: Any) -> Register:
    """Where a reference to shared memory starts, as a register."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def pointer(ref: Any, offset: Register) -> Any:
    """A 64-bit address in device memory: a reference's start and an offset of up to 2**32 bytes."""
    i64 = ir.IntegerType.get_signless(64)
    return plus(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset))


def plus(a: Any, b: Any) -> Any:
    """Sum of addresses."""
    return llvm.add(a, b, overflow_flags=llvm.IntegerOverflowFlags.none)


def fragment_type(blocks: int, columns: int, dtype: Any) -> Any:
    """Return type of `inline_mgpu` for an array [64 * blocks, columns] in fragments."""
    return plgpu.ShapeDtypeStruct((FRAGMENT_ROWS * blocks, columns), dtype, layout=plgpu.Layout.WGMMA)


def sums_type(shape: tuple[int, int]) -> Any:
    """Return type of `inline_mgpu` for float32 accumulators."""
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)


def fragment(pairs: Pairs, dtype: jax.typing.DTypeLike) -> mgpu.FragmentedArray:
    """Registers as an array [64 * blocks, columns] in fragments."""
    layout, kind = fragmented_array.WGMMA_LAYOUT, ir.VectorType.get((2,), utils.dtype_to_ir_type(dtype))
    flat = np.empty(len(pairs) * len(pairs[0]) * 2, dtype=object)
    flat[:] = [utils.bitcast(x, kind) for block in pairs for column in block for x in column]
    shape = layout.registers_shape((FRAGMENT_ROWS * len(pairs), 8 * len(pairs[0])))
    return mgpu.FragmentedArray(_registers=flat.reshape(shape), _layout=layout, _is_signed=None)


def keep(array: mgpu.FragmentedArray) -> None:
    """Says that registers are in use until here: those of a product that is awaited just before.

    A product reads its fragment while the thread goes on, and the assembler would give the registers away.
    """
    i32 = ir.IntegerType.get_signless(32)
    ptx("// in use", *(utils.bitcast(x, i32) for x in array.registers.flat))


def scalar(array: mgpu.FragmentedArray) -> Register:
    """The register of a scalar argument of `inline_mgpu`."""
    return array.registers.item()

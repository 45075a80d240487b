"""A small language for decoders on GPUs: 32-bit registers of a warpgroup's 128 threads, and fragments of the tensor cores.

Pallas has no gathers from shared memory by arbitrary threads, no packed 16-bit arithmetic and no byte permutation, so
decoders are written in these few operations and placed into a kernel with `inline_mgpu`. Being a language, it can be
evaluated by other means too: the tests run the decoders with numpy.

A fragment is what `wgmma` takes as its left operand from registers: 64 rows of a warpgroup's weights by some columns of
16 bits. Thread (warp w, r = lane // 4, c = lane % 4) has pairs of values in registers [block][k][h]: rows 16 w + r + 8 h
of a block of 64, columns 8 k + 2 c and 8 k + 2 c + 1. Which columns of the weight these stand for is free, as long as
the inputs follow: see `gpu_decode.permute_columns`.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

WARPGROUP = 128
FRAGMENT_ROWS = 64
_LOADS = 8  # of four numbers, that a thread has in flight
# Type of a scalar argument of `inline_mgpu`.
SCALAR = plgpu.Layout.WG_SPLAT(())

Register = Any
# Registers [block][column // 8][h] of fragments.
Pairs = list[list[list[Register]]]


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

    def times(self, a: Register, factor: int) -> Register:
        """A * factor, modulo 2**32."""
        return arith.muli(a, self.constant(factor))

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
        return utils.inline_ptx(f"{operation} $0, $1, $2;", a, b, result_types=a.type)

    def permute(self, a: Register, b: Register, selector: Register) -> Register:
        """Bytes of a (0 to 3) and b (4 to 7) that the four lowest nibbles of the selector name; their top bits are 0."""
        return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, result_types=a.type)

    def load(self, address: Register, words: int, offset: int, *, constant: bool = False) -> list[Register]:
        """Words of shared memory at address + offset bytes; half a word for words = 0.

        `constant` memory does not change while the kernel computes, so such loads may be moved.
        """
        i32 = ir.IntegerType.get_signless(32)
        options = {"result_types": (i32,) * max(1, words), "has_side_effects": not constant}
        if not words:
            half = f"{{.reg .u16 t; ld.shared.u16 t, [$1+{offset}]; cvt.u32.u16 $0, t;}}"
            return list(utils.inline_ptx(half, address, **options))
        names = ",".join(f"${i}" for i in range(words))
        names, width = (f"{{{names}}}", f".v{words}") if words > 1 else (names, "")
        return list(utils.inline_ptx(f"ld.shared{width}.b32 {names}, [${words}+{offset}];", address, **options))

    def load_byte(self, address: Register) -> Register:
        """A byte of shared memory."""
        ptx = "{.reg .u8 t; ld.shared.u8 t, [$1]; cvt.u32.u8 $0, t;}"
        return utils.inline_ptx(ptx, address, result_types=address.type, has_side_effects=True)

    def store(self, address: Register, values: list[Register]) -> None:
        """Stores four words to shared memory."""
        utils.inline_ptx("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", address, *values)

    def load_global(self, ref: Any, offset: Register, words: int) -> list[Register]:
        """Words of an array in device memory that the kernel does not write, at an offset in bytes."""
        i32 = ir.IntegerType.get_signless(32)
        names = ",".join(f"${i}" for i in range(words))
        names, width = (f"{{{names}}}", f".v{words}") if words > 1 else (names, "")
        where = pointer(ref, offset)
        return list(
            utils.inline_ptx(f"ld.global.nc{width}.b32 {names}, [${words}];", where, result_types=(i32,) * words)
        )


def address(ref: Any) -> Register:
    """Where a reference to shared memory starts, as a register."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def pointer(ref: Any, offset: Register) -> Any:
    """A 64-bit address in device memory: a reference's start and an offset of up to 2**32 bytes."""
    i64 = ir.IntegerType.get_signless(64)
    return _plus(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset))


def _plus(a: Any, b: Any) -> Any:
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
    utils.inline_ptx("// in use", *(utils.bitcast(x, i32) for x in array.registers.flat))


def scalar(array: mgpu.FragmentedArray) -> Register:
    """The register of a scalar argument of `inline_mgpu`."""
    return array.registers.item()


def accumulators(array: mgpu.FragmentedArray) -> dict[tuple[int, int, int], list[Any]]:
    """Values of float32 [64 * blocks, tokens] in fragments: {(block, tokens // 8, h): [two tokens]}."""
    blocks, tokens = array.shape[0] // FRAGMENT_ROWS, array.shape[1] // 8
    registers, values = array.registers.reshape(blocks, tokens, 2, -1), {}
    for place in np.ndindex(blocks, tokens, 2):
        parts = [(x, i) for x in registers[place] for i in range(ir.VectorType(x.type).shape[0])]
        values[place] = [vector.extract(x, dynamic_position=[], static_position=[i]) for x, i in parts]
    return values


def _float(register: Register, dtype: jax.typing.DTypeLike) -> Any:
    """The float32 value of the number in a register's low bits."""
    f32, i32 = ir.F32Type.get(), register.type
    if dtype == jnp.float32:
        return utils.bitcast(register, f32)
    if dtype == jnp.bfloat16:
        return utils.bitcast(arith.shli(register, utils.c(16, i32)), f32)
    halves = utils.bitcast(register, ir.VectorType.get((2,), ir.F16Type.get()))
    return arith.extf(f32, vector.extract(halves, dynamic_position=[], static_position=[0]))


def add_scaled(
    sums: mgpu.FragmentedArray, part: mgpu.FragmentedArray, start: Register, dtype: jax.typing.DTypeLike
) -> mgpu.FragmentedArray:
    """Sums + scale * part, float32 [64 * blocks, tokens] in fragments.

    Args:
      sums: what is added to.
      part: what is multiplied.
      start: address in shared memory of a scale for each of the rows.
      dtype: of the scales.
    """
    r, blocks, size = Registers(), sums.shape[0] // FRAGMENT_ROWS, jnp.dtype(dtype).itemsize
    scales = {}
    for b, h in np.ndindex(blocks, 2):
        place = r.add(start, r.times(r.row(int(b), int(h)), size))
        scales[b, h] = _float(r.load(place, size // 4, 0)[0], dtype)
    mine, theirs = (x.registers.reshape(blocks, sums.shape[1] // 8, 2, -1) for x in (sums, part))
    result = np.empty_like(mine)
    for place, a in np.ndenumerate(mine):
        scale, b, values = scales[place[0], place[2]], theirs[place], []
        for i in range(ir.VectorType(a.type).shape[0]):
            pair = (vector.extract(x, dynamic_position=[], static_position=[i]) for x in (b, a))
            values.append(utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", scale, *pair, result_types=scale.type))
        result[place] = vector.from_elements(a.type, values)
    registers = result.reshape(sums.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)


def store_part(array: mgpu.FragmentedArray, ref: Any, place: Register) -> None:
    """Writes float32 accumulators to device memory [places, values / 4, 128, 4], register by register."""
    r, values = Registers(), _flat(array)
    where = _part_pointer(r, ref, place, len(values))
    for first in range(0, len(values), 4):
        ptx = f"st.global.v4.f32 [$0+{first * 4 * WARPGROUP}], {{$1,$2,$3,$4}};"
        utils.inline_ptx(ptx, where, *values[first : first + 4])


def add_parts(
    array: mgpu.FragmentedArray, ref: Any, place: Register, stride: int, count: Register, most: int
) -> mgpu.FragmentedArray:
    """Adds what `store_part` wrote at place + i * stride for i < count <= most, in this order."""
    r, values, f32 = Registers(), _flat(array), ir.F32Type.get()
    there = [arith.extui(count.type, arith.cmpi(arith.CmpIPredicate.ult, r.constant(i), count)) for i in range(most)]
    pointers = [_part_pointer(r, ref, r.add(place, r.constant(i * stride)), len(values)) for i in range(most)]
    ptx = "{.reg .pred p; setp.ne.u32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000;"
    ptx += "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; @p ld.global.v4.f32 {$0,$1,$2,$3}, [$4+OFFSET];}"
    loads = [(first, i) for first in range(0, len(values), 4) for i in range(most)]
    for begin in range(0, len(loads), _LOADS):
        some, got = loads[begin : begin + _LOADS], []
        for first, i in some:
            load = ptx.replace("OFFSET", str(first * 4 * WARPGROUP))
            got.append(utils.inline_ptx(load, pointers[i], there[i], result_types=(f32,) * 4, has_side_effects=True))
        for (first, _), part in zip(some, got, strict=True):
            values[first : first + 4] = [arith.addf(a, b) for a, b in zip(values[first : first + 4], part, strict=True)]
    registers, rest = np.empty_like(array.registers), iter(values)
    for index, x in np.ndenumerate(array.registers):
        registers[index] = vector.from_elements(x.type, [next(rest) for _ in range(ir.VectorType(x.type).shape[0])])
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def _flat(array: mgpu.FragmentedArray) -> list[Any]:
    parts = [(x, i) for x in array.registers.flat for i in range(ir.VectorType(x.type).shape[0])]
    return [vector.extract(x, dynamic_position=[], static_position=[i]) for x, i in parts]


def _part_pointer(r: Registers, ref: Any, place: Register, values: int) -> Any:
    return pointer(ref, r.add(r.times(place, 4 * values * WARPGROUP), r.times(r.thread(), 16)))


def signal(ref: Any) -> None:
    """Counts a semaphore up, after all that the warpgroup has written."""
    utils.warpgroup_barrier()
    utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")


def wait(ref: Any, count: Register) -> None:
    """Waits until a semaphore has been counted up so often; the warpgroup then sees what was written before."""
    utils.SemaphoreRef(utils.memref_ptr(ref)).wait(count, decrement=False, memory_scope="gpu")


def store_rows(
    array: mgpu.FragmentedArray,
    ref: Any,
    token: Register,
    row: Register,
    token_factor: Any | None,
    row_factor: Any | None,
    *,
    tokens: int,
    rows: int,
    dtype: jax.typing.DTypeLike,
) -> None:
    """Writes float32 accumulators [64 * blocks, tokens at once] to device memory [tokens, rows].

    Args:
      array: accumulators.
      ref: [tokens, rows].
      token: of the array's first column.
      row: of the array's first row.
      token_factor: float32 [tokens] that tokens are multiplied by, or None.
      row_factor: float32 [rows] that rows are multiplied by, or None.
      tokens: what is beyond is not written.
      rows: what is beyond is not written.
      dtype: of `ref`: float32, float16 or bfloat16.
    """
    i16, i64, f32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(64), ir.F32Type.get()
    r, values, below = Registers(), accumulators(array), arith.CmpIPredicate.slt
    start, size = llvm.ptrtoint(i64, utils.memref_ptr(ref)), jnp.dtype(dtype).itemsize
    places = [(int(b), int(h)) for b, h in np.ndindex(array.shape[0] // FRAGMENT_ROWS, 2)]
    lines = {place: r.add(row, r.row(*place)) for place in places}
    inside_rows = {place: arith.cmpi(below, line, r.constant(rows)) for place, line in lines.items()}

    def factor(ref, index, count):
        return utils.bitcast(r.load_global(ref, r.times(r.least(index, count - 1), 4), 1)[0], f32)

    if row_factor is not None:
        row_factors = {place: factor(row_factor, line, rows) for place, line in lines.items()}
    token = r.add(token, r.times(r.mask(r.thread(), 3), 2))
    for eight, e in np.ndindex(array.shape[1] // 8, 2):
        t = r.add(token, r.constant(8 * int(eight) + int(e)))
        inside_tokens = arith.cmpi(below, t, r.constant(tokens))
        line = _plus(start, arith.muli(arith.extui(i64, t), utils.c(size * rows, i64)))
        token_scale = None if token_factor is None else factor(token_factor, t, tokens)
        for b, h in places:
            value = values[b, eight, h][e]
            value = value if token_scale is None else arith.mulf(value, token_scale)
            value = value if row_factor is None else arith.mulf(value, row_factors[b, h])
            if size == 2:
                value = utils.bitcast(arith.truncf(utils.dtype_to_ir_type(dtype), value), i16)
            where = _plus(line, arith.extui(i64, r.times(lines[b, h], size)))
            inside = arith.andi(inside_rows[b, h], inside_tokens)
            utils.inline_ptx(f"st.global.b{8 * size} [$0], $1;", where, value, predicate=inside)

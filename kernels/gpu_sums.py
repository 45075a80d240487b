"""Sums of products in the tensor cores' registers: scaling, adding up what several blocks have, and writing.

Sums are float32 arrays [64 * blocks, tokens] in fragments: thread (warp w, r = lane // 4, c = lane % 4) has those of
rows 16 w + r + 8 h of a block of 64 and tokens 8 t + 2 c and 8 t + 2 c + 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxquant.kernels import gpu_registers as gr

_LOADS = 8  # of four numbers, that a thread has in flight


def _values(array: mgpu.FragmentedArray) -> dict[tuple[int, int, int], list[Any]]:
    """Values of float32 [64 * blocks, tokens] in fragments: {(block, tokens // 8, h): [two tokens]}."""
    blocks, tokens = array.shape[0] // gr.FRAGMENT_ROWS, array.shape[1] // 8
    registers, values = array.registers.reshape(blocks, tokens, 2, -1), {}
    for place in np.ndindex(blocks, tokens, 2):
        parts = [(x, i) for x in registers[place] for i in range(ir.VectorType(x.type).shape[0])]
        values[place] = [vector.extract(x, dynamic_position=[], static_position=[i]) for x, i in parts]
    return values


def _float(register: gr.Register, dtype: jax.typing.DTypeLike) -> Any:
    """The float32 value of the number in a register's low bits."""
    f32, i32 = ir.F32Type.get(), register.type
    if dtype == jnp.float32:
        return utils.bitcast(register, f32)
    if dtype == jnp.bfloat16:
        return utils.bitcast(arith.shli(register, utils.c(16, i32)), f32)
    halves = utils.bitcast(register, ir.VectorType.get((2,), ir.F16Type.get()))
    return arith.extf(f32, vector.extract(halves, dynamic_position=[], static_position=[0]))


def add_scaled(
    sums: mgpu.FragmentedArray, part: mgpu.FragmentedArray, start: gr.Register, dtype: jax.typing.DTypeLike
) -> mgpu.FragmentedArray:
    """Sums + scale * part, float32 [64 * blocks, tokens] in fragments.

    Args:
      sums: what is added to.
      part: what is multiplied.
      start: address in shared memory of a scale for each of the rows.
      dtype: of the scales.
    """
    r, blocks, size = gr.Registers(), sums.shape[0] // gr.FRAGMENT_ROWS, jnp.dtype(dtype).itemsize
    scales = {}
    for b, h in np.ndindex(blocks, 2):
        place = r.add(start, r.times(r.row(int(b), int(h)), size))
        scales[b, h] = _float(r.load(place, size // 4, 0)[0], dtype)
    mine, theirs = (x.registers.reshape(blocks, sums.shape[1] // 8, 2, -1) for x in (sums, part))
    result = np.empty_like(mine)
    for place, a in np.ndenumerate(mine):
        scale, values = scales[place[0], place[2]], []
        b: Any = theirs[place]
        for i in range(ir.VectorType(a.type).shape[0]):
            pair: Any = (vector.extract(x, dynamic_position=[], static_position=[i]) for x in (b, a))
            values.append(gr.ptx("fma.rn.f32 $0, $1, $2, $3;", scale, *pair, result_types=scale.type))
        result[place] = vector.from_elements(a.type, values)
    registers = result.reshape(sums.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)


def store_part(array: mgpu.FragmentedArray, ref: Any, place: gr.Register) -> None:
    """Writes float32 accumulators to device memory [places, values / 4, 128, 4], register by register."""
    r, values = gr.Registers(), _flat(array)
    where = _part_pointer(r, ref, place, len(values))
    for first in range(0, len(values), 4):
        code = f"st.global.v4.f32 [$0+{first * 4 * gr.WARPGROUP}], {{$1,$2,$3,$4}};"
        gr.ptx(code, where, *values[first : first + 4])


def add_parts(
    array: mgpu.FragmentedArray, ref: Any, place: gr.Register, stride: int, count: gr.Register, most: int
) -> mgpu.FragmentedArray:
    """Adds what `store_part` wrote at place + i * stride for i < count <= most, in this order."""
    r, values, f32 = gr.Registers(), _flat(array), ir.F32Type.get()
    there = [arith.extui(count.type, arith.cmpi(arith.CmpIPredicate.ult, r.constant(i), count)) for i in range(most)]
    pointers = [_part_pointer(r, ref, r.add(place, r.constant(i * stride)), len(values)) for i in range(most)]
    code = "{.reg .pred p; setp.ne.u32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000;"
    code += "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; @p ld.global.v4.f32 {$0,$1,$2,$3}, [$4+OFFSET];}"
    loads = [(first, i) for first in range(0, len(values), 4) for i in range(most)]
    for begin in range(0, len(loads), _LOADS):
        some, got = loads[begin : begin + _LOADS], []
        for first, i in some:
            load = code.replace("OFFSET", str(first * 4 * gr.WARPGROUP))
            got.append(gr.ptx(load, pointers[i], there[i], result_types=(f32,) * 4, has_side_effects=True))
        for (first, _), part in zip(some, got, strict=True):
            values[first : first + 4] = [arith.addf(a, b) for a, b in zip(values[first : first + 4], part, strict=True)]
    registers, rest = np.empty_like(array.registers), iter(values)
    for index, x in np.ndenumerate(array.registers):
        registers[index] = vector.from_elements(x.type, [next(rest) for _ in range(ir.VectorType(x.type).shape[0])])
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def _flat(array: mgpu.FragmentedArray) -> list[Any]:
    parts = [(x, i) for x in array.registers.flat for i in range(ir.VectorType(x.type).shape[0])]
    return [vector.extract(x, dynamic_position=[], static_position=[i]) for x, i in parts]


def _part_pointer(r: gr.Registers, ref: Any, place: gr.Register, values: int) -> Any:
    return gr.pointer(ref, r.add(r.times(place, 4 * values * gr.WARPGROUP), r.times(r.thread(), 16)))


def signal(ref: Any) -> None:
    """Counts a semaphore up, after all that the warpgroup has written."""
    utils.warpgroup_barrier()
    utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")


def wait(ref: Any, count: gr.Register) -> None:
    """Waits until a semaphore has been counted up so often; the warpgroup then sees what was written before."""
    utils.SemaphoreRef(utils.memref_ptr(ref)).wait(count, decrement=False, memory_scope="gpu")


def store_rows(
    array: mgpu.FragmentedArray,
    ref: Any,
    token: gr.Register,
    row: gr.Register,
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
      token_factor: float [tokens] that tokens are multiplied by, or None.
      row_factor: float [rows] that rows are multiplied by, or None.
      tokens: what is beyond is not written.
      rows: what is beyond is not written.
      dtype: of `ref`: float32, float16 or bfloat16.
    """
    i16, i64, f32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(64), ir.F32Type.get()
    r, values, below = gr.Registers(), _values(array), arith.CmpIPredicate.slt
    start, size = llvm.ptrtoint(i64, utils.memref_ptr(ref)), jnp.dtype(dtype).itemsize
    places = [(int(b), int(h)) for b, h in np.ndindex(array.shape[0] // gr.FRAGMENT_ROWS, 2)]
    lines = {place: r.add(row, r.row(*place)) for place in places}
    inside_rows = {place: arith.cmpi(below, line, r.constant(rows)) for place, line in lines.items()}

    def factor(ref, index, count):
        kind = ir.MemRefType(ref.type).element_type
        place = r.times(r.least(index, count - 1), utils.bytewidth(kind))
        where = llvm.inttoptr(llvm.PointerType.get(), gr.pointer(ref, place))
        value = llvm.load(kind, where)
        return value if kind == f32 else arith.extf(f32, value)

    if row_factor is not None:
        row_factors = {place: factor(row_factor, line, rows) for place, line in lines.items()}
    token = r.add(token, r.times(r.mask(r.thread(), 3), 2))
    for eight, e in np.ndindex(array.shape[1] // 8, 2):
        t = r.add(token, r.constant(8 * int(eight) + int(e)))
        inside_tokens = arith.cmpi(below, t, r.constant(tokens))
        line = gr.plus(start, arith.muli(arith.extui(i64, t), utils.c(size * rows, i64)))
        token_scale = None if token_factor is None else factor(token_factor, t, tokens)
        for b, h in places:
            value = values[b, eight, h][e]
            value = value if token_scale is None else arith.mulf(value, token_scale)
            value = value if row_factor is None else arith.mulf(value, row_factors[b, h])
            if size == 2:
                value = utils.bitcast(arith.truncf(utils.dtype_to_ir_type(dtype), value), i16)
            where = gr.plus(line, arith.extui(i64, r.times(lines[b, h], size)))
            inside = arith.andi(inside_rows[b, h], inside_tokens)
            gr.ptx(f"st.global.b{8 * size} [$0], $1;", where, value, predicate=inside)

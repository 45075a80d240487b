"""Additive codes on a TPU, by Pallas Mosaic: partial products for few tokens, decoding for more.

A TPU looks up bytes fastest: in tables of 128 entries, one per sublane, 4096 at a time. Both kernels live off that.

`lookup_matmul` sums partial products (see `layout`) that are rounded to two bytes with one step per token: the bytes
are looked up and summed apart, as integers, so all rounding is that of the table. Its work grows with the tokens.

`decode_matmul` looks up the two bytes of every bfloat16 weight and leaves the product to the matrix unit. Codebooks are
not added up: each has columns of its own, against the same inputs. The work is nearly that of one token for all.

experiments/tpu_static_cost.py says what they cost by the compiler's schedule; they have not been run on a TPU yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.kernels import tpu_common as common
from jaxquant.kernels.codebook_matmul import layout

LANES, SLOTS = 128, 32  # a vector of bytes
# Slots and outputs of one grid step: tables and codes fit in fast memory twice, and sums of bytes in 16 bits.
_SLOTS_AT_ONCE, _OUTPUTS_AT_ONCE = 1024, 4096
# Code vectors whose lookups alternate: 11.3 instead of 12.0 us by the static schedule of v5e, 4096 x 4096.
_ALTERNATE = 2
_EVEN = np.int32(0x00FF00FF)
_HALVES = slice(0, LANES), slice(LANES, 2 * LANES)


def _index_and_mask(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of four codes in each word, int32 [8, 128]: the low 7 bits as uint8 [32, 128], and bytes of ones for a top bit."""
    top = lax.shift_right_logical(codes, 7) & np.int32(0x01010101)
    return pltpu.bitcast(codes & np.int32(0x7F7F7F7F), jnp.uint8), (top << 8) - top


def _look_up(tables: list[tuple[jax.Array, jax.Array]], codes: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """Looks up codes in tables of 256 bytes, given as halves of uint8 [32, 128]: int32 words of four bytes each."""
    found = [
        [common.gather(table[half], index, axis=1) for table, (index, _) in zip(tables, codes, strict=True)]
        for half in range(2)
    ]
    words = [[pltpu.bitcast(x, jnp.int32) for x in half] for half in found]
    return [low ^ ((low ^ high) & mask) for low, high, (_, mask) in zip(*words, codes, strict=True)]


def _lookup_kernel(slots_ref, table_ref, sums_ref, partial_ref, *, planes: int):
    """One stretch of slots and outputs: slots_ref uint8 [S, out], table_ref uint8 [P, S, 256]."""
    slots, out = slots_ref.shape

    @pl.when(pl.program_id(1) == 0)
    def _():
        partial_ref[...] = jnp.zeros_like(partial_ref)

    def column(j, _):
        lanes = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
        sums: list[Any] = [None] * (2 * planes)
        for first in range(0, slots, SLOTS * _ALTERNATE):
            stretch = [slice(s, s + SLOTS) for s in range(first, min(first + SLOTS * _ALTERNATE, slots), SLOTS)]
            codes = [_index_and_mask(pltpu.bitcast(slots_ref[rows, lanes], jnp.int32)) for rows in stretch]
            for p in range(planes):
                tables = [(table_ref[p, rows, _HALVES[0]], table_ref[p, rows, _HALVES[1]]) for rows in stretch]
                for found in _look_up(tables, codes):
                    pairs = found & _EVEN, lax.shift_right_logical(found, 8) & _EVEN
                    for k, pair in enumerate(pairs, 2 * p):
                        sums[k] = pair if sums[k] is None else sums[k] + pair
        for k, pair in enumerate(sums):
            partial_ref[k // 2, :, lanes] += (pair & 0xFFFF) + lax.shift_right_logical(pair, 16)
        return 0

    columns = out // LANES
    lax.fori_loop(0, columns, column, 0, unroll=1 if columns % 2 else 2)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        sums_ref[...] = jnp.sum(partial_ref[...], axis=1)


def lookup_sums(slots: jax.Array, planes: jax.Array) -> jax.Array:
    """Sums planes[p, s, slots[s, o]] over s.

    Args:
      slots: uint8 [S, out].
      planes: uint8 [P, S or more, 256]; what is more meets codes that are arbitrary.

    Returns:
      int32 [P, out].
    """
    out, (p, count, _) = slots.shape[1], planes.shape
    step, tile = slot_step(count, p), min(_OUTPUTS_AT_ONCE, _up(out, LANES))
    return pl.pallas_call(
        functools.partial(_lookup_kernel, planes=p),
        out_shape=jax.ShapeDtypeStruct((p, out), jnp.int32),
        grid=(pl.cdiv(out, tile), count // step),
        in_specs=[
            pl.BlockSpec((step, tile), lambda o, s: (s, o)),
            pl.BlockSpec((p, step, 256), lambda o, s: (0, s, 0)),
        ],
        out_specs=pl.BlockSpec((p, tile), lambda o, s: (0, o)),
        scratch_shapes=[pltpu.VMEM((p, 8, tile), jnp.int32)],
        interpret=common.interpret(),
    )(slots, planes)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def slot_step(slots: int, planes: int) -> int:
    """Slots of a grid step."""
    return min(_SLOTS_AT_ONCE if planes <= 4 else _SLOTS_AT_ONCE // 2, _up(slots, SLOTS))


def byte_planes(table: jax.Array, num_bytes: int) -> tuple[jax.Array, jax.Array]:
    """Rounds a table to unsigned bytes with one step per token.

    Args:
      table: float32 [S, tokens, 256].
      num_bytes: 1 or 2.

    Returns:
      (uint8 [num_bytes * tokens, S, 256], low bytes first; step float32 [tokens]). A value is
      step * (low + 256 * high - 2**15), or step * (low - 2**7) with one byte.
    """
    middle = 2 ** (8 * num_bytes - 1)
    largest = jnp.max(jnp.abs(table), axis=(0, 2))
    step = jnp.where(largest > 0, largest, 1) / (middle - 1)
    whole = jnp.round(table / step[None, :, None]).astype(jnp.int32) + np.int32(middle)
    planes = [(whole >> np.int32(8 * b)) & np.int32(255) for b in range(num_bytes)]
    return jnp.concatenate([jnp.swapaxes(x, 0, 1) for x in planes]).astype(jnp.uint8), step


def lookup_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    out: int,
    num_bytes: int = 2,
) -> jax.Array:
    """Returns x @ W.T by partial products, float32 [tokens, out].

    Args:
      x: float [tokens, in]; the time grows with the tokens.
      slots: uint8 [in / d * M, out or more], see `layout`.
      codebooks: float [C * M, 256 * d].
      scale: float [out or 1, 1] or [1, in / d], or None.
      blocks: (1, C).
      dimension: d.
      out: outputs without padding.
      num_bytes: of a partial product. Two have an error of about 5e-5 of the result, one about 1e-2, which a model may not
        bear: experiments/table_bytes.py measures what it does to one.
    """
    row_scale, column_scale = layout.split_scale(scale)
    table = layout.partial_products(x, codebooks, column_scale, blocks=blocks, dimension=dimension)[0]
    table = common.pad_to(table, 0, slot_step(len(table), num_bytes * len(x)))
    planes, step = byte_planes(table, num_bytes)
    sums = lookup_sums(slots, planes).astype(jnp.float32).reshape(num_bytes, len(x), -1)
    y = sums[-1] - jnp.float32(128 * len(table))
    if num_bytes == 2:
        y = 256 * y + sums[0]
    y = (y * step[:, None])[:, :out]
    return y if row_scale is None else y * row_scale.astype(jnp.float32)[None, :]


def _decode_kernel(x_ref, slots_ref, table_ref, y_ref):
    """One vector of outputs: x_ref [S / 16, rows, 128], slots_ref uint8 [S, 128], table_ref uint8 [2, 32, 256]."""
    tables = [(table_ref[p, :, _HALVES[0]], table_ref[p, :, _HALVES[1]]) for p in range(2)]

    def chunk(c, y):
        words = pltpu.bitcast(slots_ref[pl.ds(pl.multiple_of(c * SLOTS, SLOTS), SLOTS), :], jnp.int32)
        # A word has 4 slots; its copies in the 8 sublanes look up the 8 columns of an entry.
        codes = [_index_and_mask(jnp.broadcast_to(words[r : r + 1], (8, LANES))) for r in range(8)]
        low, high = (_look_up([table] * 8, codes) for table in tables)
        tiles = []
        for a, b in zip(low, high, strict=True):
            tiles.append((a & _EVEN) | ((b & _EVEN) << 8))
            tiles.append((lax.shift_right_logical(a, 8) & _EVEN) | (b & ~_EVEN))
        for k in range(2):
            weight = pltpu.bitcast(jnp.concatenate(tiles[8 * k : 8 * k + 8]), jnp.bfloat16)  # [128, 128]
            y = y + common.dot(x_ref[2 * c + k], weight)
        return y

    chunks = len(slots_ref) // SLOTS
    y_ref[...] = lax.fori_loop(0, chunks, chunk, jnp.zeros_like(y_ref), unroll=1 if chunks % 2 else 2)


def _decode_table(codebooks: jax.Array) -> jax.Array:
    """Bytes of the bfloat16 entries of codebooks [M, 256 * 8], M of 1, 2 or 4: uint8 [2, 32, 256], row 4 * j + slot."""
    count = len(codebooks)
    bits = lax.bitcast_convert_type(codebooks.astype(jnp.bfloat16), jnp.uint16).reshape(count, 256, 8)
    rows = jnp.transpose(bits, (2, 0, 1))[:, np.arange(4) % count].reshape(32, 256)
    return jnp.stack([rows & np.uint16(255), rows >> np.uint16(8)]).astype(jnp.uint8)


def _decode_order(count: int, slots: int) -> np.ndarray:
    """Columns of the weight in the order in which the kernel decodes them, [slots / 16, 128]; M = count."""
    r, parity, j, half = np.ix_(np.arange(slots // 4), np.arange(2), np.arange(8), np.arange(2))
    return ((4 * r + 2 * half + parity) // count * 8 + j).reshape(-1, 128)


def decode_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    out: int,
) -> jax.Array:
    """Returns x @ W.T by decoding, float32 [tokens, out]; codebook entries are rounded to bfloat16.

    Args:
      x: float [tokens, in], up to 128 tokens.
      slots: as in `lookup_matmul`.
      codebooks: float [M, 256 * 8], M of 1, 2 or 4.
      scale: as in `lookup_matmul`.
      blocks: (1, 1).
      dimension: 8.
      out: outputs without padding.
    """
    del blocks, dimension
    row_scale, column_scale = layout.split_scale(scale)
    if column_scale is not None:
        x = x.astype(jnp.float32) * jnp.repeat(column_scale.astype(jnp.float32), 8)[None, :]
    count, out = _up(len(slots), SLOTS), slots.shape[1]
    order = _decode_order(len(codebooks), count)
    # Slots beyond the used ones hold whatever is there, against inputs that are zero.
    stacked = common.split_rows(jnp.pad(x, ((0, 0), (0, int(order.max()) + 1 - x.shape[1]))))[:, order]
    rows = len(stacked)
    y = pl.pallas_call(
        _decode_kernel,
        out_shape=jax.ShapeDtypeStruct((rows, out), jnp.float32),
        grid=(pl.cdiv(out, LANES),),
        in_specs=[
            pl.BlockSpec((len(order), rows, 128), lambda o: (0, 0, 0)),
            pl.BlockSpec((count, LANES), lambda o: (0, o)),
            pl.BlockSpec((2, 32, 256), lambda o: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, LANES), lambda o: (0, o)),
        interpret=common.interpret(),
    )(jnp.swapaxes(stacked, 0, 1), slots, _decode_table(codebooks))
    y = common.join_rows(y, x)[:, :out]
    return y if row_scale is None else y * row_scale.astype(jnp.float32)[None, :]

"""Additive codes on a TPU, by Pallas Mosaic: partial products for few tokens, decoding for more.

A TPU looks up bytes fastest: in tables of 128 entries, one per sublane, 4096 at a time. Both kernels live off that.

`lookup_matmul` sums partial products (see `layout`) that are rounded to two bytes with one step per token: the bytes
are looked up and summed apart, as integers, so all rounding is that of the table. Its work grows with the tokens.

`decode_matmul` looks up the two bytes of every bfloat16 weight and leaves the product to the matrix unit. Codebooks are
not added up: each has columns of its own, against the same inputs. The work is nearly that of one token for all.

Measured statically with libtpu's compiler for the shapes in experiments/results/tpu_static_cost, never run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.kernels import tpu_common as common
from jaxquant.kernels.codebook_matmul import layout

LANES, SLOTS = 128, 32  # a vector of bytes
# Slots of one grid step: their tables and codes fit in fast memory twice, and sums of bytes in 16 bits.
_STEP = 512
_EVEN = np.int32(0x00FF00FF)


def byte_gather(table: jax.Array, index: jax.Array) -> jax.Array:
    """out[r, c] = table[r, index[r, c]] for uint8 [32, 128]; indices below 128."""
    return common.gather(table, index, axis=1)


def _halves(table_ref, plane: int, rows: slice, index: jax.Array, mask: jax.Array) -> jax.Array:
    """Looks up 256 entries: int32 words of four bytes each."""
    low = pltpu.bitcast(byte_gather(table_ref[plane, rows, :LANES], index), jnp.int32)
    high = pltpu.bitcast(byte_gather(table_ref[plane, rows, LANES:], index), jnp.int32)
    return low ^ ((low ^ high) & mask)


def _index_and_mask(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low 7 bits of each byte as uint8, and bytes of ones where the top bit is set."""
    top = lax.shift_right_logical(word, 7) & np.int32(0x01010101)
    return pltpu.bitcast(word & np.int32(0x7F7F7F7F), jnp.uint8), (top << 8) - top


def _lookup_kernel(slots_ref, table_ref, sums_ref, partial_ref, *, planes: int, slots: int, out: int):
    @pl.when(pl.program_id(0) == 0)
    def _():
        partial_ref[...] = jnp.zeros_like(partial_ref)

    def column(j, _):
        lanes = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
        sums = [jnp.zeros((8, LANES), jnp.int32) for _ in range(2 * planes)]
        for s in range(0, slots, SLOTS):
            rows = slice(s, s + SLOTS)
            index, mask = _index_and_mask(pltpu.bitcast(slots_ref[rows, lanes], jnp.int32))
            for p in range(planes):
                bytes_ = _halves(table_ref, p, rows, index, mask)
                sums[2 * p] += bytes_ & _EVEN
                sums[2 * p + 1] += lax.shift_right_logical(bytes_, 8) & _EVEN
        for k, pair in enumerate(sums):
            partial_ref[k // 2, :, lanes] += (pair & 0xFFFF) + lax.shift_right_logical(pair, 16)
        return 0

    lax.fori_loop(0, out // LANES, column, 0)

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        sums_ref[...] = jnp.sum(partial_ref[...], axis=1)


def lookup_sums(slots: jax.Array, planes: jax.Array) -> jax.Array:
    """Sums planes[p, s, slots[s, o]] over s.

    Args:
      slots: uint8 [S, out], S a multiple of 32 and of 512 beyond 512, out a multiple of 128.
      planes: uint8 [P, S, 256].

    Returns:
      int32 [P, out].
    """
    (count, out), p = slots.shape, len(planes)
    step = min(_STEP, count)
    return pl.pallas_call(
        functools.partial(_lookup_kernel, planes=p, slots=step, out=out),
        out_shape=jax.ShapeDtypeStruct((p, out), jnp.int32),
        grid=(count // step,),
        in_specs=[
            pl.BlockSpec((step, out), lambda t: (t, 0)),
            pl.BlockSpec((p, step, 256), lambda t: (0, t, 0)),
        ],
        out_specs=pl.BlockSpec((p, out), lambda t: (0, 0)),
        scratch_shapes=[pltpu.VMEM((p, 8, out), jnp.int32)],
        interpret=common.interpret(),
    )(slots, planes)


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


def _padded(slots: jax.Array, used: tuple[int, int]) -> jax.Array:
    """Slots in whole vectors and steps; nothing to do for codes that were laid out for a TPU."""
    slots = slots[: used[0], : used[1]] if slots.shape[0] % SLOTS or slots.shape[1] % LANES else slots
    return common.pad_to(common.pad_to(slots, 0, _STEP if len(slots) > _STEP else SLOTS), 1, LANES)


def lookup_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    used: tuple[int, int],
    num_bytes: int = 2,
) -> jax.Array:
    """Returns x @ W.T by partial products, float32 [tokens, out].

    Args:
      x: float [tokens, in]; the time grows with the tokens.
      slots: uint8 [in / d * M, out] or more of both, see `layout`.
      codebooks: float [C * M, 256 * d].
      scale: float [out or 1, 1] or [1, in / d], or None.
      blocks: (1, C).
      dimension: d.
      used: slots and outputs without padding.
      num_bytes: of a partial product. Two have an error of about 5e-5 of the result, one about 1e-2: for those alone who
        have measured what that does to their model.
    """
    row_scale, column_scale = layout.split_scale(scale)
    table = layout.partial_products(x, codebooks, column_scale, blocks=blocks, dimension=dimension)[0]
    slots = _padded(slots, used)
    planes, step = byte_planes(jnp.pad(table, ((0, len(slots) - len(table)), (0, 0), (0, 0))), num_bytes)
    sums = lookup_sums(slots, planes).astype(jnp.float32).reshape(num_bytes, len(x), -1)
    y = sums[-1] - jnp.float32(128 * len(slots))
    if num_bytes == 2:
        y = 256 * y + sums[0]
    y = (y * step[:, None])[:, : used[1]]
    return y if row_scale is None else y * row_scale.astype(jnp.float32)[None, :]


def _decode_kernel(x_ref, slots_ref, table_ref, y_ref, *, slots: int):
    """One column of outputs: x_ref [chunks, rows, 128], slots_ref int32 [S / 4, 128], table_ref [2, 32, 256]."""
    everything = slice(None)

    def chunk(c, y):
        words = slots_ref[pl.ds(pl.multiple_of(c * 8, 8), 8), :]
        tiles = []
        for r in range(8):  # a word has 4 slots; its copies in the 8 sublanes look up the 8 columns of an entry
            index, mask = _index_and_mask(jnp.broadcast_to(words[r : r + 1], (8, LANES)))
            low, high = (_halves(table_ref, p, everything, index, mask) for p in range(2))
            tiles.append((low & _EVEN) | ((high & _EVEN) << 8))
            tiles.append((lax.shift_right_logical(low, 8) & _EVEN) | (high & ~_EVEN))
        for k in (0, 8):
            weight = pltpu.bitcast(jnp.concatenate(tiles[k : k + 8]), jnp.bfloat16)  # [128, 128]
            y = y + common.dot(x_ref[2 * c + k // 8], weight)
        return y

    y_ref[...] = lax.fori_loop(0, slots // SLOTS, chunk, jnp.zeros_like(y_ref))


def _decode_table(codebooks: jax.Array) -> jax.Array:
    """Bytes of the bfloat16 entries of codebooks [M, 256 * 8], M of 1, 2 or 4: uint8 [2, 32, 256], row 4 * j + slot."""
    count = len(codebooks)
    bits = lax.bitcast_convert_type(codebooks.astype(jnp.bfloat16), jnp.uint16).reshape(count, 256, 8)
    rows = jnp.transpose(bits, (2, 0, 1))[:, np.arange(4) % count].reshape(32, 256)
    return jnp.stack([rows & np.uint16(255), rows >> np.uint16(8)]).astype(jnp.uint8)


def _decode_order(count: int, slots: int) -> np.ndarray:
    """Columns of the weight in the order in which the kernel decodes them, [slots / 16, 128]; M = count."""
    r, parity, j, half = np.ix_(np.arange(slots // 4), [0, 1], np.arange(8), [0, 1])
    return ((4 * r + 2 * half + parity) // count * 8 + j).reshape(-1, 128)


def decode_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    used: tuple[int, int],
) -> jax.Array:
    """Returns x @ W.T by decoding, float32 [tokens, out]; codebook entries are rounded to bfloat16.

    Args:
      x: float [tokens, in], up to 128 tokens.
      slots: as in `lookup_matmul`.
      codebooks: float [M, 256 * 8], M of 1, 2 or 4.
      scale: as in `lookup_matmul`.
      blocks: (1, 1).
      dimension: 8.
      used: slots and outputs without padding.
    """
    del blocks, dimension
    row_scale, column_scale = layout.split_scale(scale)
    if column_scale is not None:
        x = x.astype(jnp.float32) * jnp.repeat(column_scale.astype(jnp.float32), 8)[None, :]
    slots = _padded(slots, used)
    order = _decode_order(len(codebooks), len(slots))
    stacked = common.split_rows(x)
    stacked = common.pad_to(stacked, 1, int(order.max()) + 1)[:, order]  # padding meets zeros
    rows, chunks = len(stacked), len(order)
    words = lax.bitcast_convert_type(slots.reshape(-1, 4, slots.shape[1]).swapaxes(1, 2), jnp.int32)
    y = pl.pallas_call(
        functools.partial(_decode_kernel, slots=len(slots)),
        out_shape=jax.ShapeDtypeStruct((rows, slots.shape[1]), jnp.float32),
        grid=(slots.shape[1] // LANES,),
        in_specs=[
            pl.BlockSpec((chunks, rows, 128), lambda o: (0, 0, 0)),
            pl.BlockSpec((len(words), LANES), lambda o: (0, o)),
            pl.BlockSpec((2, 32, 256), lambda o: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, LANES), lambda o: (0, o)),
        interpret=common.interpret(),
    )(jnp.swapaxes(stacked, 0, 1), words, _decode_table(codebooks))
    y = common.join_rows(y, x)[:, : used[1]]
    return y if row_scale is None else y * row_scale.astype(jnp.float32)[None, :]

"""Scalar codes on a TPU, by Pallas Mosaic: half words become bfloat16 weights, the matrix unit does the rest.

On a uniform grid a shift, a mask and an "or" make two weights at a time: 128 + code is the bfloat16 number 0x4300 | code,
and the 128 leaves the sum through the sums of the inputs. From a table of levels per row the weights are looked up along
sublanes, in tables of 8 entries of 32 bits. Of 16 levels an entry holds two, and the code's top bit chooses; of fewer
an entry holds one, and as another number what rounding left of it.

experiments/tpu_static_cost.py says what they cost by the compiler's schedule; they have not been run on a TPU yet.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.kernels import tpu_common as common
from jaxquant.kernels.uniform_matmul import layout

LANES = 128
_STRETCH = 512  # outputs of a grid step
_UNROLLED_LINES = 1024
_ONE28 = np.uint32(0x43004300)  # two times 128 in bfloat16


def _uniform_kernel(x_ref, words_ref, *refs, bits: int, lines: int, group: int | None, digits: int):
    """One stretch of outputs: x_ref [chunks, positions, rows, chunk], words_ref [lines / 2, outputs]."""
    *scale_refs, y_ref = refs
    chunk, mask = x_ref.shape[-1], np.uint32((2**bits - 1) * 0x10001)

    def step(c, y):
        words = words_ref[pl.ds(pl.multiple_of(c * (chunk // 2), chunk // 2), chunk // 2), :]
        for p in range(16 // bits):
            pair = ((words >> np.uint32(bits * p)) & mask) | _ONE28
            part = common.dot(x_ref[c, p], pltpu.bitcast(pair, jnp.bfloat16))
            if group is not None:
                part = part * scale_refs[0][pl.ds((p // digits * lines + c * chunk) // group, 1), :]
            y = y + part
        return y

    y_ref[...] = lax.fori_loop(0, len(x_ref), step, jnp.zeros_like(y_ref), unroll=unrolled(len(x_ref), chunk))


def chunk_lines(lines: int, group: int | None) -> int:
    """Lines of one product: enough to fill the matrix unit, in one group."""
    whole = lines if group is None else math.gcd(lines, group)
    return next(n for n in (256, 128, 64, 32, 16) if whole % n == 0)


def unrolled(chunks: int, chunk: int) -> int:
    """Products in one pass of the loop: the start and end of a pass hide nothing, so passes should be long."""
    return max(n for n in range(1, chunks + 1) if chunks % n == 0 and n * chunk <= max(chunk, _UNROLLED_LINES))


def _by_position(x: jax.Array, bits: int, lines: int, chunk: int) -> jax.Array:
    """Rows [rows, in] as the kernel reads them: [lines / chunk, positions, rows, chunk]."""
    x = jnp.pad(x, ((0, 0), (0, layout.positions(bits) * lines - x.shape[1])))
    x = x.reshape(len(x), layout.positions(bits), lines // chunk, chunk)
    if bits == 8:  # each code is two of 4 bits, the high one worth 16 times as much
        x = jnp.stack([x, 16 * x], axis=2).reshape(len(x), -1, *x.shape[2:])
    return jnp.transpose(x, (2, 1, 0, 3))


def uniform_matmul(x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T, float32 [tokens, out].

    Args:
      x: float [tokens, in], up to 128 tokens.
      words: uint32 [lines / 2, out], see `layout`.
      scale: float [out, groups]; with more than one group, lines are a multiple of the columns of a group.
      zero: unsigned integers [out, groups], or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
    """
    groups = scale.shape[1]
    group = None if groups == 1 else x.shape[1] // groups
    lines = 2 * words.shape[0]
    digits, chunk = max(1, bits // 4), chunk_lines(lines, group)
    rows = _by_position(common.split_rows(x), bits, lines, chunk)
    kernel = functools.partial(_uniform_kernel, bits=bits // digits, lines=lines, group=group, digits=digits)
    row_scale = scale.astype(jnp.float32).T
    if group is None:
        y = common.join_rows(_call(kernel, rows, words, stretch=_STRETCH), x) * row_scale
    else:  # padding asks for scales beyond the last group, against inputs that are zero
        more = layout.positions(bits) * lines // group - groups
        y = _call(kernel, rows, words, jnp.pad(row_scale, ((0, more), (0, 0))), stretch=_STRETCH)
        y = common.join_rows(y, x)
    return y - _offset(common.as_seen(x), scale, zero, bits)


def _call(kernel, rows: jax.Array, words: jax.Array, *tables: jax.Array, stretch: int) -> jax.Array:
    """Runs a kernel over stretches of outputs: rows are for all of them, words and tables [..., outputs] cut."""
    outputs = words.shape[1]
    cut = [words, *tables]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows.shape[2], outputs), jnp.float32),
        grid=(pl.cdiv(outputs, stretch),),
        in_specs=[pl.BlockSpec(rows.shape, lambda o: (0, 0, 0, 0))]
        + [pl.BlockSpec((len(x), stretch), lambda o: (0, o)) for x in cut],
        out_specs=pl.BlockSpec((rows.shape[2], stretch), lambda o: (0, o)),
        interpret=common.interpret(),
    )(rows, *cut)


def _offset(x: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int) -> jax.Array:
    """What the kernel's 128 and the zero points add to the product, float32 [tokens, out]."""
    (out, groups) = scale.shape
    point = jnp.full((out, groups), 2.0 ** (bits - 1)) if zero is None else zero.astype(jnp.float32)
    bias = 128.0 * (17 if bits == 8 else 1)
    sums = x.reshape(len(x), groups, -1).sum(-1)
    return jnp.einsum("tg,og->to", sums, scale.astype(jnp.float32) * (point + bias), precision="highest")


def _level_pair(words: jax.Array, table: jax.Array, place: int) -> jax.Array:
    """Two bfloat16 levels per word, of the codes of 4 bits at `place` in its halves.

    Args:
      words: uint32 [8, 128].
      table: uint32 [8, 128], levels k in the low halves and k + 8 in the high ones.
      place: first bit of the code.
    """
    low, high = (_look_up(table, words >> np.uint32(16 * half + place)) for half in range(2))
    # 16 if the top bit of the code is set (low half) or is not set (high half)
    right = words << np.uint32(1) if place == 0 else words >> np.uint32(place - 1)
    low = low >> (right & np.uint32(16))
    high = high << ((~words >> np.uint32(15 + place)) & np.uint32(16))
    return (low & np.uint32(0xFFFF)) | (high & np.uint32(0xFFFF0000))


def _exact_pairs(words: jax.Array, table: jax.Array, place: int) -> tuple[jax.Array, jax.Array]:
    """As `_level_pair` for 8 levels: what rounding left of them is in the high halves, and the second result."""
    low, high = (_look_up(table, words >> np.uint32(16 * half + place)) for half in range(2))
    left, right = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    return (low & left) | (high << np.uint32(16)), (low >> np.uint32(16)) | (high & right)


def _look_up(table: jax.Array, code: jax.Array) -> jax.Array:
    return common.gather(table, pltpu.bitcast(code & np.uint32(7), jnp.int32), axis=0)


def _level_kernel(x_ref, words_ref, table_ref, y_ref, *, bits: int):
    """One vector of outputs: x_ref [chunks, positions, rows, chunk], words_ref [lines / 2, 128], table_ref [8, 128]."""
    chunks, positions, _, chunk = x_ref.shape
    table = table_ref[...]

    def step(c, y):
        words = words_ref[pl.ds(pl.multiple_of(c * (chunk // 2), chunk // 2), chunk // 2), :]
        vectors = [words[s : s + 8] for s in range(0, chunk // 2, 8)]
        for p in range(positions):
            if bits == 4:
                parts = [[_level_pair(v, table, bits * p) for v in vectors]]
            else:
                parts = zip(*[_exact_pairs(v, table, bits * p) for v in vectors], strict=True)
            for part in parts:
                y = y + common.dot(x_ref[c, p], pltpu.bitcast(jnp.concatenate(list(part)), jnp.bfloat16))
        return y

    y_ref[...] = lax.fori_loop(0, chunks, step, jnp.zeros_like(y_ref), unroll=unrolled(chunks, chunk))


def _level_table(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the table of a kernel, uint32 [8, out], and by what it was multiplied, float32 [out].

    Sixteen levels have 16 bits each; multiplied by a factor per row that suits the row best, they lose 1.2e-3 in the
    mean (1.7e-3 unmultiplied) and 1.8e-3 in a bad row (3e-3). Fewer levels have 32 bits each.
    """
    levels = levels.astype(jnp.float32)
    if levels.shape[1] == 16:
        factors = (2.0 ** (np.arange(8) / 8)).astype(np.float32)[:, None, None]
        error = jnp.sum((common.rounded(levels[None] * factors) / factors - levels[None]) ** 2, axis=2)
        factor = jnp.take(factors[:, 0, 0], jnp.argmin(error, axis=0))
        parts = jnp.split((levels * factor[:, None]).astype(jnp.bfloat16), 2, axis=1)
    else:
        factor, left = jnp.ones(len(levels)), levels.astype(jnp.bfloat16)
        parts = left, (levels - common.rounded(levels)).astype(jnp.bfloat16)
    left, right = (lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32).T for part in parts)
    table = left | (right << np.uint32(16))
    # Four levels are there twice, so that the next bit of a word need not be masked.
    return jnp.tile(table, (8 // len(table), 1)), factor


def level_matmul(x: jax.Array, words: jax.Array, levels: jax.Array, scale: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T for a table of levels per row, float32 [tokens, out].

    Args:
      x: float [tokens, in], up to 128 tokens.
      words: as in `uniform_matmul`.
      levels: float [out, 2**bits].
      scale: float [out or 1, 1] or [1, in], or None.
      bits: 2, 3 or 4.
    """
    if scale is not None and scale.shape[1] > 1:
        x, scale = x.astype(jnp.float32) * scale.astype(jnp.float32), None
    lines = 2 * words.shape[0]
    table, factor = _level_table(levels)
    rows = _by_position(common.split_rows(x), bits, lines, chunk_lines(lines, None))
    y = _call(functools.partial(_level_kernel, bits=bits), rows, words, table, stretch=LANES)
    y = common.join_rows(y, x) / factor[None, :]
    return y if scale is None else y * scale.astype(jnp.float32).T

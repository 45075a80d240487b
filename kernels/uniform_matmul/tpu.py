"""Scalar codes on a TPU, by Pallas Mosaic: half words become bfloat16 weights, the matrix unit does the rest.

On a uniform grid a shift, a mask and an "or" make two weights at a time: 128 + code is the bfloat16 number 0x4300 | code,
and the 128 leaves the sum through the sums of the inputs. From a table of levels per row the weights are looked up along
sublanes: 8 entries of 32 bits at most, so an entry holds two bfloat16 levels and the code's top bit chooses.

Measured statically with libtpu's compiler for the shapes in experiments/results/tpu_static_cost, never run on a TPU.
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
_ONE28 = 0x43004300  # two times 128 in bfloat16


def _shifted(words: jax.Array, bits: int) -> jax.Array:
    return words if bits == 0 else lax.shift_right_logical(words, bits)


def _uniform_kernel(x_ref, words_ref, *refs, bits: int, lines: int, group: int | None, digits: int):
    """One stretch of outputs: x_ref [chunks, positions, rows, chunk], words_ref [lines / 2, outputs]."""
    *scale_refs, y_ref = refs
    chunk, mask = x_ref.shape[-1], np.int32((2**bits - 1) * 0x10001)

    def step(c, y):
        words = words_ref[pl.ds(pl.multiple_of(c * (chunk // 2), chunk // 2), chunk // 2), :]
        for p in range(16 // bits):
            pair = (_shifted(words, bits * p) & mask) | np.int32(_ONE28)
            part = common.dot(x_ref[c, p], pltpu.bitcast(pair, jnp.bfloat16))
            if group is not None:
                part = part * scale_refs[0][pl.ds((p // digits * lines + c * chunk) // group, 1), :]
            y = y + part
        return y

    y_ref[...] = lax.fori_loop(0, lines // chunk, step, jnp.zeros_like(y_ref))


def _chunk(lines: int, group: int | None) -> int:
    """Lines of one product: enough to fill the matrix unit, in one group."""
    whole = lines if group is None else math.gcd(lines, group)
    return next(n for n in (256, 128, 64, 32, 16) if whole % n == 0)


def _stretch(outputs: int) -> int:
    """Outputs of one grid step."""
    return next(n for n in (512, 256, 128) if outputs % n == 0)


def _by_position(x: jax.Array, bits: int, lines: int, chunk: int) -> jax.Array:
    """Rows [rows, in] as the kernel reads them: [lines / chunk, positions, rows, chunk]."""
    x = jnp.pad(x, ((0, 0), (0, layout.positions(bits) * lines - x.shape[1])))
    x = x.reshape(len(x), layout.positions(bits), lines // chunk, chunk)
    if bits == 8:  # each code is two of 4 bits, the high one worth 16 times as much
        x = jnp.stack([x, 16 * x], axis=2).reshape(len(x), -1, *x.shape[2:])
    return jnp.transpose(x, (2, 1, 0, 3))


def uniform_matmul(
    x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> jax.Array:
    """Returns x @ W.T, float32 [tokens, out].

    Args:
      x: float [tokens, in], up to 128 tokens.
      words: uint32 [lines / 2, out or more], see `layout`; more means whole vectors of 128.
      scale: float [out, groups]; with more than one group, lines are a multiple of the columns of a group.
      zero: unsigned integers [out, groups], or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
    """
    (out, groups), columns = scale.shape, x.shape[1]
    group = None if groups == 1 else columns // groups
    lines, outputs = 2 * words.shape[0], words.shape[1]
    digits, chunk = max(1, bits // 4), _chunk(lines, group)
    rows = _by_position(common.split_rows(x), bits, lines, chunk)
    kernel = functools.partial(_uniform_kernel, bits=bits // digits, lines=lines, group=group, digits=digits)
    row_scale = scale.astype(jnp.float32).T
    if group is None:
        y = common.join_rows(_call(kernel, rows, words), x)[:, :out] * row_scale
    else:  # padding asks for scales beyond the last group, against inputs that are zero
        more = layout.positions(bits) * lines // group - groups
        y = _call(kernel, rows, words, jnp.pad(row_scale, ((0, more), (0, outputs - out))))
        y = common.join_rows(y, x)[:, :out]
    return y - _offset(common.as_seen(x), scale, zero, bits)


def _call(kernel, rows: jax.Array, words: jax.Array, *tables: jax.Array, stretch: int | None = None) -> jax.Array:
    """Runs a kernel over stretches of outputs: rows are for all of them, words and tables [..., outputs] cut."""
    outputs = words.shape[1]
    stretch = stretch or _stretch(outputs)
    cut = [lax.bitcast_convert_type(words, jnp.int32), *tables]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows.shape[2], outputs), jnp.float32),
        grid=(outputs // stretch,),
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


def _level_pair(words: jax.Array, table: jax.Array, bits: int, place: int) -> jax.Array:
    """Two bfloat16 levels per word, of the codes at `place` in its halves: int32 [8, 128] of table int32 [8, 128]."""
    look_up = [
        common.gather(table, _shifted(words, 16 * half + place) & np.int32(min(7, 2**bits - 1)), axis=0)
        for half in range(2)
    ]
    if bits == 4:  # 16 if the top bit of the code is set (low half) or is not set (high half)
        right = (words << 1 if place == 0 else _shifted(words, place - 1)) & 16
        look_up[0] = lax.shift_right_logical(look_up[0], right)
        look_up[1] = look_up[1] << (_shifted(~words, 15 + place) & 16)
    return (look_up[0] & 0xFFFF) | (look_up[1] & common.bits(0xFFFF0000))


def _level_kernel(x_ref, words_ref, table_ref, y_ref, *, bits: int):
    """One vector of outputs: x_ref [chunks, positions, rows, chunk], words_ref [lines / 2, 128], table_ref [8, 128]."""
    chunks, positions, _, chunk = x_ref.shape
    table = table_ref[...]

    def step(c, y):
        words = words_ref[pl.ds(pl.multiple_of(c * (chunk // 2), chunk // 2), chunk // 2), :]
        for p in range(positions):
            pairs = [_level_pair(words[s : s + 8], table, bits, bits * p) for s in range(0, chunk // 2, 8)]
            y = y + common.dot(x_ref[c, p], pltpu.bitcast(jnp.concatenate(pairs), jnp.bfloat16))
        return y

    y_ref[...] = lax.fori_loop(0, chunks, step, jnp.zeros_like(y_ref))


def level_matmul(
    x: jax.Array, words: jax.Array, levels: jax.Array, scale: jax.Array | None, *, bits: int
) -> jax.Array:
    """Returns x @ W.T for a table of levels per row, float32 [tokens, out]; levels are rounded to bfloat16.

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
    entries = lax.bitcast_convert_type(levels.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32).T
    entries = jnp.pad(entries, ((0, max(0, 8 - len(entries))), (0, words.shape[1] - len(levels))))
    table = lax.bitcast_convert_type(entries[:8] | (entries[-8:] << np.uint32(16)), jnp.int32)
    rows = _by_position(common.split_rows(x), bits, lines, _chunk(lines, None))
    y = _call(functools.partial(_level_kernel, bits=bits), rows, words, table, stretch=LANES)
    y = common.join_rows(y, x)[:, : len(levels)]
    return y if scale is None else y * scale.astype(jnp.float32).T
